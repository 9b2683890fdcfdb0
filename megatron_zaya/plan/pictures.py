"""Pictures of a plan: memory of each pipeline rank, the pipeline's timeline, throughput against memory."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_zaya.config import ConfigError
from megatron_zaya.plan.memory import GIB, StageMemory
from megatron_zaya.plan.pipeline_time import Timeline
from megatron_zaya.plan.report import describe
from megatron_zaya.plan.search import Candidate, Found
from megatron_zaya.report import canvas

PARTS = ("parameters", "gradients", "optimizer", "activations", "transient", "boundary", "allowance")


def draw(found: Found, chosen: Candidate, timeline: Timeline, capacity_bytes: float, path: Path) -> None:
    """Write the picture as PNG, or as a page of HTML around it.

    Raises:
        ConfigError: the ending is neither .png nor .html.
        ReportError: matplotlib is missing.
    """
    if path.suffix not in (".png", ".html"):
        raise ConfigError(f"picture {path}: the name must end in .png or .html")
    figure = canvas.styled(_draw, found, chosen, timeline, capacity_bytes)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    if path.suffix == ".png":
        path.write_bytes(image.getvalue())
        return
    data = base64.b64encode(image.getvalue()).decode()
    page = (
        f'<!doctype html><meta charset="utf-8"><title>plan</title><img alt="plan" src="data:image/png;base64,{data}">'
    )
    path.write_text(page, encoding="utf-8")


def _draw(found: Found, chosen: Candidate, timeline: Timeline, capacity_bytes: float) -> Any:
    figure = canvas.figure(14, 9)
    grid = figure.add_gridspec(2, 2)
    memory_bars(figure.add_subplot(grid[0, 0]), chosen.memory.stages, capacity_bytes)
    _scatter(figure.add_subplot(grid[0, 1]), found, chosen, capacity_bytes)
    _timeline(figure.add_subplot(grid[1, :]), timeline)
    figure.suptitle(f"{describe(chosen)}, micro-batch {chosen.batch.micro_batch_size}")
    return figure


def memory_bars(axes: Any, stages: Sequence[StageMemory], capacity_bytes: float | None) -> None:
    """Draw what every pipeline rank needs at the peak of a step, part by part, GiB."""
    ranks = [stage.pp_rank for stage in stages]
    below = [0.0] * len(stages)
    for part in PARTS:
        heights = [getattr(stage, part) / GIB for stage in stages]
        axes.bar(ranks, heights, bottom=below, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    if capacity_bytes is not None:
        axes.axhline(capacity_bytes / GIB, color="black", linestyle="--", label="capacity")
    axes.set(xlabel="pipeline rank", ylabel="GiB", title="memory at the peak of a step")
    axes.set_xticks(ranks)
    _legend_outside(axes)


def _scatter(axes: Any, found: Found, chosen: Candidate, capacity_bytes: float) -> None:
    for rows, mark, label in ((found.best, "o", "ranking"), (found.front, "x", "front")):
        memory = [c.memory_bytes / GIB for c in rows]
        axes.scatter(memory, [c.time.tokens_per_gpu_s for c in rows], marker=mark, label=label)
    axes.scatter([chosen.memory_bytes / GIB], [chosen.time.tokens_per_gpu_s], marker="*", s=160, label="chosen")
    axes.axvline(capacity_bytes / GIB, color="black", linestyle="--")
    axes.set(xlabel="GiB on the worst rank", ylabel="tokens/s per GPU", title="throughput against memory")
    _legend_outside(axes)


def _legend_outside(axes: Any) -> None:
    """Bars and points may lie anywhere inside."""
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _timeline(axes: Any, timeline: Timeline) -> None:
    for forward, color in ((True, "tab:blue"), (False, "tab:orange")):
        bars: dict[int, list[tuple[float, float]]] = {}
        for event in timeline:
            if event.forward == forward:
                bars.setdefault(event.rank, []).append((event.start_s * 1e3, event.length_s * 1e3))
        for rank, spans in bars.items():
            axes.broken_barh(spans, (rank - 0.4, 0.8), facecolors=color, edgecolors="white", linewidth=0.3)
    axes.set(
        xlabel="ms", ylabel="pipeline rank", title="passes of the first micro-batches (blue forward, orange backward)"
    )
    axes.set_yticks(sorted({event.rank for event in timeline}))
    axes.invert_yaxis()
