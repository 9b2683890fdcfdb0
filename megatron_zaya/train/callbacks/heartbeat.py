"""Tells the agent of this node how far this rank is, and how long it computed for the last step."""

from __future__ import annotations

from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.state import TrainingJob


class Beat(Callback):
    """The last callback, so that an iteration counts once everything that belongs to it is done."""

    def after_step(self, job: TrainingJob) -> None:
        """Back to computing."""
        part = job.config.run_dir.name  # of a run with phases: iterations count anew in each
        job.heartbeat.beat("step", job.state.iteration, busy_s=round(job.timer.busy_s, 6), part=part)

    def at_end(self, job: TrainingJob) -> None:
        """Say why the loop ended, so that the supervisor knows whether there is more to do."""
        done = job.state.iteration >= job.config.schedule.train_iters
        job.heartbeat.beat("ended", job.state.iteration, reason="finished" if done else "stopped")
