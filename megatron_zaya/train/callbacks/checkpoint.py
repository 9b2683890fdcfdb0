"""Saves every `checkpoint.save_interval` iterations, at the end, and when a signal stops the run."""

from __future__ import annotations

import time

from ckpt.mcore import Checkpointer
from megatron_zaya.telemetry.events import Saved
from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.checkpoint import save_job
from megatron_zaya.train.state import TrainingJob


class SaveCheckpoints(Callback):
    """Emits a Saved event for each."""

    def __init__(self, checkpointer: Checkpointer, interval: int, at_end: bool) -> None:
        self.checkpointer, self.interval, self.save_at_end = checkpointer, interval, at_end
        self.last: int | None = None

    def _save(self, job: TrainingJob) -> None:
        start = time.perf_counter()
        path = save_job(self.checkpointer, job)
        self.last = job.state.iteration
        job.events.emit(Saved(job.state.iteration, str(path), time.perf_counter() - start))

    def after_step(self, job: TrainingJob) -> None:
        """Save when due."""
        if self.interval and job.state.iteration % self.interval == 0:
            self._save(job)

    def at_end(self, job: TrainingJob) -> None:
        """Save what has not been saved: the end of the run, or the point where a signal stopped it."""
        stopped_early = job.state.iteration < job.config.schedule.train_iters
        if (self.save_at_end or stopped_early) and self.last != job.state.iteration:
            self._save(job)
