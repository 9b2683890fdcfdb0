"""loss_curve.png: training and held-out loss of a run, all its lives in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_zaya.telemetry.events import Evaluated, Event, RunEnded, StepDone
from megatron_zaya.telemetry.jsonl import read_events, steps_by_iteration


def draw_loss_curve(training: Mapping[int, float], held_out: Mapping[int, float], title: str, picture: Path) -> None:
    """Draw losses by iteration, nats per token.

    Raises:
        ReportError: matplotlib is not installed (extra `plots`).
    """
    from megatron_zaya.report import canvas, charts

    def draw() -> Any:
        figure = canvas.figure(8, 4.5)
        axes = figure.subplots()
        iterations = np.array(sorted(training), dtype=float)
        charts.draw_losses(axes, iterations, np.array([training[int(number)] for number in iterations]), held_out)
        axes.set_title(title)
        return figure

    canvas.png(canvas.styled(draw), picture)


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
