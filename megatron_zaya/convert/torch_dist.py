"""Megatron-Core's `torch_dist` checkpoints of this model, through Megatron-Core's own load and save.

Names and shapes of weights are equal on both sides, because the model describes itself to Megatron-Core by global
names. Optimizer state has the names of its distributed optimizer in model space: `optimizer.state.<what>.<weight>`,
with a `param` for every trained weight (what we call a master copy, and keep in reduced precision only).

Streaming: the reader fills one whole tensor at a time, so memory is a few of the largest tensors, never the model. The
writer is given a piece of a tensor at a time; torch's format has no way to read or write a part of a stored piece.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import pickle
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from ckpt.manifest import TensorInfo
from ckpt.memory import DTYPES, TORCH_DTYPES
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.convert.output import Progress
from megatron_zaya.convert.safetensors_files import read_json
from megatron_zaya.convert.weights import Bytes, Weights, check_finite, size_of

logger = logging.getLogger(__name__)

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"
RUN = "zaya"
"""Where our own counters and configuration lie in the common part."""
PIECE = 32 << 20
"""Bytes of a tensor that are written as one piece, which torch's writer and reader hold twice."""
HELD = 3
"""Tensors that a reader keeps; a chunk of the output may end one and begin the next, on several threads."""

_HARMLESS = {
    "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in DTYPES)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "pathlib": {"Path", "PosixPath"},
    "collections": {"OrderedDict"},
}


class _Checking(pickle.Unpickler):
    """Builds nothing but what such a file needs."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _HARMLESS.get(module, ()):
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return super().find_class(module, name)


def _check_folder(folder: Path) -> None:
    """Check that a folder is such a checkpoint, and that reading its pickled metadata runs no code."""
    if not (folder / CONFIG).exists():
        raise ConvertError(f"{folder}: no {CONFIG} there; give the folder of one iteration of a torch_dist checkpoint")
    backend = read_json(folder / CONFIG).get("sharded_backend")
    if backend != "torch_dist":
        raise ConvertError(f"{folder / CONFIG}: its format is {backend!r}, not 'torch_dist'")
    try:
        _Checking(io.BytesIO((folder / METADATA).read_bytes())).load()
    except OSError as error:
        raise ConvertError(f"{folder / METADATA}: cannot be read: {error.strerror}") from None
    except Exception as error:  # damaged pickles raise almost anything
        raise ConvertError(f"{folder / METADATA}: is refused or damaged: {error}") from None


class TorchDist:
    """The tensors of a torch_dist checkpoint, of any layout. Needs a world (world.py); any thread may read."""

    def __init__(self, folder: Path) -> None:
        """Open a checkpoint.

        Raises:
            ConvertError: it is none, its metadata are damaged or not harmless, or a type of tensor is unknown.
        """
        _check_folder(folder)
        self.folder, self.where = folder, str(folder)
        self._described = TorchDistLoadShardedStrategy().load_tensors_metadata(folder)
        unknown = [name for name, tensor in self._described.items() if tensor.dtype not in DTYPES]
        if unknown:
            raise ConvertError(f"{folder}: {unknown[0]!r} is of type {self._described[unknown[0]].dtype}")
        self.tensors = {
            name: TensorInfo(DTYPES[tensor.dtype], tuple(tensor.global_shape))
            for name, tensor in self._described.items()
        }
        self._held: OrderedDict[str, Bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, start: int, out: Bytes) -> None:
        """Fill ``out`` with elements of a tensor, from element ``start`` on; the first read brings all of it."""
        with self._lock:
            if name not in self._held:
                if len(self._held) == HELD:
                    self._held.popitem(last=False)
                self._held[name] = self._load(name)
            self._held.move_to_end(name)
            data = self._held[name]
        begin = start * self.tensors[name].item_bytes
        out[:] = data[begin : begin + len(out)]

    def _load(self, name: str) -> Bytes:
        described, info = self._described[name], self.tensors[name]
        tensor = torch.empty(info.shape, dtype=described.dtype)
        wanted = {name: ShardedTensor.from_rank_offsets(name, tensor)}
        try:
            TorchDistLoadShardedStrategy().load(wanted, self.folder)
        except (Exception, CheckpointException) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ConvertError(f"{self.folder}: {name!r} cannot be read: {said[-1]}") from None
        return tensor.reshape(-1).view(torch.uint8).numpy()

    def run_state(self) -> dict[str, Any]:
        """Return what our export put beside the tensors; empty if another program wrote the checkpoint."""
        try:
            common = torch.load(self.folder / COMMON, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError):
            return {}
        found = common.get(RUN) if isinstance(common, dict) else None
        return found if isinstance(found, dict) else {}


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


_STATE = re.compile(r"optimizer\.(\w+)\.(.+)")
_MEGATRON_STATE = re.compile(r"optimizer\.state\.(\w+)\.(.+)")


def megatron_names(names: dict[str, TensorInfo]) -> dict[str, str]:
    """Return, for each name that Megatron-Core gives a tensor, ours; a weight without master copy is a `param` too."""
    result = {}
    for name in names:
        state = _STATE.fullmatch(name)
        if state is None:
            result[name] = name
            continue
        kind, weight = state.groups()
        result[f"optimizer.state.{'param' if kind == 'master' else kind}.{weight}"] = name
        if f"optimizer.master.{weight}" not in names:
            result[f"optimizer.state.param.{weight}"] = weight
    return result


def our_names(tensors: dict[str, TensorInfo]) -> dict[str, str]:
    """Return, for each of our names, Megatron-Core's; a `param` of the type of its weight is the weight itself."""
    result = {}
    for name, info in tensors.items():
        state = _MEGATRON_STATE.fullmatch(name)
        if state is None:
            result[name] = name
            continue
        kind, weight = state.groups()
        if kind != "param":
            result[f"optimizer.{kind}.{weight}"] = name
        elif weight not in tensors or tensors[weight].dtype != info.dtype:
            result[f"optimizer.master.{weight}"] = name
    return result
