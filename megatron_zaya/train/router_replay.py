"""Router replay: record which expert every token chose, or force given choices while probabilities stay live.

    with recording(job) as record:            with replaying(job, choices) as replay:
        train_step(job)                           train_step(job)
    choices = record.gather()                 replay.divergence()   # {layer: share of tokens that differ}

Choices are int64 [micro-batch, layer, sample, token] of this data-parallel rank, whole sequences and all layers, so any
layout can record and any other replay; the number of experts means skip. A router asks once per forward pass, inside
what recompute records, so a second run of a layer neither records nor consumes anything. router_files.py does it for
whole runs, from and to files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zaya.parallel.sequence import merge_zigzag, split_zigzag
from megatron_zaya.train.errors import TrainingError
from megatron_zaya.train.state import TrainingJob


class Recording:
    """Choices of the routers of this rank, by layer, one entry [S, B] per forward pass."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._seen: dict[int, list[Tensor]] = {layer: [] for layer in job.balancer.layers}

    def chosen(self, layer: int, class_T: Tensor) -> Tensor:
        """Note the choices of a layer's tokens and return them."""
        self._seen[layer].append(class_T.view(-1, self._job.config.schedule.micro_batch_size))
        return class_T

    def gather(self) -> Tensor:
        """Return [micro-batch, layer, sample, token] on the CPU; equal on all ranks of a replica. Collective."""
        groups, config = self._job.pg_collection, self._job.config
        local_LMSB = torch.stack([torch.stack(seen) for seen in self._seen.values()])
        if config.parallel.sequence_parallel:
            local_LMSB = torch.cat(_everyones(local_LMSB, groups.tp), dim=2)
        local_LMSB = merge_zigzag(_everyones(local_LMSB, groups.cp), dim=2)
        every: list[dict[int, Tensor]] = [{} for _ in range(groups.pp.size())]
        mine = dict(zip(self._seen, local_LMSB.cpu(), strict=True))
        dist.all_gather_object(every, mine, group=groups.pp)
        by_layer = {layer: choices for stage in every for layer, choices in stage.items()}
        return torch.stack([by_layer[layer] for layer in sorted(by_layer)]).permute(1, 0, 3, 2).contiguous()


class Replay:
    """Given choices, handed to the routers in place of their own."""

    def __init__(self, job: TrainingJob, choices_MLBS: Tensor) -> None:
        """Take this data-parallel rank's choices.

        Raises:
            TrainingError: shape or range do not fit the job.
        """
        check_choices(job, choices_MLBS, "router replay")
        self._job = job
        groups = job.pg_collection
        local = split_zigzag(choices_MLBS, 3, groups.cp.rank(), groups.cp.size())
        if job.config.parallel.sequence_parallel:
            local = local.chunk(groups.tp.size(), dim=3)[groups.tp.rank()]
        self._choices_LMSB = local.permute(1, 0, 3, 2).to(job.device, torch.int64)
        self._position = dict.fromkeys(job.balancer.layers, 0)
        self._other = {layer: torch.zeros((), dtype=torch.float64, device=job.device) for layer in job.balancer.layers}
        self._tokens = dict.fromkeys(job.balancer.layers, 0)

    def chosen(self, layer: int, class_T: Tensor) -> Tensor:
        """Return the given choices of a layer's next micro-batch; count where its own differ.

        Raises:
            TrainingError: there are no more, or of another number of tokens.
        """
        number = self._position[layer]
        if number == self._choices_LMSB.shape[1]:
            raise TrainingError(
                f"router replay: layer {layer} runs micro-batch {number}, choices for {number} are given"
            )
        self._position[layer] += 1
        forced_T = self._choices_LMSB[layer, number].flatten()
        if len(forced_T) != len(class_T):
            raise TrainingError(f"router replay: layer {layer} has {len(class_T)} tokens, choices for {len(forced_T)}")
        self._other[layer] += (forced_T != class_T).sum()
        self._tokens[layer] += len(class_T)
        return forced_T

    def divergence(self) -> dict[int, float]:
        """Return, for the layers of this rank, the share of its tokens that would have chosen otherwise."""
        return {layer: float(other) / max(self._tokens[layer], 1) for layer, other in self._other.items()}

    def overall_divergence(self) -> tuple[float, float]:
        """Return that share over the tokens of all ranks: of all layers, and of the layer with the most. Collective."""
        groups = self._job.pg_collection
        tokens = [float(count) for count in self._tokens.values()]
        other_L = torch.stack(list(self._other.values()))
        counts_2L = torch.stack([other_L, other_L.new_tensor(tokens)])
        dist.all_reduce(counts_2L, group=groups.dp_cp)
        if self._job.config.parallel.sequence_parallel:
            dist.all_reduce(counts_2L, group=groups.tp)
        sums, most = counts_2L.sum(dim=1), (counts_2L[0] / counts_2L[1]).max()
        dist.all_reduce(sums, group=groups.pp)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=groups.pp)
        return float(sums[0] / sums[1]), float(most)


def _everyones(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def check_choices(job: TrainingJob, choices: Tensor, where: str) -> None:
    """Check the choices of this data-parallel rank for the next step; ``where`` they come from is for the message.

    Raises:
        TrainingError: shape or range do not fit.
    """
    config = job.config
    wanted = (job.num_microbatches, config.model.num_layers, config.schedule.micro_batch_size, config.data.seq_length)
    if tuple(choices.shape) != wanted:
        raise TrainingError(
            f"{where}: choices have shape {list(choices.shape)}; this rank's step needs {list(wanted)}: "
            "micro-batches, layers, samples, tokens"
        )
    if choices.is_floating_point():
        raise TrainingError(f"{where}: choices must be integers, not {choices.dtype}")
    low, high = int(choices.min()), int(choices.max())
    if low < 0 or high > config.model.num_moe_experts:
        raise TrainingError(
            f"{where}: choices run from {low} to {high}; experts are 0 to {config.model.num_moe_experts - 1}, "
            f"and {config.model.num_moe_experts} skips"
        )


@contextlib.contextmanager
def _attached(job: TrainingJob, source: Recording | Replay) -> Iterator[None]:
    pairs = list(zip(job.balancer.layers, job.balancer.routers, strict=True))
    for layer, router in pairs:
        router.chosen = lambda class_T, layer=layer: source.chosen(layer, class_T)
    try:
        yield
    finally:
        for _, router in pairs:
            router.chosen = None


@contextlib.contextmanager
def recording(job: TrainingJob) -> Iterator[Recording]:
    """Record every choice in the block."""
    record = Recording(job)
    with _attached(job, record):
        yield record


@contextlib.contextmanager
def replaying(job: TrainingJob, choices_MLBS: Tensor) -> Iterator[Replay]:
    """Force ``choices_MLBS`` (see the header) on the forward passes of the block.

    Raises:
        TrainingError: shape or range do not fit.
    """
    replay = Replay(job, choices_MLBS)
    with _attached(job, replay):
        yield replay
