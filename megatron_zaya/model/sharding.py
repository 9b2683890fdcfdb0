"""How each parameter of the model is split over ranks: said once, read by initialisation and by checkpoints.

Invariant: a parameter has one global name and shape whatever the layout. `parameter.shard_groups` maps an axis to the
process group that splits it in equal contiguous parts; what has no such attribute is the same on every rank. Where
there are more tensor-parallel ranks than key-value heads, `parameter.replica_group` holds the ranks with the same part:
each sees the gradient of its own query heads, so :func:`reduce_replica_gradients` sums them once per step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def describe_shard(
    parameter: Tensor, groups: Mapping[int, ProcessGroup], replica_group: ProcessGroup | None = None
) -> None:
    """Record which process group splits which axis, for us and (as far as it can express it) for Megatron-Core.

    Args:
        parameter: the local part.
        groups: for each split axis, the ranks that hold different parts.
        replica_group: the tensor-parallel ranks that hold the same part, if there are several.
    """
    parameter.shard_groups = dict(groups)
    if replica_group is not None:
        parameter.replica_group = replica_group
    # Set here and not by its helper: parameters that it made itself have them in some versions, not in others.
    # The mark makes the gradient norm count the part, so one replica carries it.
    parameter.tensor_model_parallel = replica_group is None or replica_group.rank() == 0
    parameter.partition_dim, parameter.partition_stride = max(groups), 1


def shard_groups(parameter: Tensor) -> dict[int, ProcessGroup]:
    """Return the process group that splits each split axis of ``parameter``."""
    return getattr(parameter, "shard_groups", {})


def reduce_replica_gradients(chunks: Iterable[nn.Module]) -> None:
    """Sum `main_grad` of every parameter over the ranks that hold the same part of it. Collective.

    Called once per step, after the data-parallel reduction; with a distributed optimizer the replicas own the same
    ranges, so what else stands in the buffers does not matter.
    """
    parts: dict[tuple[ProcessGroup, torch.dtype], list[Tensor]] = {}
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        group = getattr(parameter, "replica_group", None)
        if group is not None:
            parts.setdefault((group, parameter.main_grad.dtype), []).append(parameter.main_grad)
    for (group, _), gradients in parts.items():
        together = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(together, group=group)
        for gradient, total in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


class _SumOverRanks(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def sum_over_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of ``x`` over the group, for ranks that go on differently: so their gradients sum up too."""
    return _SumOverRanks.apply(x, group)


def is_expert(parameter: Tensor) -> bool:
    """Return whether the parameter belongs to an expert: it is reduced over the expert-data-parallel ranks."""
    return not getattr(parameter, "allreduce", True)


def sharded_tensor(name: str, tensor: Tensor, pg_collection: ProcessGroupCollection, copy: int = 0) -> ShardedTensor:
    """Describe ``tensor`` to Megatron-Core's checkpoints.

    Args:
        name: global name.
        tensor: the local part.
        pg_collection: the process groups of the model.
        copy: 0, or 1 for the second copy of a parameter that is tied across pipeline stages.
    """
    groups = shard_groups(tensor)
    offsets = [(axis, group.rank(), group.size()) for axis, group in sorted(groups.items())]
    if is_expert(tensor):
        replica = (copy, 0, pg_collection.expt_dp.rank())
    else:
        same_part = getattr(tensor, "replica_group", None)
        same_part_rank = same_part.rank() if same_part is not None else 0
        replica = (copy, same_part_rank if groups else pg_collection.tp.rank(), pg_collection.dp_cp.rank())
    return ShardedTensor.from_rank_offsets(name, tensor, *offsets, replica_id=replica)
