"""Export to Megatron-Core's `torch_dist` format through Megatron-Core's own save, a piece of a tensor at a time."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from ckpt.memory import TORCH_DTYPES
from megatron_zaya.convert.output import Progress
from megatron_zaya.convert.torch_dist import COMMON
from megatron_zaya.convert.weights import Weights, check_finite, size_of

PIECE = 16 << 20
"""Bytes of a tensor that are written as one piece: torch's reader and writer hold it twice, and the C library takes
such memory from what was freed before, where larger blocks come new from the system each time."""


class _Planner(DefaultSavePlanner):
    """Cuts tensors into pieces along their first dimension, and hands each out when it is written."""

    def __init__(self, weights: Weights, progress: Progress) -> None:
        super().__init__(flatten_state_dict=False)
        self.weights, self.progress, self.total = weights, progress, size_of(weights.tensors)

    def create_local_plan(self) -> SavePlan:
        whole = super().create_local_plan().items
        self.plan = SavePlan([piece for item in whole for piece in _pieces(item)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        name, chunk = write_item.index.fqn, write_item.tensor_data.chunk
        info = self.weights.tensors[name]
        start = chunk.offsets[0] * math.prod(info.shape[1:]) if chunk.offsets else 0
        raw = np.empty(math.prod(chunk.sizes) * info.item_bytes, dtype=np.uint8)
        self.weights.read(name, start, raw)
        check_finite(self.weights, name, start, raw)
        self.progress(len(raw), self.total)
        return torch.from_numpy(raw).view(TORCH_DTYPES[info.dtype]).view(chunk.sizes)


def _pieces(item: WriteItem) -> list[WriteItem]:
    """Cut the writing of a whole tensor into pieces of about PIECE bytes, or rows of the first dimension."""
    data = item.tensor_data
    shape = data.size
    row_bytes = math.prod(shape[1:]) * data.properties.dtype.itemsize
    if not shape or shape[0] * row_bytes <= PIECE:
        return [item]
    rows = max(1, PIECE // row_bytes)
    pieces = []
    for first in range(0, shape[0], rows):
        offsets = torch.Size([first, *(0 for _ in shape[1:])])
        sizes = torch.Size([min(rows, shape[0] - first), *shape[1:]])
        chunk = dataclasses.replace(data, chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes))
        pieces.append(WriteItem(MetadataIndex(item.index.fqn, offsets), WriteItemType.SHARD, tensor_data=chunk))
    return pieces


class _Streaming(TorchDistSaveShardedStrategy):
    """Writes tensors that are read as they are written: Megatron-Core's own writer wants all of them at once."""

    def __init__(self, weights: Weights, progress: Progress) -> None:
        super().__init__("torch_dist", 1)
        self.planner = _Planner(weights, progress)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str) -> None:
        state = {}
        for value in nested_values(sharded_state_dict):
            if isinstance(value, ShardedTensor):
                state[value.key] = value.data
            else:  # 0.19 passes the common part as an object; it still looks for this file first
                torch.save(value.data, Path(checkpoint_dir, COMMON))
        # A file per piece: torch's writer keeps all tensors of a file until it closes it.
        writer = dcp.FileSystemWriter(checkpoint_dir, single_file_per_rank=False, sync_files=True)
        try:
            dcp.save(state, storage_writer=writer, planner=self.planner)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


def write_torch_dist(folder: Path, weights: Weights, common: dict[str, Any], progress: Progress) -> None:
    """Write a checkpoint into an empty folder. Needs a world.

    Args:
        folder: where, existing.
        weights: tensors by the names they shall have.
        common: what goes beside the tensors: plain values and containers.
        progress: told of each tensor.
    """
    described = {
        name: ShardedTensor.from_rank_offsets(
            name, torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
        )
        for name, info in weights.tensors.items()
    }
    dist_checkpointing.save(
        {**common, "tensors": described}, str(folder), sharded_strategy=_Streaming(weights, progress)
    )
