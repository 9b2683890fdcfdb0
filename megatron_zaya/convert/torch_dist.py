"""Megatron-Core's `torch_dist` checkpoints of this model: reading them, and whose names are whose.

Names and shapes of weights are equal on both sides, because the model describes itself to Megatron-Core by global
names. Optimizer state has the names of its distributed optimizer in model space: `optimizer.state.<what>.<weight>`,
with a `param` for every trained weight (what we call a master copy, and keep in reduced precision only).

Streaming: torch's storage reader, the one beneath Megatron-Core's loader, is asked for blocks of rows. It has no way to
read a part of a stored piece, so a block is as long as the pieces that hold it.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import threading
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from ckpt.manifest import TensorInfo
from ckpt.memory import DTYPES
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.convert.safetensors_files import read_json
from megatron_zaya.convert.step import STATE
from megatron_zaya.convert.weights import Bytes, Named

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"
RUN = "zaya"
"""Where our own counters and configuration lie in the common part."""
HELD = 2
"""Blocks that a reader keeps: a chunk of the output may end one and begin the next."""

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


def _read_metadata(folder: Path) -> Metadata:
    """Return what lies where in a checkpoint, having checked that it is one and that unpickling this runs no code."""
    if not (folder / CONFIG).exists():
        raise ConvertError(f"{folder}: no {CONFIG} there; give the folder of one iteration of a torch_dist checkpoint")
    backend = read_json(folder / CONFIG).get("sharded_backend")
    if backend != "torch_dist":
        raise ConvertError(f"{folder / CONFIG}: its format is {backend!r}, not 'torch_dist'")
    try:
        metadata = _Checking(io.BytesIO((folder / METADATA).read_bytes())).load()
        outside = [found.relative_path for found in metadata.storage_data.values() if not _inside(found.relative_path)]
    except OSError as error:
        raise ConvertError(f"{folder / METADATA}: cannot be read: {error.strerror}") from None
    except Exception as error:  # damaged pickles raise almost anything
        raise ConvertError(f"{folder / METADATA}: is refused or damaged: {error}") from None
    if outside:
        raise ConvertError(f"{folder / METADATA}: is refused or damaged: {outside[0]!r} is no file of this folder")
    return metadata


def _inside(name: str) -> bool:
    return Path(name).name == name


class TorchDist:
    """The tensors of a torch_dist checkpoint, of any layout. Any thread may read."""

    def __init__(self, folder: Path) -> None:
        """Open a checkpoint.

        Raises:
            ConvertError: it is none, its metadata are damaged or not harmless, or a type of tensor is unknown.
        """
        self.folder, self.where = folder, str(folder)
        self._metadata = _read_metadata(folder)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        stored = self._metadata.state_dict_metadata
        self._stored = {name: found for name, found in stored.items() if isinstance(found, TensorStorageMetadata)}
        unknown = [name for name, found in self._stored.items() if found.properties.dtype not in DTYPES]
        if unknown:
            raise ConvertError(f"{folder}: {unknown[0]!r} is of type {self._stored[unknown[0]].properties.dtype}")
        self.tensors = {
            name: TensorInfo(DTYPES[found.properties.dtype], tuple(found.size)) for name, found in self._stored.items()
        }
        self._cuts = {name: _cuts(found) for name, found in self._stored.items()}
        self._held: OrderedDict[tuple[str, int], Bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, start: int, out: Bytes) -> None:
        """Fill ``out`` with elements of a tensor, from element ``start`` on.

        Raises:
            ConvertError: they are not all there, or a file is missing or damaged.
        """
        info, shape = self.tensors[name], self.tensors[name].shape
        row_bytes = math.prod(shape[1:]) * info.item_bytes
        begin = start * info.item_bytes
        end = begin + len(out)
        for first, last in pairwise(self._cuts[name]):
            low, high = max(begin, first * row_bytes), min(end, last * row_bytes)
            if low < high:
                with self._lock:
                    block = self._block(name, first, last)
                out[low - begin : high - begin] = block[low - first * row_bytes : high - first * row_bytes]

    def _block(self, name: str, first: int, last: int) -> Bytes:
        """Return rows of a tensor, from memory or from the files."""
        if (name, first) not in self._held:
            if len(self._held) == HELD:
                self._held.popitem(last=False)
            try:
                self._held[name, first] = self._load(name, first, last)
            except ConvertError:
                raise
            except Exception as error:  # what torch's reader makes of damaged files is of many kinds
                said = str(error).strip().splitlines() or [type(error).__name__]
                raise ConvertError(f"{self.folder}: {name!r} cannot be read: {said[-1]}") from None
        self._held.move_to_end((name, first))
        return self._held[name, first]

    def _load(self, name: str, first: int, last: int) -> Bytes:
        stored = self._stored[name]
        shape = [last - first, *stored.size[1:]] if stored.size else []
        tensor = torch.empty(shape, dtype=stored.properties.dtype)
        items = [
            _item(name, number, chunk, first, last)
            for number, chunk in enumerate(stored.chunks)
            if not chunk.sizes or (chunk.offsets[0] < last and chunk.offsets[0] + chunk.sizes[0] > first)
        ]
        held = sum(math.prod(item.lengths) for item in items)
        if held != tensor.numel():
            raise ConvertError(
                f"{self.folder}: {held} of the {tensor.numel()} elements of {name!r} from row {first} on are there"
            )
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner({name: tensor}, self._metadata, is_coordinator=True)
        self._reader.read_data(LoadPlan(items), planner).wait()
        return tensor.reshape(-1).view(torch.uint8).numpy()

    def run_state(self) -> dict[str, Any]:
        """Return what our export put beside the tensors; empty if another program wrote the checkpoint."""
        try:
            common = torch.load(self.folder / COMMON, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError):
            return {}
        found = common.get(RUN) if isinstance(common, dict) else None
        return found if isinstance(found, dict) else {}


def _cuts(stored: TensorStorageMetadata) -> list[int]:
    """Return the rows at which pieces of a tensor begin or end, the first and the last row among them."""
    if not stored.size:
        return [0, 1]
    ends = {row for chunk in stored.chunks for row in (chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])}
    return sorted({0, stored.size[0]} | ends)


def _item(name: str, number: int, chunk: ChunkStorageMetadata, first: int, last: int) -> ReadItem:
    """Ask for what a piece holds of the rows from ``first`` to ``last``, to be put into a tensor of just these."""
    inside, target, lengths = list(chunk.offsets), list(chunk.offsets), list(chunk.sizes)
    if lengths:
        low, high = max(first, chunk.offsets[0]), min(last, chunk.offsets[0] + chunk.sizes[0])
        inside[0], target[0], lengths[0] = low - chunk.offsets[0], low - first, high - low
        inside[1:] = [0] * (len(inside) - 1)
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(name),
        dest_offsets=torch.Size(target),
        storage_index=MetadataIndex(name, chunk.offsets, number),
        storage_offsets=torch.Size(inside),
        lengths=torch.Size(lengths),
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


def our_view(stored: TorchDist, with_state: bool = False) -> Named:
    """Return a checkpoint under our names; without optimizer, balancing and random state unless ``with_state``."""
    names = our_names(stored.tensors)
    return Named(stored, {name: theirs for name, theirs in names.items() if with_state or not name.startswith(STATE)})
