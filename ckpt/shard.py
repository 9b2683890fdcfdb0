"""What a job asks to have saved or loaded: named parts of global tensors. Torch-free; holds tensors, imports none.

A :class:`Shard` says which part of a global tensor a local tensor is. It is the only description that saving and
loading know; Megatron-Core's and torch's own descriptions are translated to it by their adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt.region import Region

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shard:
    """A local tensor and its place in a global tensor. Field names equal Megatron-Core's ShardedTensor.

    The place is a box (``global_offset``, ``local_shape``) of the global tensor, or with ``flattened_range`` a run of
    elements of that box in row-major order: what a distributed optimizer owns of a parameter. Layouts never enter the
    name or the shape, so any layout can read what any other wrote.

        Shard("layers.0.attn.weight", weight, (4096, 2048), (1024, 0), (1024, 2048))  # tensor parallel
        Shard("optimizer.exp_avg.layers.0.attn.weight", m, (4096, 2048), (1024, 0), (1024, 2048), (5000, 9000))
    """

    key: str
    """Global name, equal on every rank that holds a part."""
    data: Tensor
    """The local part: ``local_shape``, or 1-D with ``flattened_range``. Read by a save, filled in place by a load."""
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    """Where the box starts, in elements."""
    local_shape: tuple[int, ...]
    """Size of the box, in elements."""
    flattened_range: tuple[int, int] | None = None
    """[start, stop) in the flattened box; None is the whole box."""
    replica_id: int = 0
    """Number of this copy where several ranks hold the same part; 0 is the main copy."""
    writers: int = 1
    """How many copies share the writing, from number 0 on; with 1 the main copy writes everything."""

    def __post_init__(self) -> None:
        box = math.prod(self.local_shape)
        start, stop = (0, box) if self.flattened_range is None else self.flattened_range
        inside = len(self.global_shape) == len(self.global_offset) == len(self.local_shape) and all(
            0 <= offset <= offset + size <= whole
            for offset, size, whole in zip(self.global_offset, self.local_shape, self.global_shape, strict=True)
        )
        if not inside or not 0 <= start <= stop <= box:
            raise ValueError(
                f"shard of {self.key!r}: box at {self.global_offset} of size {self.local_shape}, range "
                f"{self.flattened_range}, does not lie inside the global shape {self.global_shape}"
            )
        if self.data.numel() != stop - start:
            raise ValueError(
                f"shard of {self.key!r}: its tensor has {self.data.numel()} elements, its place {stop - start}"
            )
        if self.replica_id < 0 or self.writers < 1:
            raise ValueError(f"shard of {self.key!r}: replica_id={self.replica_id}, writers={self.writers}")

    @property
    def region(self) -> Region:
        """The place, without the tensor."""
        start, stop = self.flattened_range or (0, math.prod(self.local_shape))
        return Region(self.global_offset, self.local_shape, start, stop)


def whole(key: str, data: Tensor, replica_id: int = 0, writers: int = 1) -> Shard:
    """Describe a tensor that every rank holds entirely."""
    shape = tuple(data.shape)
    return Shard(key, data, shape, (0,) * len(shape), shape, None, replica_id, writers)
