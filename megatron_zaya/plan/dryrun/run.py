"""Run one rank of a job of any size on this machine, at the level of shapes.

    fake world -> the composition root that training uses -> two steps -> peaks, FLOPs, collectives

What is real: every line of the model, of Megatron-Core's schedules, of the gradient buffers and of the optimizer that
this rank would execute. What is not: values, kernels, other ranks. The routing is forced (see shapes.py).
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from megatron_zaya.compat import cpu
from megatron_zaya.compat.meta import META, accelerator_on_meta, fake_world
from megatron_zaya.config import RunConfig
from megatron_zaya.plan.dryrun.collectives import Collective
from megatron_zaya.plan.dryrun.live_bytes import LiveBytes, Peak
from megatron_zaya.plan.dryrun.observer import Observer
from megatron_zaya.plan.dryrun.shapes import ForcedRouting
from megatron_zaya.plan.layout import check_layout


@dataclass
class DryRun:
    """What one rank needs and does. Bytes are those of live tensors: no allocator, driver or library overhead."""

    world_size: int
    rank: int
    construction: Peak
    step: Peak
    optimizer_step: Peak
    resident_bytes: int
    """Live between steps: parameters, gradients, optimizer state."""
    flops: dict[str, int]
    """Matrix operations of one step, by phase."""
    collectives: list[Collective]
    """Of one step; construction left out."""
    parameters: int
    """Elements on this rank."""
    operations: int = 0
    wall_s: float = 0.0
    process_peak_bytes: int = 0
    """Largest memory of this process: what the dry run itself cost."""

    @property
    def peak_bytes(self) -> int:
        """The largest of the three peaks."""
        return max(self.construction.total_bytes, self.step.total_bytes, self.optimizer_step.total_bytes)

    def as_record(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}


@dataclass
class _Phases:
    """Peaks of the phases of the last step."""

    memory: LiveBytes
    step: Peak = field(default_factory=Peak)
    optimizer_step: Peak = field(default_factory=Peak)


def _batches(config: RunConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches as the data loader hands them out."""
    shape = (config.schedule.micro_batch_size, config.data.seq_length)
    tokens = torch.zeros(shape, dtype=torch.int64)
    positions = torch.arange(shape[1]).expand(shape)
    while True:
        yield {"tokens": tokens, "position_ids": positions, "labels": tokens, "loss_mask": torch.ones(shape)}


def local_experts(config: RunConfig, rank: int) -> range:
    """Return the experts of ``rank`` in Megatron-Core's rank order (tensor, then expert, then data parallel)."""
    parallel = config.parallel
    count = config.model.num_moe_experts // parallel.expert_model_parallel_size
    index = rank // parallel.expert_tensor_parallel_size % parallel.expert_model_parallel_size
    return range(index * count, (index + 1) * count)


def default_skip_share(config: RunConfig) -> float:
    """Return the share of tokens without an expert that the balancing aims at."""
    target = config.optimizer.skip_expert_target
    return 1 / (config.model.num_moe_experts + 1) if target is None else target


def dry_run(
    config: RunConfig,
    world_size: int,
    rank: int = 0,
    *,
    skip_share: float | None = None,
    skew: float = 1.0,
    kernels: str = "accelerator",
    device: torch.device = META,
    track: bool = True,
) -> DryRun:
    """Measure rank ``rank`` of ``world_size``.

    Args:
        config: the run; its data are not read.
        world_size: ranks of the job; only this one exists.
        rank: which one; ranks of one pipeline stage are alike.
        skip_share: share of the tokens without an expert; None is what the balancing aims at.
        skew: load of this rank's experts over the mean.
        kernels: whose fused kernels the meta device imitates, "accelerator" or "cpu".
        device: meta, or cpu for real tensors (small models: to prove the tracker against an allocator).
        track: count live bytes.

    Raises:
        ConfigError: the layout is illegal.
    """
    from megatron_zaya.parallel.groups import release_process_groups

    check_layout(config, world_size)
    start = time.monotonic()
    routing = ForcedRouting(
        classes=config.model.num_moe_experts + 1,
        local_experts=local_experts(config, rank),
        skip_share=default_skip_share(config) if skip_share is None else skip_share,
        skew=skew,
    )
    memory = LiveBytes()
    observer = Observer(routing, memory if track else None, device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(accelerator_on_meta(kernels) if device == META else cpu.standing_in(device))
        stack.enter_context(fake_world(rank, world_size))
        stack.callback(release_process_groups)
        stack.enter_context(memory.following_resizes())
        stack.enter_context(observer.following_modules())
        stack.enter_context(observer)
        result = _construct_and_step(config, observer, memory, device)
    result.world_size, result.rank, result.operations = world_size, rank, observer.operations
    result.wall_s = time.monotonic() - start
    result.process_peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def _construct_and_step(config: RunConfig, observer: Observer, memory: LiveBytes, device: torch.device) -> DryRun:
    from megatron_zaya.train.setup import assemble_job
    from megatron_zaya.train.step import train_step

    with observer.during("construction", "parameters"):
        job = assemble_job(config, device)
    for chunk in job.model:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            memory.relabel(buffer.grad_data, "gradients")
    for tensor in _optimizer_tensors(job.optimizer):
        memory.relabel(tensor, "optimizer")
    construction = memory.peak
    parameters = sum(parameter.numel() for chunk in job.model for parameter in chunk.parameters())
    job.train_data = [_batches(config) for _ in job.model]
    phases = _Phases(memory)
    with _optimizer_step_apart(job, observer, phases):
        train_step(job)  # makes the optimizer's state
        observer.flops.clear()
        observer.collectives.clear()
        memory.restart_peak()
        with observer.during("forward and backward", "activations"):
            train_step(job)
    resident = memory.live
    return DryRun(
        world_size=0,
        rank=0,
        construction=construction,
        step=phases.step,
        optimizer_step=phases.optimizer_step,
        resident_bytes=resident,
        flops=dict(observer.flops),
        collectives=observer.collectives.summary(),
        parameters=parameters,
    )


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the fp32 master parameters, and the moments as far as they are made already."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


@contextlib.contextmanager
def _optimizer_step_apart(job: Any, observer: Observer, phases: _Phases) -> Iterator[None]:
    """Separate the peak of the optimizer's step from that of the forward and backward passes."""
    original = job.optimizer.step

    def step() -> Any:
        phases.step = phases.memory.peak
        phases.memory.restart_peak()
        with observer.during("optimizer step", "optimizer"):
            result = original()
        phases.optimizer_step = phases.memory.peak
        phases.memory.restart_peak()
        return result

    with patch.object(job.optimizer, "step", step):
        yield
