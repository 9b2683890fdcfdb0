"""The charts of a run. Each takes the run and returns a Chart: a figure, or the reason why there is none.

Iterations are counted over the whole run: phases lie one after the other, with their names above the line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_zaya.report import canvas
from megatron_zaya.report.canvas import BLUE, COLOURS, GREEN, MUTED, RED, binned, count, smooth
from megatron_zaya.report.run import Run

GIB = 2.0**30


@dataclass
class Chart:
    """One picture of a page."""

    name: str
    title: str
    text: str
    """What it shows, with the figures that matter: read aloud in place of the picture."""
    figure: Any = None
    """matplotlib's figure; None where there is nothing to draw, and ``text`` says why."""


def draw(run: Run) -> list[Chart]:
    """Return all charts of a run, in the order of a page."""
    makers: tuple[Callable[[Run], Chart], ...] = (
        loss, gradients, throughput, waiting, progress, checkpoints, experts, balance, memory,
    )  # fmt: skip
    return [canvas.styled(maker, run) for maker in makers]


def _line(axes: Any, x: Any, y: Any, colour: str, label: str, cuts: Sequence[float] = ()) -> None:
    """Draw every value thinly and their moving average on top; anew after each of ``cuts`` on the axis of x."""
    ends = [0, *np.searchsorted(x, cuts, side="right"), len(x)]
    for low, high in pairwise(ends):
        part_x, part_y = binned(x[low:high], y[low:high])
        name = label if low == 0 else ""
        if len(part_x) < 8:
            axes.plot(part_x, part_y, "o-", color=colour, linewidth=1.6, markersize=4, label=name)
        else:
            axes.plot(part_x, part_y, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(part_x, smooth(part_y), color=colour, linewidth=1.8, label=name)


def _cuts(run: Run) -> list[float]:
    """Return where phases end, in iterations of the whole run."""
    return [float(part.first_iteration) for part in run.parts[1:]]


def _iterations(axes: Any, run: Run, names_above: bool = False) -> None:
    """Label the axis of iterations; mark phases and restarts."""
    axes.set_xlabel("iteration")
    canvas.big_numbers(axes.xaxis)
    if len(run.parts) > 1:
        steps = run.steps()["iteration"]
        ends = [*_cuts(run), steps[-1] if len(steps) else 0.0]
        for part, end in zip(run.parts, ends, strict=True):
            if end > part.first_iteration:
                if part.first_iteration:
                    axes.axvline(part.first_iteration, color=MUTED, linewidth=0.8)
                middle = (part.first_iteration + end) / 2
                axes.text(
                    middle, 1.01 if names_above else 0.98, part.name, transform=axes.get_xaxis_transform(),
                    ha="center", va="bottom" if names_above else "top", fontsize=9, color=MUTED,
                )  # fmt: skip
    for incident in run.supervised("incident"):
        if len(run.parts) == 1:  # the supervisor counts the iterations of a phase
            axes.axvline(incident.get("iteration", 0), color=RED, linestyle=(0, (2, 2)), linewidth=1)


def _latest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records by iteration; where a run was repeated from a checkpoint, the later one counts."""
    return [record for _, record in sorted({record["iteration"]: record for record in records}.items())]


def draw_losses(
    axes: Any, iterations: Any, losses: Any, held_out: Mapping[int, float], cuts: Sequence[float] = ()
) -> None:
    """Draw training and held-out loss, nats per token; phases end at ``cuts``."""
    _line(axes, iterations, losses, BLUE, "training", cuts)
    evaluated = sorted(held_out)
    parts = np.split(evaluated, np.searchsorted(evaluated, cuts, side="right")) if evaluated else []
    for part in parts:
        label = "held-out" if part is parts[0] else ""
        axes.plot(part, [held_out[number] for number in part], "o-", color=RED, markersize=4.5, label=label)
    axes.set_xlabel("iteration")
    axes.set_ylabel("nats per token")
    canvas.legend(axes)


def loss(run: Run) -> Chart:
    """Training and held-out loss."""
    chart = Chart("loss", "Loss", "No step has been recorded yet.")
    steps = run.steps()
    if not len(steps["loss"]):
        return chart
    chart.figure = canvas.figure(height=3.8)
    axes = chart.figure.subplots()
    held_out = {record["iteration"]: record["loss"] for record in run.events("Evaluated")}
    draw_losses(axes, steps["iteration"], steps["loss"], held_out, _cuts(run))
    spikes = run.events("LossSpike")
    if spikes:
        axes.plot([s["iteration"] for s in spikes], [s["loss"] for s in spikes], "x", color=COLOURS[3], label="spike")
    for skipped in run.events("StepSkipped"):
        axes.axvline(skipped["iteration"], color=COLOURS[4], linewidth=1)
    _iterations(axes, run)
    canvas.legend(axes)
    finite = steps["loss"][np.isfinite(steps["loss"])]
    if len(finite):
        way = "fell" if finite[-1] <= finite[0] else "rose"
        chart.text = f"Training loss {way} from {finite[0]:.3f} to {finite[-1]:.3f} nats per token"
    else:
        chart.text = "No step has a finite loss"
    if held_out:
        best = min(held_out, key=lambda iteration: held_out[iteration])
        chart.text += f"; the best held-out loss is {held_out[best]:.3f} at iteration {best:,}"
    if run.supervised("incident") and len(run.parts) == 1:
        chart.text += "; dashed lines are incidents"
    chart.text += "."
    return chart


def gradients(run: Run) -> Chart:
    """Gradient norm and learning rate."""
    chart = Chart("gradients", "Gradient norm and learning rate", "No step has been recorded yet.")
    steps = run.steps()
    if not len(steps["loss"]):
        return chart
    chart.figure = canvas.figure(height=2.9)
    left, right = chart.figure.subplots(1, 2)
    _line(left, steps["iteration"], steps["grad_norm"], BLUE, "", _cuts(run))
    left.set_title("gradient norm, before clipping")
    right.plot(*binned(steps["iteration"], steps["learning_rate"]), color=GREEN, linewidth=1.8)
    right.set_title("learning rate")
    right.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        _iterations(axes, run)
        axes.set_ylim(bottom=0)
    norms = steps["grad_norm"][np.isfinite(steps["grad_norm"])]
    if len(norms):
        chart.text = f"Gradient norm: median {np.median(norms):.3g}, largest {norms.max():.3g}. "
        chart.text += f"The learning rate ended at {steps['learning_rate'][-1]:.3g}."
    return chart


def throughput(run: Run) -> Chart:
    """Tokens per second and the time of a step."""
    chart = Chart("throughput", "Throughput", "No step has been recorded yet.")
    steps = run.steps()
    if not len(steps["loss"]):
        return chart
    chart.figure = canvas.figure(height=2.9)
    left, right = chart.figure.subplots(1, 2)
    _line(left, steps["iteration"], steps["tokens_per_s"], BLUE, "", _cuts(run))
    left.set_title("tokens/s, all ranks")
    canvas.big_numbers(left.yaxis)
    _line(right, steps["iteration"], steps["step_time_s"] * 1e3, COLOURS[3], "", _cuts(run))
    right.set_title("time of a step, ms")
    for axes in (left, right):
        _iterations(axes, run)
        axes.set_ylim(bottom=0)
    times = steps["step_time_s"]
    chart.text = (
        f"Median {canvas.short(float(np.median(steps['tokens_per_s'])))} tokens/s over all ranks; a step took "
        f"{np.median(times) * 1e3:.3g} ms in the median, {np.percentile(times, 99) * 1e3:.3g} ms at most in 99 %."
    )
    return chart


def waiting(run: Run) -> Chart:
    """Where steps waited."""
    chart = Chart("waiting", "Where a step waits", "The run recorded no waiting times.")
    records = _latest(run.events("Communication"))
    if not records:
        return chart
    chart.figure = canvas.figure(height=2.6)
    axes = chart.figure.subplots()
    x = np.array([record["iteration"] for record in records], dtype=float)

    def ms(name: str) -> Any:
        return np.array([record.get(name) or 0.0 for record in records]) * 1e3

    series = {
        "for samples": ms("data_wait_s"),
        "for the sum of gradients": ms("grad_sync_s"),
        "for the slowest rank": ms("busy_slowest_s") - ms("busy_median_s"),
    }
    for colour, (label, values) in zip(COLOURS, series.items(), strict=False):
        axes.plot(*binned(x, values), color=colour, linewidth=1.5, label=label)
    _iterations(axes, run)
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    canvas.legend(axes)
    words = ", ".join(f"{label} {np.median(values):.3g} ms" for label, values in series.items())
    chart.text = f"Waiting per step, median: {words}."
    return chart


def progress(run: Run) -> Chart:
    """Iterations over wall-clock time: restarts are falls, pauses are flat or empty."""
    chart = Chart("progress", "Progress over time", "No step has been recorded yet.")
    steps = run.all_steps()
    if not len(steps["time"]):
        return chart
    begin = min([steps["time"][0], *(record["time"] for record in run.launch[:1])])
    span = steps["time"][-1] - begin
    unit, size = next(
        ((u, s) for u, s in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)) if span > 3 * s), ("seconds", 1.0)
    )
    chart.figure = canvas.figure(height=3.3)
    axes = chart.figure.subplots()
    breaks = np.flatnonzero(np.diff(steps["iteration"]) < 1) + 1
    for attempt in np.split(np.arange(len(steps["time"])), breaks):
        keep = attempt[:: max(1, len(attempt) // canvas.POINTS)]
        axes.plot((steps["time"][keep] - begin) / size, steps["iteration"][keep], color=BLUE, linewidth=2)
    saved = run.events("Saved")
    where = [(record["time"] - begin) / size for record in saved]
    axes.plot(where, [record["iteration"] for record in saved], "v", color=GREEN, label="checkpoint safe on disk")
    incidents = run.supervised("incident")
    for number, incident in enumerate(incidents):
        x = (incident["time"] - begin) / size
        axes.axvline(x, color=RED, linestyle=(0, (2, 2)), linewidth=1.2, label=None if number else "incident")
        axes.text(
            x, 0.97, f" {incident.get('category', '')}", transform=axes.get_xaxis_transform(), color=RED, fontsize=9,
            va="top",
        )  # fmt: skip
    axes.set_xlabel(f"{unit} since the start")
    axes.set_ylabel("iteration")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    canvas.big_numbers(axes.yaxis)
    if saved or incidents:
        canvas.legend(axes)
    lost = len(steps["iteration"]) - len(run.steps()["iteration"])
    chart.text = (
        f"{count(len(incidents), 'incident')}, {count(len(breaks), 'return')} to a checkpoint, "
        f"{count(lost, 'step')} done again."
    )
    return chart


def checkpoints(run: Run) -> Chart:
    """How long saves took, and how long they held training up."""
    chart = Chart("checkpoints", "Checkpoints", "No checkpoint has been saved yet.")
    saved, failed = run.events("Saved"), run.events("SaveFailed")
    if not saved and not failed:
        return chart
    chart.figure = canvas.figure(height=2.8)
    axes = chart.figure.subplots()
    for colour, field, label in ((BLUE, "time_s", "until safe on disk"), (RED, "stall_s", "training held up")):
        points = [(record["iteration"], record[field]) for record in saved if record.get(field, 0) > 0]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=1.2, markersize=5, label=label)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
    for record in failed:
        axes.axvline(record["iteration"], color=COLOURS[4], linewidth=1.5)
    _iterations(axes, run)
    axes.set_ylabel("seconds")
    canvas.legend(axes)
    total = sum(record.get("stall_s", 0.0) for record in saved)
    chart.text = (
        f"{count(len(saved), 'checkpoint')}, the newest of iteration {saved[-1]['iteration']:,}; " if saved else ""
    )
    chart.text += f"training was held up for {total:.3g} s in all; {count(len(failed), 'save')} failed."
    return chart


def experts(run: Run) -> Chart:
    """The load of every expert of every layer over time, as a heat map."""
    chart = Chart("experts", "Load of every expert", "The run recorded no load of single experts.")
    records = [record for record in _latest(run.events("MoeHealth")) if record.get("expert_loads")]
    shape: tuple[int, ...] = np.shape(records[-1]["expert_loads"]) if records else ()
    records = [record for record in records if np.shape(record["expert_loads"]) == shape]
    if len(shape) != 2:
        return chart
    from matplotlib.colors import TwoSlopeNorm

    layers, width = shape
    loads = np.array([record["expert_loads"] for record in records]).reshape(len(records), -1).T
    x = np.array([record["iteration"] for record in records], dtype=float)
    edges = np.concatenate([[1.5 * x[0] - 0.5 * x[1]], (x[1:] + x[:-1]) / 2, [1.5 * x[-1] - 0.5 * x[-2]]]) \
        if len(x) > 1 else np.array([x[0] - 0.5, x[0] + 0.5])  # fmt: skip
    chart.figure = canvas.figure(height=min(9.0, max(3.0, 1.2 + 0.09 * layers * width)))
    axes = chart.figure.subplots()
    shown = axes.pcolormesh(
        edges, np.arange(layers * width + 1), loads, cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, 3.0), rasterized=True
    )
    for layer in range(1, layers):
        axes.axhline(layer * width, color="white", linewidth=1.5)
    every = max(1, layers // 20)
    axes.set_yticks([(layer + 0.5) * width for layer in range(0, layers, every)], [*map(str, range(0, layers, every))])
    axes.set_xlim(edges[0], edges[-1])
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_ylabel(f"layer (each: {width} experts)")
    _iterations(axes, run, names_above=True)
    bar = chart.figure.colorbar(shown, ax=axes, pad=0.01, extend="max", ticks=[0, 0.5, 1, 2, 3])
    bar.set_label("load, multiples of an even share")
    dead = int((loads[:, -1] == 0).sum())
    chart.text = (
        f"{layers} layers of {width} experts. At the end the busiest expert has {loads[:, -1].max():.2f} times an "
        f"even share, {count(dead, 'expert')} without a token. White is an even share, blue is less, red is more."
    )
    return chart


def balance(run: Run) -> Chart:
    """Balance of the experts in every step, and the skip class."""
    chart = Chart("balance", "Balance of the experts", "No step has been recorded yet.")
    steps = run.steps()
    if not len(steps["loss"]):
        return chart
    chart.figure = canvas.figure(height=2.9)
    left, middle, right = chart.figure.subplots(1, 3)
    _line(left, steps["iteration"], steps["max_expert_load"], RED, "", _cuts(run))
    left.set_title("busiest expert, even shares")
    left.axhline(1.0, color=MUTED, linewidth=1)
    _line(middle, steps["iteration"], steps["load_entropy"], BLUE, "mean of layers", _cuts(run))
    _line(middle, steps["iteration"], steps["min_load_entropy"], COLOURS[3], "least even layer", _cuts(run))
    middle.set_title("entropy of the load, 1 is even")
    middle.legend(loc="lower right", frameon=True, framealpha=0.8, edgecolor="none")
    _line(right, steps["iteration"], steps["skip_rate"], GREEN, "", _cuts(run))
    right.set_title("share that skips")
    right.set_ylim(bottom=0)
    for axes in (left, middle, right):
        _iterations(axes, run)
    last = {name: steps[name][-1] for name in ("max_expert_load", "load_entropy", "skip_rate", "dead_experts")}
    chart.text = (
        f"At the end the busiest expert has {last['max_expert_load']:.2f} times an even share, the entropy is "
        f"{last['load_entropy']:.3f}, {last['skip_rate']:.1%} of the tokens skip; "
        f"{count(int(last['dead_experts']), 'expert')} without a token."
    )
    return chart


def memory(run: Run) -> Chart:
    """Memory of the fullest rank."""
    chart = Chart("memory", "Memory", "The run recorded no use of memory.")
    records = _latest(run.events("MemoryUsed"))
    if not records:
        return chart
    chart.figure = canvas.figure(height=2.8)
    axes = chart.figure.subplots()
    x = np.array([record["iteration"] for record in records], dtype=float)
    labels = {
        "device_peak_bytes": "accelerator, allocated at the peak",
        "device_reserved_bytes": "accelerator, held by the allocator",
        "host_bytes": "host, resident",
    }
    words = []
    for colour, (name, label) in zip((BLUE, COLOURS[3], GREEN), labels.items(), strict=True):
        values = np.array([record.get(name) or 0 for record in records]) / GIB
        if values.any():
            axes.plot(*binned(x, values), color=colour, linewidth=1.8, label=label)
            words.append(f"{label} {values.max():.2f} GiB")
    _iterations(axes, run)
    axes.set_ylabel("GiB, fullest rank")
    axes.set_ylim(bottom=0)
    canvas.legend(axes)
    chart.text = f"At most: {', '.join(words)}." if words else "The run reported zero bytes."
    return chart
