"""Evaluation on held-out text every `schedule.eval_interval` iterations, and at the end."""

from __future__ import annotations

import time

from megatron_zaya.telemetry.events import Evaluated
from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.state import TrainingJob
from megatron_zaya.train.step import evaluate


class Evaluate(Callback):
    """Emits an Evaluated event."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def after_step(self, job: TrainingJob) -> None:
        """Evaluate when due."""
        iteration = job.state.iteration
        if iteration % self.interval == 0 or iteration == job.config.schedule.train_iters:
            start = time.perf_counter()
            job.heartbeat.beat("evaluate", iteration)
            loss, tokens = evaluate(job)
            job.events.emit(Evaluated(iteration, loss, tokens, time.perf_counter() - start))
