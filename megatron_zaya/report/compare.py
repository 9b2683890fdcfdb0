"""Several runs side by side: their lines in one chart, their figures in one table, and where their settings differ."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_zaya.report import canvas
from megatron_zaya.report.canvas import COLOURS, binned, short, smooth
from megatron_zaya.report.charts import Chart
from megatron_zaya.report.facts import Table, layout_text, restarts, tokens_seen
from megatron_zaya.report.run import Run, state_of

SHOWN = (
    ("loss", "Training loss", "nats per token"),
    ("tokens_per_s", "Throughput", "tokens/s, all ranks"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("max_expert_load", "Busiest expert", "multiples of an even share"),
)


def charts(runs: list[Run]) -> list[Chart]:
    """Return one chart for each figure, over the tokens seen."""
    return [canvas.styled(_chart, runs, *shown) for shown in SHOWN] + [canvas.styled(_held_out, runs)]


def _axes(chart: Chart, unit: str) -> Any:
    chart.figure = canvas.figure(height=3.4)
    axes = chart.figure.subplots()
    axes.set_xlabel("tokens seen")
    axes.set_ylabel(unit)
    canvas.big_numbers(axes.xaxis)
    return axes


def _chart(runs: list[Run], name: str, title: str, unit: str) -> Chart:
    chart = Chart(f"compare-{name.replace('_', '-')}", title, "No step has been recorded yet.")
    drawn = [(run, run.steps()) for run in runs]
    drawn = [(run, steps) for run, steps in drawn if len(steps[name])]
    if not drawn:
        return chart
    axes, words = _axes(chart, unit), []
    for number, (run, steps) in enumerate(drawn):
        x, y = binned(steps["consumed_tokens"], steps[name])
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(x, smooth(y), color=colour, linewidth=1.8, label=run.name, linestyle="-" if number < 8 else "--")
        words.append(f"{run.name} {y[-1]:.4g}" if len(y) else f"{run.name} nothing")
    canvas.legend(axes)
    chart.text = f"{title} ({unit}) at the end: {', '.join(words)}."
    return chart


def _held_out(runs: list[Run]) -> Chart:
    chart = Chart("compare-held-out", "Held-out loss", "No run was evaluated.")
    axes, words = None, []
    for number, run in enumerate(runs):
        steps = run.steps()
        tokens = dict(zip(steps["iteration"], steps["consumed_tokens"], strict=True))
        points = {r["iteration"]: r["loss"] for r in run.events("Evaluated") if r["iteration"] in tokens}
        if points:
            axes = axes or _axes(chart, "nats per token")
            x = [tokens[iteration] for iteration in sorted(points)]
            y = [points[iteration] for iteration in sorted(points)]
            axes.plot(x, y, "o-", color=COLOURS[number % len(COLOURS)], markersize=4, label=run.name)
            words.append(f"{run.name} {y[-1]:.4f}")
    if axes is not None:
        canvas.legend(axes)
        chart.text = f"Held-out loss at the end: {', '.join(words)}."
    return chart


def figures(runs: list[Run]) -> Table:
    """Return the figures of every run, one row each."""
    rows = []
    for run in runs:
        steps = run.steps()
        held_out = [record["loss"] for record in run.events("Evaluated")]
        config = run.parts[-1].config if run.parts else None
        if not len(steps["loss"]):
            rows.append([run.name, state_of(run).word, *[""] * 7])
            continue
        rows.append([
            run.name,
            state_of(run).word,
            layout_text(config) if config else "",
            f"{steps['iteration'][-1]:,.0f}",
            short(tokens_seen(run)),
            f"{steps['loss'][-1]:.4f}",
            f"{min(held_out):.4f}" if held_out else "",
            short(float(np.median(steps["tokens_per_s"]))),
            str(restarts(run)),
        ])  # fmt: skip
    header = (
        "run",
        "state",
        "layout",
        "iterations",
        "tokens",
        "training loss",
        "best held-out",
        "tokens/s",
        "restarts",
    )
    return Table("The runs", header, rows)


def differences(runs: list[Run]) -> Table | None:
    """Return the settings in which the runs differ, one row a setting."""
    trees = [
        _flat(run.parts[-1].config.model_dump(mode="json")) if run.parts and run.parts[-1].config else {}
        for run in runs
    ]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    differing = [key for key in keys if len({repr(tree.get(key)) for tree in trees}) > 1]
    rows = [[key, *("" if key not in tree else str(tree[key]) for tree in trees)] for key in differing]
    return Table("Settings that differ", ("setting", *(run.name for run in runs)), rows) if rows else None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
