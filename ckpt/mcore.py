"""Megatron-Core's descriptions as ours. The only module here that imports Megatron-Core."""

from __future__ import annotations

from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from ckpt.shard import Shard


def shard_of(
    described: ShardedTensor,
    key: str | None = None,
    data: Tensor | None = None,
    flattened_range: tuple[int, int] | None = None,
    replica_id: int | None = None,
    writers: int = 1,
) -> Shard:
    """Translate Megatron-Core's description of a tensor, or describe another tensor of the same place.

    Args:
        described: says which box of which global tensor it is.
        key: name instead of the described one.
        data: tensor instead of the described one.
        flattened_range: what ``data`` holds of the box; None is all of it.
        replica_id: number of this copy; if None the main replica is 0 and all others are 1.
        writers: copies that share the writing.
    """
    if replica_id is None:
        numbers = (described.replica_id,) if isinstance(described.replica_id, int) else described.replica_id
        replica_id = int(any(numbers))
    return Shard(
        key=key or described.key,
        data=described.data if data is None else data,
        global_shape=tuple(described.global_shape),
        global_offset=tuple(described.global_offset),
        local_shape=(1,) * described.prepend_axis_num + tuple(described.local_shape),
        flattened_range=flattened_range,
        replica_id=replica_id,
        writers=writers,
    )
