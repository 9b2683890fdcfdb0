"""The training loop. It knows steps; evaluation, saving and everything else are callbacks."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from megatron_zaya.telemetry.events import RunEnded
from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.report import Reporter
from megatron_zaya.train.router_files import step_routing
from megatron_zaya.train.state import TrainingJob
from megatron_zaya.train.step import train_step


def train(job: TrainingJob, callbacks: Sequence[Callback]) -> str:
    """Train to the end of the schedule, or until a signal asks for a stop. Collective.

    Returns:
        "finished", or the name of the signal.
    """
    reporter = Reporter(job)
    job.events.emit(reporter.started())
    reason = "finished"
    while job.state.iteration < job.config.schedule.train_iters:
        start = time.perf_counter()
        learning_rate = job.optimizer.param_groups[0]["lr"]
        every = job.config.telemetry.grad_norm_groups_interval
        job.optimizer.norm_groups_wanted = bool(every) and (job.state.iteration + 1) % every == 0
        with step_routing(job) as routing:
            result = train_step(job)
        result.router_divergence = routing.divergence
        for event in reporter.step(result, learning_rate, time.perf_counter() - start):
            job.events.emit(event)
        if result.world.stop_signal:
            reason = signal.Signals(result.world.stop_signal).name
        job.save_agreed, job.save_asked = result.world.save_asked, False
        for callback in callbacks:
            callback.after_step(job)
        if result.world.stop_signal:
            break
    for callback in callbacks:
        callback.at_end(job)
    job.events.emit(RunEnded(job.state.iteration, reason))
    return reason
