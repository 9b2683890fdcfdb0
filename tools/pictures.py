"""`make reference`: the pictures of docs/concepts.md, as boxes and arrows.

    python tools/pictures.py        # writes docs/pictures/*.svg

A box is (left, top, width, lines of text, colour); an arrow goes from one box to another, with words beside it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_zaya.report import canvas

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
PALE = {"blue": "#dcebf7", "green": "#d9f0e6", "red": "#fbe3d3", "grey": "#eef1f4", "plum": "#f0e2ea"}
LINE = 0.26
"""Height of a line of text, in the unit of the coordinates (inches)."""


@dataclass(frozen=True)
class Box:
    """A box; its height follows from its text. The first line is its title."""

    left: float
    top: float
    width: float
    text: str
    colour: str = "grey"

    @property
    def height(self) -> float:
        return LINE * (self.text.count("\n") + 1) + 0.24

    def edge(self, other: Box) -> tuple[float, float]:
        """Return where an arrow to another box leaves this one: the middle of the side that faces it."""
        x, y = self.left + self.width / 2, self.top + self.height / 2
        if other.left >= self.left + self.width:
            return self.left + self.width, y
        if other.left + other.width <= self.left:
            return self.left, y
        return (x, self.top + self.height) if other.top > self.top else (x, self.top)


@dataclass(frozen=True)
class Picture:
    """One picture."""

    name: str
    width: float
    height: float
    boxes: dict[str, Box]
    arrows: list[tuple[str, str, str]] = field(default_factory=list)

    def draw(self) -> Any:
        """Return the figure."""
        figure = canvas.figure(self.width, self.height)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        axes.axis("off")
        for box in self.boxes.values():
            _draw_box(axes, box)
        for start, end, words in self.arrows:
            _draw_arrow(axes, self.boxes[start], self.boxes[end], words)
        return figure


def _draw_box(axes: Any, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch(
        (box.left, box.top), box.width, box.height, boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=PALE[box.colour], edgecolor=canvas.MUTED, linewidth=1.0,
    )  # fmt: skip
    axes.add_patch(shape)
    for number, line in enumerate(box.text.split("\n")):
        y = box.top + 0.12 + LINE * (number + 0.5)
        weight, size = ("bold", 10) if number == 0 else ("normal", 9)
        axes.text(box.left + box.width / 2, y, line, ha="center", va="center", fontsize=size, fontweight=weight)


def _draw_arrow(axes: Any, start: Box, end: Box, words: str) -> None:
    tail, head = start.edge(end), end.edge(start)
    axes.annotate("", head, tail, arrowprops=dict(arrowstyle="-|>", color=canvas.MUTED, linewidth=1.3, shrinkA=1,
                  shrinkB=1, mutation_scale=12))  # fmt: skip
    if words:
        x, y = (tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2
        level = abs(tail[1] - head[1]) < LINE
        background = dict(facecolor="white", edgecolor="none", pad=1.0, alpha=0.0 if level else 1.0)
        axes.text(x, y - 0.12 * level, words, ha="center", va="center", fontsize=8.5, color=canvas.MUTED,
                  bbox=background)  # fmt: skip


RUN = Picture(
    "run", 10.4, 3.5,
    {
        "file": Box(0.1, 0.2, 1.7, "run file\nmodel, data,\nschedule", "blue"),
        "plan": Box(0.1, 1.4, 1.7, "plan\nlayout, batch", "blue"),
        "site": Box(0.1, 2.35, 1.7, "site file\ncluster, container", "blue"),
        "folder": Box(2.75, 1.05, 2.0, "launch folder\nresolved config.yaml,\nenvironment, batch\nscript, revision"),
        "controller": Box(5.65, 1.3, 1.75, "controller\nstarts, watches,\ndecides", "plum"),
        "ranks": Box(8.4, 0.2, 1.9, "ranks\none per accelerator", "green"),
        "written": Box(8.4, 1.4, 1.9, "run folder\nmetrics.jsonl,\ncheckpoints/", "grey"),
        "seen": Box(8.4, 2.75, 1.9, "zaya top, report", "blue"),
    },
    [("file", "folder", ""), ("plan", "folder", "submit"), ("site", "folder", ""), ("folder", "controller", "sbatch"),
     ("controller", "ranks", "agents"), ("ranks", "written", ""), ("written", "seen", "")],
)  # fmt: skip

LAYER = Picture(
    "layer", 10.4, 3.3,
    {
        "stream": Box(0.1, 0.5, 1.5, "stream\n[S, B, H] fp32", "grey"),
        "cca": Box(2.3, 0.35, 2.1, "CCA attention\ncompress, convolve,\nattend, expand", "blue"),
        "add": Box(5.05, 0.5, 1.35, "residual\nscaled sum", "grey"),
        "experts": Box(7.3, 0.2, 1.9, "one expert of E\nSwiGLU", "green"),
        "skip": Box(7.3, 1.15, 1.9, "or the skip class\nno work", "green"),
        "router": Box(5.05, 2.2, 1.9, "router\nMLP, balancing bias", "plum"),
        "below": Box(1.9, 2.2, 2.1, "router of the layer\nbelow: its state", "plum"),
        "next": Box(7.9, 2.2, 2.3, "next layer's router,\nnext stage", "plum"),
    },
    [("stream", "cca", ""), ("cca", "add", ""), ("add", "experts", ""), ("add", "skip", ""),
     ("below", "router", "averaged"), ("router", "next", ""), ("add", "router", "")],
)  # fmt: skip

PLAN = Picture(
    "plan", 10.4, 2.8,
    {
        "shapes": Box(0.1, 0.75, 1.9, "shapes\nof model and batch", "grey"),
        "models": Box(2.8, 0.2, 2.2, "closed forms\nmemory, step time,\nbytes moved", "blue"),
        "dry": Box(2.8, 1.6, 2.2, "dry run\nthe real step of one\nrank, without memory", "plum"),
        "search": Box(5.9, 0.2, 2.0, "search\nall legal layouts,\nranked", "blue"),
        "file": Box(8.7, 0.3, 1.6, "plan file\npart of a run", "grey"),
        "run": Box(6.2, 1.6, 2.0, "real run\nallocator, clock,\ncounters", "green"),
    },
    [("shapes", "models", ""), ("shapes", "dry", ""), ("models", "search", ""), ("search", "file", ""),
     ("dry", "models", "within 2 %"), ("run", "dry", "within 0.1 %"), ("file", "run", "trains")],
)  # fmt: skip

CHECKPOINT = Picture(
    "checkpoint", 10.4, 2.6,
    {
        "rank": Box(0.1, 0.7, 1.7, "rank\ncopies its part to\nhost memory", "green"),
        "writer": Box(2.7, 0.7, 1.9, "writer process\nwrites one file,\nhash per chunk", "plum"),
        "partial": Box(5.5, 0.7, 1.9, "iter_N.partial\na file per rank,\nmanifest", "grey"),
        "step": Box(8.4, 0.2, 1.9, "iter_N\ncomplete or absent", "grey"),
        "load": Box(8.4, 1.4, 1.9, "any layout\nreads the pieces\nthat it needs", "green"),
    },
    [("rank", "writer", "stall"), ("writer", "partial", "durable"), ("partial", "step", "rename"),
     ("step", "load", "")],
)  # fmt: skip

SUPERVISION = Picture(
    "supervision", 10.4, 3.2,
    {
        "start": Box(0.1, 0.3, 1.9, "attempt\nnodes in order,\nspares aside", "blue"),
        "train": Box(3.4, 0.3, 2.3, "training\nheartbeats of\nevery rank", "green"),
        "end": Box(7.6, 0.4, 1.9, "finished\nstatus 0", "green"),
        "fail": Box(3.4, 1.85, 2.3, "failure\ncrash, hang, silent node:\ncategory, culprit, report", "red"),
        "stop": Box(7.6, 1.95, 1.9, "given up\nthe report says why", "red"),
        "again": Box(0.1, 1.85, 1.9, "again\nwithout bad nodes,\nfrom a checkpoint", "blue"),
    },
    [("start", "train", ""), ("train", "end", ""), ("train", "fail", ""), ("fail", "stop", "would fail alike"),
     ("fail", "again", "progress"), ("again", "start", "")],
)  # fmt: skip

EVENTS = Picture(
    "events", 10.4, 3.4,
    {
        "loop": Box(0.1, 1.1, 1.9, "training loop\nstep, save, expert\nload, memory, ...", "green"),
        "stream": Box(3.0, 1.1, 1.9, "event stream\na queue and a thread\nper consumer", "plum"),
        "console": Box(5.9, 0.1, 1.9, "console", "grey"),
        "jsonl": Box(5.9, 0.85, 1.9, "metrics.jsonl", "grey"),
        "prometheus": Box(5.9, 1.6, 1.9, "Prometheus", "grey"),
        "others": Box(5.9, 2.35, 1.9, "TensorBoard,\nW&B, MLflow", "grey"),
        "look": Box(8.5, 0.85, 1.8, "zaya top, report", "blue"),
        "boards": Box(8.5, 1.6, 1.8, "boards, alerts", "blue"),
    },
    [("loop", "stream", "emit"), ("stream", "console", ""), ("stream", "jsonl", ""), ("stream", "prometheus", ""),
     ("stream", "others", ""), ("jsonl", "look", ""), ("prometheus", "boards", "")],
)  # fmt: skip


def layout_picture() -> Picture:
    """Return eight ranks as 2 pipeline stages x 2 data-parallel copies x 2 tensor-parallel halves."""
    boxes, colours = {}, ("blue", "plum")
    for rank in range(8):
        tensor, data, stage = rank % 2, rank // 2 % 2, rank // 4
        text = f"rank {rank}\nhalf {tensor} of layers\n{'1 to 20' if stage == 0 else '21 to 40'}"
        boxes[str(rank)] = Box(
            0.3 + 2.6 * (2 * data + tensor) - 0.2 * tensor, 0.2 + 1.5 * stage, 1.9, text, colours[data]
        )
    arrows = [(str(rank), str(rank + 4), "stream") for rank in range(4)]
    arrows += [(str(rank), str(rank + 1), "TP") for rank in (0, 2, 4, 6)]
    return Picture("layout", 10.4, 2.9, boxes, arrows)


PICTURES = (RUN, LAYER, layout_picture(), PLAN, CHECKPOINT, SUPERVISION, EVENTS)


def main() -> int:
    """Write every picture."""
    from matplotlib import rc_context

    FOLDER.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        figure = canvas.styled(picture.draw)
        with rc_context(canvas.STYLE | {"svg.hashsalt": picture.name}):
            figure.savefig(FOLDER / f"{picture.name}.svg", metadata={"Date": None, "Creator": None})
    print(f"wrote {len(PICTURES)} pictures to {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
