"""loss_curve.png: training and held-out loss of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from megatron_zaya.telemetry.events import Evaluated, Event, RunEnded
from megatron_zaya.telemetry.jsonl import read_events, steps_by_iteration


def draw_loss_curve(metrics: Path, picture: Path) -> None:
    """Draw the picture of a metrics file.

    Raises:
        ImportError: matplotlib is not installed (extra `plots`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = sorted(steps_by_iteration(metrics).items())
    axes.plot([i for i, _ in steps], [step["loss"] for _, step in steps], label="training", linewidth=1.2)
    evaluations = {record["iteration"]: record["loss"] for record in read_events(metrics, "Evaluated")}
    if evaluations:
        axes.plot(*zip(*sorted(evaluations.items()), strict=True), "o-", label="held-out", markersize=4)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(metrics.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)


class LossCurveSink:
    """Redraw the picture after each evaluation and at the end."""

    def __init__(self, metrics: Path, picture: Path) -> None:
        self.metrics, self.picture = metrics, picture

    def handle(self, event: Event) -> None:
        """Draw when there is something new to see."""
        if isinstance(event, Evaluated | RunEnded):
            draw_loss_curve(self.metrics, self.picture)

    def close(self) -> None:
        """Nothing to release."""
