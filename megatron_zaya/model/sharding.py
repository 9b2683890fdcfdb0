"""How each parameter of the model is split over ranks: said once, read by initialisation and by checkpoints.

Invariant: a parameter has one global name and shape whatever the layout. `parameter.shard_groups` maps an axis to the
process group that splits it in equal contiguous parts; what has no such attribute is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup


def describe_shard(parameter: Tensor, groups: Mapping[int, ProcessGroup]) -> None:
    """Record which process group splits which axis, for us and (as far as it can express it) for Megatron-Core."""
    parameter.shard_groups = dict(groups)
    # Set here and not by its helper: parameters that it made itself have them in some versions, not in others.
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, max(groups), 1


def shard_groups(parameter: Tensor) -> dict[int, ProcessGroup]:
    """Return the process group that splits each split axis of ``parameter``."""
    return getattr(parameter, "shard_groups", {})


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
        replica = (copy, 0 if groups else pg_collection.tp.rank(), pg_collection.dp_cp.rank())
    return ShardedTensor.from_rank_offsets(name, tensor, *offsets, replica_id=replica)
