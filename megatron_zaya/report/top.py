"""`zaya top`: a run in the terminal, read from its folder like a report. Fits itself to the width of the terminal."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_zaya.report.canvas import count, short
from megatron_zaya.report.facts import iterations_wanted, layout_text, restarts, tokens_seen
from megatron_zaya.report.records import Columns
from megatron_zaya.report.run import Run, ago, read_run, refresh, state_of

LEVELS = {"good": "bold green", "busy": "bold cyan", "warning": "bold yellow", "bad": "bold red"}
TICKS = "▁▂▃▄▅▆▇█"
WIDE = 120
RECENT = 50
"""Steps that the speed and the time left are taken from."""
LINES = 6
"""Lines of what happened last."""
GIB = 2.0**30


def follow(folder: Path, interval_s: float = 2.0, once: bool = False) -> None:
    """Show a run until Ctrl-C; one picture only with ``once``, or where the output is no terminal.

    Raises:
        ReportError: the folder holds no run.
    """
    console, run = Console(), read_run(folder)
    if once or not console.is_terminal:
        console.print(frame(run, console.width, time.time()))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(frame(run, console.width, time.time(), console.height), refresh=True)
                time.sleep(interval_s)
                refresh(run)
        except KeyboardInterrupt:
            return


def frame(run: Run, width: int, now: float, height: int = 60) -> RenderableType:
    """Return one picture of a run."""
    steps = run.steps()
    parts: list[RenderableType] = [_heading(run, now)]
    if len(steps["loss"]):
        wide = width >= WIDE
        inside = (width // 2 if wide else width) - 4
        learning, speed = _learning(run, steps, inside), _speed(run, steps, inside)
        rows, lines = _room(height, learning.row_count, speed.row_count, wide)
        parts += [
            _progress(run, steps),
            _panels(wide, learning=learning, speed=speed),
            _panels(wide, experts=_experts(run, steps, inside, rows), happened=_happened(run, now, inside, lines)),
        ]
    parts += [Text(problem, style="yellow") for problem in run.problems[:3]]
    return Group(*parts)


def _room(height: int, learning: int, speed: int, wide: bool) -> tuple[int, int]:
    """Return how many layers and how many lines of news a terminal of this height has room for."""
    if wide:
        left = height - 4 - max(learning, speed) - 2
        return max(0, min(12, left - 4)), max(1, min(LINES, left - 3))
    left = height - 4 - learning - speed - 4
    lines = max(1, min(LINES, left - 6))
    return max(0, min(12, left - 3 - lines - 4)), lines


def _panels(wide: bool, **contents: RenderableType) -> RenderableType:
    """Return boxes with titles, beside each other or one below the other."""
    boxes = [Panel(content, title=title, title_align="left", border_style="dim") for title, content in contents.items()]
    if not wide:
        return Group(*boxes)
    grid = Table.grid(expand=True)
    for _ in boxes:
        grid.add_column(ratio=1)
    grid.add_row(*boxes)
    return grid


def _heading(run: Run, now: float) -> Text:
    state = state_of(run, now)
    text = Text.assemble((run.name, "bold"), "  ", (state.word, LEVELS[state.level]), "  ", (state.sentence, "dim"))
    part = run.parts[-1] if run.parts else None
    if part is not None and part.world_size:
        layout = f", {layout_text(part.config)}" if part.config else ""
        text.append(f"\n{count(part.world_size, 'rank')}{layout}", style="dim")
    if part is not None and len(run.parts) > 1:
        text.append(f"   phase {len(run.parts)}: {part.name}", style="dim")
    return text


def _progress(run: Run, steps: Columns) -> RenderableType:
    done, wanted = int(steps["iteration"][-1]), max(iterations_wanted(run), 1)
    left = (wanted - done) * float(np.median(steps["step_time_s"][-RECENT:]))
    words = f" {done:,}/{wanted:,}  {short(tokens_seen(run))} tokens"
    words += f"  {ago(left)} left" if done < wanted else ""
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    grid.add_row(ProgressBar(total=wanted, completed=done), words)
    return grid


def sparkline(values: NDArray[np.float64], width: int) -> str:
    """Return the values as a line of ``width`` little bars, from their least to their greatest."""
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    cells = [chunk.mean() for chunk in np.array_split(values, min(width, len(values)))]
    low, span = min(cells), max(cells) - min(cells)
    return "".join(TICKS[int((cell - low) / span * (len(TICKS) - 1)) if span else 0] for cell in cells)


def _table(rows: list[tuple[str, str, str]]) -> Table:
    """Return rows of name, figure and sparkline."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True, style="bold")
    grid.add_column(no_wrap=True, style="cyan")
    for row in rows:
        grid.add_row(*row)
    return grid


def _learning(run: Run, steps: Columns, width: int) -> Table:
    space = max(8, width - 24)
    rows = [
        ("loss", f"{steps['loss'][-1]:.4f}", sparkline(steps["loss"], space)),
        ("gradient norm", f"{steps['grad_norm'][-1]:.3g}", sparkline(steps["grad_norm"], space)),
        ("learning rate", f"{steps['learning_rate'][-1]:.3g}", sparkline(steps["learning_rate"], space)),
    ]
    evaluated = [record["loss"] for record in run.events("Evaluated")]
    if evaluated:
        rows.insert(1, ("held-out loss", f"{evaluated[-1]:.4f}", sparkline(np.array(evaluated), space)))
    return _table(rows)


def _speed(run: Run, steps: Columns, width: int) -> Table:
    space = max(8, width - 24)
    recent = steps["step_time_s"][-RECENT:]
    rows = [
        ("tokens/s", short(float(np.median(steps["tokens_per_s"][-RECENT:]))), sparkline(steps["tokens_per_s"], space)),
        ("step", f"{np.median(recent) * 1e3:,.0f} ms", sparkline(steps["step_time_s"], space)),
    ]
    if math.isfinite(steps["mfu"][-1]):
        rows.append(("MFU", f"{steps['mfu'][-1]:.1%}", sparkline(steps["mfu"], space)))
    waits = run.events("Communication")
    if waits:
        values = np.array([record.get("grad_sync_s") or 0.0 for record in waits])
        rows.append(("gradient wait", f"{values[-1] * 1e3:,.1f} ms", sparkline(values, space)))
    used = run.events("MemoryUsed")
    for name, label in (("device_peak_bytes", "memory"), ("host_bytes", "host memory")):
        values = np.array([record.get(name) or 0.0 for record in used])
        if values.any():
            rows.append((label, f"{values[-1] / GIB:.2f} GiB", sparkline(values, space)))
    return _table(rows)


def _experts(run: Run, steps: Columns, width: int, rows: int) -> RenderableType:
    """Show the load of each expert of the least even layers as shades: dim is little, bright red much."""
    line = (
        f"busiest {steps['max_expert_load'][-1]:.2f}x  entropy {steps['load_entropy'][-1]:.3f}  "
        f"skip {steps['skip_rate'][-1]:.1%}  without a token {steps['dead_experts'][-1]:.0f}"
    )
    records = run.events("MoeHealth")
    loads = records[-1].get("expert_loads") if records else None
    if not loads or not rows:
        return Text(line)
    worst = sorted(range(len(loads)), key=lambda layer: -max(loads[layer]))[:rows]
    cell = 2 if len(loads[0]) * 2 + 16 <= width else 1
    text = Text(line + "\n")
    for layer in sorted(worst):
        text.append(f"layer {layer:3d} ", style="dim")
        for load in loads[layer][: width - 16]:
            text.append(_shade(load) * cell, style=_colour(load))
        text.append(f" {max(loads[layer]):5.2f}x\n", style="dim")
    more = len(loads) - len(worst)
    text.append(f"{count(more, 'more even layer')} not shown" if more else "each cell is an expert", style="dim")
    return text


def _shade(load: float) -> str:
    return "·" if load == 0 else "░" if load < 0.5 else "▒" if load < 0.8 else "▓" if load < 1.25 else "█"


def _colour(load: float) -> str:
    return "red" if load == 0 or load >= 2 else "yellow" if load >= 1.25 else "cyan" if load < 0.8 else "green"


def _happened(run: Run, now: float, width: int, newest: int) -> RenderableType:
    lines = sorted(_news(run), key=lambda line: line[0])[-newest:]
    head = f"{count(len(run.events('Saved')), 'checkpoint')}, {count(restarts(run), 'restart')}, "
    text = Text(head + count(len(run.supervised("incident")), "incident"))
    for moment, words, style in reversed(lines):
        text.append(f"\n{ago(now - moment):>12} ago  ", style="dim")
        text.append(words[: max(20, width - 19)], style=style)
    return text


def _news(run: Run) -> list[tuple[float, str, str]]:
    """Return (time, sentence, style) of what is worth a line."""
    news: list[tuple[float, str, str]] = []

    def add(kind: str, style: str, say: Any) -> None:
        news.extend((record["time"], say(record), style) for record in run.events(kind) if "time" in record)

    add("Saved", "green", lambda r: f"saved iteration {r['iteration']:,} in {r.get('time_s', 0):.2f} s")
    add("SaveFailed", "red", lambda r: f"NOT saved, iteration {r['iteration']:,}: {r.get('reason')}")
    add("Evaluated", "", lambda r: f"held-out loss {r['loss']:.4f} at iteration {r['iteration']:,}")
    add("RunStarted", "cyan", lambda r: f"started at iteration {r['iteration']:,}")
    add("LossSpike", "yellow", lambda r: f"loss jumped to {r['loss']:.3f} at iteration {r['iteration']:,}")
    add("StepSkipped", "yellow", lambda r: f"step {r['iteration']:,} left out: loss {r['loss']}")
    add("RunEnded", "bold", lambda r: f"ended after iteration {r['iteration']:,}: {r.get('reason')}")
    for event in run.launch:
        words = event["event"].replace("_", " ")
        if event["event"] == "incident":
            news.append((event["time"], f"incident: {event.get('category')}: {event.get('reason')}", "red"))
        elif event["event"] not in ("training", "job_started", "attempt_started", "preflight_done"):
            news.append((event["time"], words, "yellow"))
    return news
