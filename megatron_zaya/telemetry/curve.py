"""loss_curve.png: training and held-out loss of a run, all its lives in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_zaya.telemetry.events import Evaluated, Event, RunEnded, StepDone
from megatron_zaya.telemetry.jsonl import read_events, steps_by_iteration


def draw_loss_curve(training: Mapping[int, float], held_out: Mapping[int, float], title: str, picture: Path) -> None:
    """Draw losses by iteration, nats per token.

    Raises:
        ImportError: matplotlib is not installed (extra `plots`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*sorted(training.items()), strict=True), label="training", linewidth=1.2)
    if held_out:
        axes.plot(*zip(*sorted(held_out.items()), strict=True), "o-", label="held-out", markersize=4)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)


class LossCurveSink:
    """Redraw the picture after each evaluation and at the end."""

    def __init__(self, metrics: Path, picture: Path) -> None:
        self.metrics, self.picture = metrics, picture
        self.training: dict[int, float] = {}
        self.held_out: dict[int, float] = {}

    def open(self) -> None:
        """Begin with what earlier lives of the run left in ``metrics``."""
        if self.metrics.exists():
            self.training = {number: step["loss"] for number, step in steps_by_iteration(self.metrics).items()}
            self.held_out = {record["iteration"]: record["loss"] for record in read_events(self.metrics, "Evaluated")}

    def handle(self, event: Event, when: float) -> None:
        """Draw when there is something new to see."""
        if isinstance(event, StepDone):
            self.training[event.iteration] = event.loss
        if isinstance(event, Evaluated):
            self.held_out[event.iteration] = event.loss
        if isinstance(event, Evaluated | RunEnded) and self.training:
            draw_loss_curve(self.training, self.held_out, self.picture.parent.name, self.picture)

    def close(self) -> None:
        """Nothing to release."""
