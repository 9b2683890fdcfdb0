"""Saves every `checkpoint.save_interval` iterations, when asked to, at the end, and when a signal stops the run.

Training goes on while a step is written. A save that fails (a full disk, a file server that is away, a dead writer)
does not end the run: the steps before it stay valid, and the next save tries again. Only the result of a finished run
must be written.
"""

from __future__ import annotations

import torch

from ckpt.checkpointer import Checkpointer
from ckpt.save import Save
from megatron_zaya.telemetry.events import Saved, SaveFailed
from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.checkpoint import save_job
from megatron_zaya.train.errors import TrainingError
from megatron_zaya.train.state import TrainingJob


class SaveCheckpoints(Callback):
    """Emits a Saved or a SaveFailed event when a save has come to its end."""

    def __init__(self, checkpointer: Checkpointer, interval: int, at_end: bool) -> None:
        self.checkpointer, self.interval, self.save_at_end = checkpointer, interval, at_end
        self.last: int | None = None
        """Iteration of the newest step that is safe, as far as this rank knows; the first rank knows."""
        self.failure = ""

    def _save(self, job: TrainingJob) -> None:
        job.heartbeat.beat("save", job.state.iteration)
        save_job(self.checkpointer, job)

    def _report(self, job: TrainingJob, finished: list[Save]) -> None:
        for save in finished:
            if save.error is not None:
                self.failure = save.error
                job.events.emit(SaveFailed(save.iteration, save.error))
            elif save.durable_s is not None:
                self.last = save.iteration
                job.events.emit(Saved(save.iteration, str(save.path), save.durable_s, save.stall_s))

    def after_step(self, job: TrainingJob) -> None:
        """Report what has come to its end; save when due or asked for."""
        self._report(job, self.checkpointer.poll())
        due = self.interval and job.state.iteration % self.interval == 0
        if due or job.save_agreed:
            self._save(job)

    def _is_safe(self, job: TrainingJob) -> bool:
        """Wait for what is being written; return whether there is a step of this iteration. All ranks agree."""
        self._report(job, self.checkpointer.wait())
        last = torch.tensor(-1 if self.last is None else self.last, device=job.device)
        torch.distributed.broadcast(last, 0)
        return last.item() == job.state.iteration

    def at_end(self, job: TrainingJob) -> None:
        """Save what has not been saved: the end of the run, or the point where a signal stopped it.

        Raises:
            TrainingError: the run is finished and its result could not be written.
        """
        stopped_early = job.state.iteration < job.config.schedule.train_iters
        safe = self._is_safe(job)
        if (self.save_at_end or stopped_early) and not safe:
            self._save(job)
            safe = self._is_safe(job)
        self.checkpointer.close()
        if self.save_at_end and not stopped_early and not safe:
            reason = self.failure or "see the first rank"
            raise TrainingError(f"the run is finished, but its checkpoint could not be written: {reason}")
