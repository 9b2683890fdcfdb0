"""The figures of a run in words: tiles and tables of a page, and the plan beside what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ckpt.errors import CheckpointError
from ckpt.steps import check_step, step_folders
from megatron_zaya.config import ConfigError, RunConfig
from megatron_zaya.report.canvas import count, short
from megatron_zaya.report.run import Part, Run, ago

GIB = 2.0**30


@dataclass(frozen=True)
class Tile:
    """One figure in large type."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of a page; the first column names its rows."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass
class Planned:
    """Predictions for a part of a run beside what it did."""

    part: str
    table: Table | None = None
    candidate: Any = None
    capacity_bytes: float = 0.0
    measured_peak_bytes: float = 0.0
    problems: list[str] = field(default_factory=list)


def utc(moment: float) -> str:
    """Return a time as text."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S")


def size(count: float) -> str:
    """Return bytes as text, in powers of 1000."""
    return f"{short(count)}B" if count >= 1000 else f"{count:.0f} B"


def tiles(run: Run) -> list[Tile]:
    """Return what a person asks first."""
    steps, wanted = run.steps(), iterations_wanted(run)
    if not len(steps["loss"]):
        return [Tile("iterations", f"0 of {wanted:,}" if wanted else "0")]
    done = int(steps["iteration"][-1])
    evaluated = [record["loss"] for record in run.events("Evaluated")]
    ranks = run.parts[-1].world_size
    tokens_per_s = float(np.median(steps["tokens_per_s"]))
    begin, end = _span(run)
    counted = float(steps["step_time_s"].sum()) / max(end - begin, 1e-9)
    saved, incidents = run.events("Saved"), run.supervised("incident")
    found = [
        Tile("iterations", f"{done:,}" + (f" of {wanted:,}" if wanted else ""), f"{short(tokens_seen(run))} tokens"),
        Tile(
            "training loss", f"{steps['loss'][-1]:.4f}", f"held-out at best {min(evaluated):.4f}" if evaluated else ""
        ),
        Tile("tokens per second", short(tokens_per_s), f"{short(tokens_per_s / ranks)} per rank" if ranks else ""),
    ]
    if np.isfinite(steps["mfu"]).any():
        flops = f"{np.nanmedian(steps['tflops']):.0f} TFLOP/s per accelerator"
        found.append(Tile("model FLOPs utilisation", f"{np.nanmedian(steps['mfu']):.1%}", flops))
    found += [
        Tile("wall-clock time", ago(end - begin), f"{min(counted, 1.0):.0%} of it in steps that count"),
        Tile("checkpoints", str(len(saved)), f"newest: iteration {saved[-1]['iteration']:,}" if saved else ""),
        Tile("incidents", str(len(incidents)), count(restarts(run), "restart")),
    ]
    return found


def iterations_wanted(run: Run) -> int:
    """Return the iterations of the whole schedule, or 0 where no part could say."""
    total = 0
    for part in run.parts:
        steps = part.metrics.steps()["train_iters"]
        total += int(steps[-1]) if len(steps) else part.config.schedule.train_iters if part.config else 0
    return total


def tokens_seen(run: Run) -> float:
    """Return the tokens that the run was trained on so far; repeated steps count once."""
    tokens = run.steps()["consumed_tokens"]
    return float(tokens[-1]) if len(tokens) else 0.0


def restarts(run: Run) -> int:
    """Return how often the run was started again, by its supervisor or by hand."""
    return sum(max(0, len(part.metrics.events("RunStarted")) - 1) for part in run.parts)


def _span(run: Run) -> tuple[float, float]:
    times = run.all_steps()["time"]
    starts = [record["time"] for record in run.launch[:1]] + [record["time"] for record in run.events("RunStarted")[:1]]
    return min([times[0], *starts]), times[-1]


def setup(run: Run) -> Table | None:
    """Return what was run: model, layout, optimizer, data, code."""
    part = run.parts[-1] if run.parts else None
    if part is None or part.config is None:
        return None
    config, rows = part.config, []
    starts = part.metrics.events("RunStarted")
    if starts:
        total, active = starts[-1].get("parameters", 0), starts[-1].get("parameters_active", 0)
        rows.append(("parameters", f"{short(total)}, {short(active)} active per token"))
        rows.append(("ranks", f"{starts[-1].get('world_size')}, data parallel {starts[-1].get('data_parallel_size')}"))
        rows.append(("optimizer", starts[-1].get("optimizer", "")))
    m, s, d = config.model, config.schedule, config.data
    rows.append(("model", f"{m.num_layers} layers, width {m.hidden_size:,}, {m.num_moe_experts} experts a layer"))
    rows.append(("layout", layout_text(config)))
    rows.append(("batch", f"{s.global_batch_size:,} x {d.seq_length:,} tokens, micro-batch {s.micro_batch_size}"))
    rows.append(("precision", config.run.precision))
    rows.append(("data", " ".join(d.data_path) or "not named"))
    rows.append(("code", _revision(run)))
    rows.append(("folder", str(run.folder)))
    return Table("What was run", ("", ""), [row for row in rows if row[1]])


def layout_text(config: RunConfig) -> str:
    """Return the parallel sizes above one, as in `tp2 pp4`."""
    p = config.parallel
    sizes = {
        "tp": p.tensor_model_parallel_size,
        "pp": p.pipeline_model_parallel_size,
        "cp": p.context_parallel_size,
        "ep": p.expert_model_parallel_size,
    }
    text = " ".join(f"{name}{number}" for name, number in sizes.items() if number > 1) or "data parallel only"
    return text + (f", recompute {p.recompute_granularity}" if p.recompute_granularity else "")


def _revision(run: Run) -> str:
    try:
        record = json.loads((run.folder / "launch" / "code.json").read_text(encoding="utf-8"))
        changed = len(record.get("changed_files", []))
        return f"{record['revision'][:12]}, version {record['version']}" + (
            f", {count(changed, 'file')} changed" * bool(changed)
        )
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def phases(run: Run) -> Table | None:
    """Return one row a phase; None for a run without phases."""
    if len(run.parts) < 2:
        return None
    rows = []
    for part in run.parts:
        steps = part.metrics.steps()
        if not len(steps["loss"]):
            rows.append([part.name, "not started", "", "", "", ""])
            continue
        held_out = [record["loss"] for record in part.metrics.events("Evaluated")]
        rows.append([
            part.name,
            f"{steps['iteration'][-1]:,.0f} of {steps['train_iters'][-1]:,.0f}",
            short(steps["consumed_tokens"][-1]),
            f"{steps['loss'][0]:.4f} to {steps['loss'][-1]:.4f}",
            f"{held_out[-1]:.4f}" if held_out else "",
            short(float(np.median(steps["tokens_per_s"]))),
        ])  # fmt: skip
    return Table("Phases", ("phase", "iterations", "tokens", "training loss", "held-out loss", "tokens/s"), rows)


def saves(run: Run) -> Table | None:
    """Return one row a save, the newest first, with what lies on disk now."""
    rows = []
    for part in reversed(run.parts):
        folders = step_folders(part.folder / "checkpoints")
        for record in reversed(part.metrics.events("Saved")):
            rows.append([
                f"{record['iteration'] + part.first_iteration:,}",
                utc(record["time"]),
                f"{record.get('time_s', 0.0):.3g} s",
                f"{record.get('stall_s', 0.0):.3g} s",
                _on_disk(folders.get(record["iteration"])),
            ])  # fmt: skip
    header = ("iteration", "safe at (UTC)", "save took", "held up training", "on disk now")
    return Table("Saves, newest first", header, rows) if rows else None


def _on_disk(folder: Any) -> str:
    if folder is None:
        return "no"
    try:
        return size(check_step(folder).size)
    except CheckpointError as error:
        return f"DAMAGED: {error}"


def incidents(run: Run) -> Table | None:
    """Return one row an incident."""
    rows = [
        [
            str(event.get("number", "")),
            utc(event["time"]),
            str(event.get("iteration", "")),
            str(event.get("category", "")),
            _culprit(event),
            str(event.get("reason", "")),
            str(event.get("decision", "")),
        ]
        for event in run.supervised("incident")
    ]
    header = ("no.", "when (UTC)", "iteration", "category", "culprit", "reason", "decision")
    return Table("Incidents", header, rows) if rows else None


def _culprit(event: dict[str, Any]) -> str:
    rank, host = event.get("rank"), event.get("host") or ""
    return f"rank {rank} on {host}" if rank is not None else host or "not known"


def attempts(run: Run) -> Table | None:
    """Return one row a start of the ranks, supervised or by hand."""
    rows = []
    for part in run.parts:
        for start in part.metrics.events("RunStarted"):
            origin = start.get("resumed_from") or "fresh start"
            rows.append([utc(start["time"]), part.name, f"{start.get('iteration', 0):,}", str(origin)])
    if len(rows) < 2:
        return None
    return Table("Starts", ("when (UTC)", "part", "iterations done", "from"), rows)


def notable(run: Run) -> Table | None:
    """Return other things that the supervisor saw: stragglers, excluded nodes, requeues."""
    usual = {"job_started", "attempt_started", "training", "job_finished", "incident", "preflight_done"}
    rows = [
        [utc(event["time"]), event["event"].replace("_", " "), _fields(event)]
        for event in run.launch
        if event["event"] not in usual
    ]
    return Table("Also seen by the supervisor", ("when (UTC)", "event", ""), rows[-50:]) if rows else None


def _fields(event: dict[str, Any]) -> str:
    shown = {key: value for key, value in event.items() if key not in ("event", "time")}
    return ", ".join(f"{key}: {value}" for key, value in shown.items() if value not in ("", None, [], {}))


# -- the plan ----------------------------------------------------------------------------------------------------------


def planned(run: Run, accelerator: str) -> list[Planned]:
    """Return the planner's predictions for each part beside what the part did."""
    return [_planned(part, accelerator) for part in run.parts if len(part.metrics.steps()["loss"])]


def _planned(part: Part, name: str) -> Planned:
    from megatron_zaya.plan.hardware import Network, accelerator
    from megatron_zaya.plan.price import price_own_layout, wanted_of

    made = Planned(part.name)
    if part.config is None or not part.world_size:
        made.problems.append("Without its configuration and its number of ranks the run cannot be predicted.")
        return made
    device = accelerator(name)
    try:
        wanted = wanted_of(part.config, part.world_size, device)
        plan = price_own_layout(part.config, wanted, device, Network.of(device))
    except ConfigError as error:
        made.problems.append(f"The planner has no prediction: {error}")
        return made
    if not part.on_accelerator():
        made.problems.append(
            f"No rank reported memory of an accelerator: this run was on CPU, the plan is for {name}. The columns show "
            "what each says and are not to be compared."
        )
    made.candidate, made.capacity_bytes = plan, device.memory_bytes
    peaks = [record.get("device_peak_bytes") or 0 for record in part.metrics.events("MemoryUsed")]
    made.measured_peak_bytes = max(peaks, default=0)
    made.table = _beside(part, plan, device.peak_tflops, made.measured_peak_bytes, name)
    return made


def _beside(part: Part, plan: Any, peak_tflops: float, peak_bytes: float, name: str) -> Table:
    """Lay medians of the steps beside predictions; the first step of each start is left out: it warms up."""
    steps, time = part.metrics.steps(), plan.time
    first = [record.get("iteration", 0) + 1 for record in part.metrics.events("RunStarted")]
    warm = ~np.isin(steps["iteration"], first)
    step_s = float(np.median(steps["step_time_s"][warm])) if warm.any() else float("nan")
    tokens = float(np.median(steps["tokens_per_s"][warm])) / part.world_size if warm.any() else float("nan")
    tflops = tokens * time.flops_per_token / 1e12
    rows = [
        _row("time of a step", time.step_s * 1e3, step_s * 1e3, "ms"),
        _row("tokens/s per rank", time.tokens_per_gpu_s, tokens, ""),
        _row("model TFLOP/s per rank", time.tflops, tflops, ""),
        _row(f"MFU of {name}", time.mfu * 100, tflops / peak_tflops * 100, "%"),
        _row("memory at the peak of the fullest rank", plan.memory.worst.peak / GIB, peak_bytes / GIB or None, "GiB"),
    ]
    note = f"Predicted for {plan.layout.describe()} on {part.world_size} x {name}; measured: medians of warm steps."
    return Table(
        f"Plan and measurement: {part.name}", ("", "predicted", "measured", "measured / predicted"), rows, note
    )


def _row(label: str, predicted: float, measured: float | None, unit: str) -> list[str]:
    def text(value: float) -> str:
        return f"{value:,.0f} {unit}".strip() if abs(value) >= 1000 else f"{value:.3g} {unit}".strip()

    if measured is None or not np.isfinite(measured):
        return [label, text(predicted), "not measured", ""]
    return [label, text(predicted), text(measured), f"{measured / predicted:.3g}" if predicted else ""]
