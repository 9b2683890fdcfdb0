"""The training loop. It knows steps; evaluation, saving and everything else are callbacks."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch

from megatron_zaya.telemetry.events import GradientNorms, LossSpike, RunEnded, RunStarted, StepDone, StepSkipped
from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.guards import SpikeDetector
from megatron_zaya.train.state import TrainingJob
from megatron_zaya.train.step import StepResult, train_step


def _step_event(job: TrainingJob, result: StepResult, learning_rate: float, step_time_s: float) -> StepDone:
    schedule, data = job.config.schedule, job.config.data
    tokens = result.global_batch_size * data.seq_length
    return StepDone(
        iteration=job.state.iteration,
        train_iters=schedule.train_iters,
        consumed_samples=job.state.consumed_samples,
        consumed_tokens=job.state.consumed_samples * data.seq_length,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=learning_rate,
        global_batch_size=result.global_batch_size,
        step_time_s=step_time_s,
        tokens_per_s=tokens / step_time_s,
        **asdict(result.load),
    )


def _watch(job: TrainingJob, spikes: SpikeDetector, result: StepResult) -> None:
    """Say what is unusual about a step, and what was asked about it."""
    deviations = spikes.observe(result.loss)
    if deviations is not None:
        job.events.emit(LossSpike(job.state.iteration, result.loss, deviations))
    if job.optimizer.norm_by_group:
        job.events.emit(GradientNorms(job.state.iteration, job.optimizer.norm_by_group))
        job.optimizer.norm_by_group = {}


def train(job: TrainingJob, callbacks: Sequence[Callback]) -> str:
    """Train to the end of the schedule, or until a signal asks for a stop. Collective.

    Returns:
        "finished", or the name of the signal.
    """
    train_iters = job.config.schedule.train_iters
    total, active = job.parameters
    job.events.emit(
        RunStarted(
            iteration=job.state.iteration,
            train_iters=train_iters,
            world_size=torch.distributed.get_world_size(),
            data_parallel_size=job.data_parallel_size,
            parameters=total,
            parameters_active=active,
            resumed_from=job.resumed_from,
            optimizer=job.optimizer_summary,
        )
    )
    telemetry = job.config.telemetry
    spikes = SpikeDetector(telemetry.loss_spike_threshold, telemetry.loss_spike_window)
    reason = "finished"
    while job.state.iteration < train_iters:
        start = time.perf_counter()
        learning_rate = job.optimizer.param_groups[0]["lr"]
        every = telemetry.grad_norm_groups_interval
        job.optimizer.norm_groups_wanted = bool(every) and (job.state.iteration + 1) % every == 0
        result = train_step(job)
        if result.skipped:
            skipped = StepSkipped(
                job.state.iteration, result.loss, result.grad_norm, job.skipped_in_a_row, job.state.skipped_steps
            )
            job.events.emit(skipped)
        else:
            job.events.emit(_step_event(job, result, learning_rate, time.perf_counter() - start))
        _watch(job, spikes, result)
        if result.stop_signal:
            reason = signal.Signals(result.stop_signal).name
        job.save_agreed, job.save_asked = result.save_asked, False
        for callback in callbacks:
            callback.after_step(job)
        if result.stop_signal:
            break
    for callback in callbacks:
        callback.at_end(job)
    job.events.emit(RunEnded(job.state.iteration, reason))
    return reason
