"""From the figures of a job and its steps to events."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict

import torch

from megatron_zaya.config import RunConfig
from megatron_zaya.config.phases import phase_configs
from megatron_zaya.plan.shape import model_of
from megatron_zaya.plan.step_time import model_flops_per_token
from megatron_zaya.telemetry.events import (
    Communication,
    Event,
    GradientNorms,
    LossSpike,
    MemoryUsed,
    MoeHealth,
    PhaseStarted,
    RunStarted,
    StepDone,
    StepSkipped,
)
from megatron_zaya.train.guards import SpikeDetector
from megatron_zaya.train.state import TrainingJob
from megatron_zaya.train.step import StepResult


def phase_started(config: RunConfig, phase: RunConfig) -> PhaseStarted:
    """One of the phases of a run begins or goes on."""
    number = phase_configs(config).index(phase)
    tokens = phase.schedule.train_samples * phase.data.seq_length
    return PhaseStarted(config.phases[number].name, number + 1, len(config.phases), phase.schedule.train_iters, tokens)


class Reporter:
    """Says what happened, on every rank alike; only the first rank's stream has listeners."""

    def __init__(self, job: TrainingJob) -> None:
        telemetry = job.config.telemetry
        self.job = job
        self.spikes = SpikeDetector(telemetry.loss_spike_threshold, telemetry.loss_spike_window)
        self.flops_per_token = model_flops_per_token(model_of(job.config), job.config.data.seq_length)
        self.world_size = torch.distributed.get_world_size()

    def started(self) -> RunStarted:
        """The run begins or goes on."""
        job = self.job
        total, active = job.parameters
        return RunStarted(
            iteration=job.state.iteration,
            train_iters=job.config.schedule.train_iters,
            world_size=self.world_size,
            data_parallel_size=job.data_parallel_size,
            parameters=total,
            parameters_active=active,
            resumed_from=job.resumed_from,
            optimizer=job.optimizer_summary,
            attempt=job.attempt,
            save_interval=job.config.checkpoint.save_interval,
            name=job.config.run_dir.name,
            num_layers=job.config.model.num_layers,
            num_experts=job.config.model.num_moe_experts,
            flops_per_token=self.flops_per_token,
            peak_tflops=job.peak_tflops,
        )

    def step(self, result: StepResult, learning_rate: float, step_time_s: float) -> Iterator[Event]:
        """Yield what there is to say about a step: the step itself, its health when due, and what is unusual."""
        job = self.job
        iteration = job.state.iteration
        if result.skipped:
            in_a_row, in_all = job.skipped_in_a_row, job.state.skipped_steps
            yield StepSkipped(iteration, result.loss, result.grad_norm, in_a_row, in_all)
        else:
            yield self._step_done(result, learning_rate, step_time_s)
        if job.health_due:
            yield from self._health(result)
        deviations = self.spikes.observe(result.loss)
        if deviations is not None:
            yield LossSpike(iteration, result.loss, deviations)
        if job.optimizer.norm_by_group:
            yield GradientNorms(iteration, job.optimizer.norm_by_group)
            job.optimizer.norm_by_group = {}

    def _step_done(self, result: StepResult, learning_rate: float, step_time_s: float) -> StepDone:
        job, load = self.job, result.load
        schedule, seq_length = job.config.schedule, job.config.data.seq_length
        tokens_per_s = result.global_batch_size * seq_length / step_time_s
        divergence, max_divergence = result.router_divergence or (None, None)
        tflops = tokens_per_s * self.flops_per_token / self.world_size / 1e12
        return StepDone(
            iteration=job.state.iteration,
            train_iters=schedule.train_iters,
            consumed_samples=job.state.consumed_samples,
            consumed_tokens=job.state.consumed_samples * seq_length,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=learning_rate,
            global_batch_size=result.global_batch_size,
            step_time_s=step_time_s,
            tokens_per_s=tokens_per_s,
            skip_rate=statistics.fmean(load.skip_rate),
            max_expert_load=load.max_expert_load,
            mean_load_violation=statistics.fmean(load.load_violation),
            load_entropy=statistics.fmean(load.load_entropy),
            min_load_entropy=min(load.load_entropy),
            dead_experts=sum(load.dead_experts),
            tflops=tflops,
            mfu=tflops / job.peak_tflops if job.peak_tflops else None,
            router_divergence=divergence,
            max_router_divergence=max_divergence,
        )

    def _health(self, result: StepResult) -> Iterator[Event]:
        iteration, world = self.job.state.iteration, result.world
        yield MoeHealth(iteration, **asdict(result.load))
        yield MemoryUsed(iteration, world.device_peak_bytes, world.device_reserved_bytes, world.host_bytes)
        slowest = max(range(len(world.busy_s)), key=world.busy_s.__getitem__)
        median = statistics.median(world.busy_s)
        yield Communication(
            iteration, world.data_wait_s, world.grad_sync_s, median, world.busy_s[slowest], slowest_rank=slowest
        )
