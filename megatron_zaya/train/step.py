"""One optimizer step, and one evaluation, through Megatron-Core's pipeline schedules.

zero gradients -> forward, backward of every micro-batch -> reduce gradients -> clip, step -> biases, learning rate
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_zaya.data.sampler import document_boundaries, evaluation_batches
from megatron_zaya.optim.balancing import LoadReport, load_report
from megatron_zaya.parallel.sequence import split_zigzag
from megatron_zaya.train.guards import leave_out
from megatron_zaya.train.state import TrainingJob
from megatron_zaya.train.world import WorldReport, gather_loads, gather_reports


@dataclass
class StepResult:
    """What a step leaves behind for the loop, equal on all ranks."""

    loss: float
    grad_norm: float
    global_batch_size: int
    load: LoadReport
    world: WorldReport
    skipped: bool = False
    router_divergence: tuple[float, float] | None = None
    """Under router replay: the share of tokens that would have chosen otherwise, of all layers and of the worst."""


def _token_loss(loss_mask_BS: Tensor, loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses of the unmasked tokens; Megatron-Core divides gradients by their number over the global batch."""
    mask = loss_mask_BS.to(loss_BS.dtype)
    total, tokens = (loss_BS * mask).sum(), mask.sum()
    return total, tokens.int(), {"lm loss": torch.stack([total.detach().double(), tokens.double()])}


def read_batch(data: Iterator[dict[str, Tensor]], job: TrainingJob) -> dict[str, Tensor | None]:
    """Return this rank's part of the next micro-batch [B, S], and where its documents start if they are kept apart.

    Every context-parallel rank reads whole samples, and keeps its chunks of them.
    """
    start = time.perf_counter()
    batch, group = next(data), job.pg_collection.cp
    job.data_wait_s += time.perf_counter() - start
    boundaries = document_boundaries(batch["position_ids"]) if job.config.data.reset_attention_mask else None
    parts: dict[str, Tensor | None] = {"cu_seqlens": boundaries}
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        part = split_zigzag(batch[name], 1, group.rank(), group.size())
        parts[name] = part.to(job.device, non_blocking=True)
    return parts


def forward_step(data: Iterator[dict[str, Tensor]], model: torch.nn.Module, job: TrainingJob):
    """Megatron-Core's forward step: the output of one micro-batch, and the function that makes it a loss."""
    batch = read_batch(data, job)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], cu_seqlens=batch["cu_seqlens"])
    return output, partial(_token_loss, batch["loss_mask"])


def _run_schedule(job: TrainingJob, data: list[Iterator], num_microbatches: int, forward_only: bool) -> Tensor:
    """Run all micro-batches; return [loss sum, tokens] of this rank in fp64 (zero unless on the last stage)."""
    interleaved = len(job.model) > 1
    losses = get_forward_backward_func()(
        forward_step_func=partial(forward_step, job=job),
        data_iterator=data if interleaved else data[0],
        model=job.model if interleaved else job.model[0],
        num_microbatches=num_microbatches,
        seq_length=job.config.data.seq_length,
        micro_batch_size=job.config.schedule.micro_batch_size,
        forward_only=forward_only,
        p2p_communicator=job.p2p,
        pg_collection=job.pg_collection,
    )
    zero = torch.zeros(2, dtype=torch.float64, device=job.device)
    return sum((loss["lm loss"] for loss in losses), start=zero)


def _take_router_counts(job: TrainingJob) -> Tensor:
    """Return the tokens [M, layers, classes] on this rank since the last call, and start counting anew.

    M is the number of micro-batches, or 1 where the biases follow the load of the global batch.
    """
    counts_MLN = torch.stack([torch.stack(router.micro_batch_counts) for router in job.balancer.routers], dim=1)
    for router in job.balancer.routers:
        router.micro_batch_counts.clear()
    by_micro_batch = job.config.optimizer.moe_router_bias_update_scope == "micro_batch"
    return counts_MLN if by_micro_batch else counts_MLN.sum(dim=0, keepdim=True)


def _reduce_over_tokens(job: TrainingJob, loss: Tensor, counts_MLN: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the ranks that hold different tokens; every rank gets the loss, and the counts of its own layers."""
    groups = job.pg_collection
    report = torch.cat([loss, counts_MLN.double().flatten()])
    torch.distributed.all_reduce(report, group=groups.dp_cp)
    loss, counts_MLN = report[:2].clone(), report[2:].view_as(counts_MLN)
    torch.distributed.all_reduce(loss, group=groups.pp)
    if job.config.parallel.sequence_parallel:  # the routers of a tensor-parallel group see parts of the sequence
        torch.distributed.all_reduce(counts_MLN, group=groups.tp)
    return loss, counts_MLN


def _step_optimizer(job: TrainingJob, mean_loss: float, local_loss: Tensor) -> tuple[bool, float]:
    """Return whether the parameters were stepped, and the gradient norm; both are equal on all ranks.

    Raises:
        TrainingError: loss or gradient is not finite and `schedule.nan_policy` does not let that be left out.
    """
    updated, grad_norm = False, math.nan
    if math.isfinite(mean_loss):
        updated, grad_norm, _ = job.optimizer.step()
    if updated:
        job.skipped_in_a_row = 0
        return True, float(grad_norm)
    what = f"the gradient norm is {grad_norm}" if math.isfinite(mean_loss) else f"the loss is {mean_loss}"
    leave_out(job, what, bool(torch.isfinite(local_loss).all()))
    return False, float(grad_norm)


def train_step(job: TrainingJob) -> StepResult:
    """Run one optimizer step. Collective.

    Raises:
        TrainingError: loss or gradient is not finite, and `schedule.nan_policy` does not let the step be left out.
    """
    batch_size = job.global_batch_size
    job.timer.start()
    job.data_wait_s = 0.0
    for chunk in job.model:
        chunk.zero_grad_buffer()
    job.optimizer.zero_grad()
    local_loss = _run_schedule(job, job.train_data, job.num_microbatches, forward_only=False)

    loss, counts_MLN = _reduce_over_tokens(job, local_loss, _take_router_counts(job))
    mean_loss = (loss[0] / loss[1]).item()
    updated, grad_norm = _step_optimizer(job, mean_loss, local_loss)
    if updated:
        job.state.balancing_updates = job.balancer.step(counts_MLN, job.state.balancing_updates)
    job.scheduler.step(increment=1)
    job.state.iteration += 1
    job.state.consumed_samples += batch_size

    load = load_report(gather_loads(job, counts_MLN.sum(dim=0)))
    return StepResult(mean_loss, grad_norm, batch_size, load, gather_reports(job), skipped=not updated)


@torch.no_grad()
def evaluate(job: TrainingJob) -> tuple[float, int]:
    """Return the mean loss over the first `eval_iters` global batches of held-out text, and its tokens. Collective."""
    schedule = job.config.schedule
    data = [
        evaluation_batches(
            job.valid_dataset, schedule.micro_batch_size, job.pg_collection.dp.rank(), job.data_parallel_size
        )
        for _ in job.model
    ]
    for chunk in job.model:
        chunk.eval()
    batches = schedule.global_batch_size * schedule.eval_iters // (schedule.micro_batch_size * job.data_parallel_size)
    loss = _run_schedule(job, data, batches, forward_only=True)
    for chunk in job.model:
        chunk.train()
    torch.distributed.all_reduce(loss, group=job.pg_collection.dp_cp)
    torch.distributed.all_reduce(loss, group=job.pg_collection.pp)
    return (loss[0] / loss[1]).item(), int(loss[1].item())
