"""Saves every `checkpoint.save_interval` iterations, when asked to, at the end, and when a signal stops the run.

A save that fails (a full disk, a file server that is away) does not end the run: the steps before it stay valid, and
the next save tries again. Only the result of a finished run must be written.
"""

from __future__ import annotations

import time

import torch

from ckpt.mcore import Checkpointer
from ckpt.steps import CheckpointError
from megatron_zaya.telemetry.events import Saved, SaveFailed
from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.checkpoint import save_job
from megatron_zaya.train.errors import TrainingError
from megatron_zaya.train.state import TrainingJob


class SaveCheckpoints(Callback):
    """Emits a Saved or a SaveFailed event for each."""

    def __init__(self, checkpointer: Checkpointer, interval: int, at_end: bool) -> None:
        self.checkpointer, self.interval, self.save_at_end = checkpointer, interval, at_end
        self.last: int | None = None
        self.failure = ""

    def _save(self, job: TrainingJob) -> None:
        start = time.perf_counter()
        iteration = job.state.iteration
        job.heartbeat.beat("save", iteration)
        self.failure, path = "", None
        try:
            path = save_job(self.checkpointer, job)
        except (OSError, CheckpointError) as error:
            self.failure = f"{type(error).__name__}: {error}"
        failures = torch.tensor(float(bool(self.failure)), device=job.device)
        torch.distributed.all_reduce(failures)
        if failures.item():
            self.failure = self.failure or f"failed on {failures.item():.0f} other ranks"
            job.events.emit(SaveFailed(iteration, self.failure))
            return
        self.last = iteration
        job.events.emit(Saved(iteration, str(path), time.perf_counter() - start))

    def after_step(self, job: TrainingJob) -> None:
        """Save when due or asked for."""
        due = self.interval and job.state.iteration % self.interval == 0
        if due or job.save_asked:
            job.save_asked = False
            self._save(job)

    def at_end(self, job: TrainingJob) -> None:
        """Save what has not been saved: the end of the run, or the point where a signal stopped it.

        Raises:
            TrainingError: the run is finished and its result could not be written.
        """
        stopped_early = job.state.iteration < job.config.schedule.train_iters
        if (self.save_at_end or stopped_early) and self.last != job.state.iteration:
            self._save(job)
            if self.failure and not stopped_early:
                raise TrainingError(f"the run is finished, but its checkpoint could not be written: {self.failure}")
