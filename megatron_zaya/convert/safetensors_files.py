"""Folders of safetensors files: read any run of elements, and plan new ones. Torch-free.

A file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, data_offsets), and
the tensors. Nothing read from a file is trusted before it is checked against the file's size.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.manifest import ITEM_BYTES, TensorInfo
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.convert.weights import Bytes, Weights, some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: str
    begin: int
    """First byte, counted from the start of the file."""


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of the files that its index names."""

    def __init__(self, folder: Path) -> None:
        """Open a folder and check every header.

        Raises:
            ConvertError: no weights are there, a file is missing, cut off or malformed, or the index is wrong.
        """
        self.where, self.folder = str(folder), folder
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, Place] = {}
        self._open: dict[str, int] = {}
        index = self._index()
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            self._take(file)
        if index is not None:
            self._check_index(index)

    def _index(self) -> dict[str, str] | None:
        path = self.folder / INDEX
        if not path.exists():
            if not (self.folder / SINGLE).exists():
                raise ConvertError(f"{self.folder}: holds neither {SINGLE} nor {INDEX}")
            return None
        found = read_json(path).get("weight_map")
        good = isinstance(found, dict) and all(isinstance(f, str) and Path(f).name == f for f in found.values())
        if not good:
            raise ConvertError(f"{path}: its weight_map must be names of files in this folder")
        return found

    def _take(self, file: str) -> None:
        for name, (info, begin) in _read_header(self.folder / file).items():
            if name in self._places:
                raise ConvertError(f"{self.folder}: {name!r} lies in {self._places[name].file} and in {file}")
            self.tensors[name], self._places[name] = info, Place(file, begin)

    def _check_index(self, index: dict[str, str]) -> None:
        wrong = [n for n, file in index.items() if n not in self._places or self._places[n].file != file]
        if wrong:
            raise ConvertError(f"{self.folder / INDEX}: {some(wrong)} is not in the file that the index names")
        unlisted = sorted(set(self._places) - set(index))
        if unlisted:
            raise ConvertError(f"{self.folder / INDEX}: does not list {some(unlisted)}, which the files hold")

    def read(self, name: str, start: int, out: Bytes) -> None:
        """Fill ``out`` with elements of a tensor, from element ``start`` on."""
        place = self._places[name]
        if place.file not in self._open:
            self._open[place.file] = os.open(self.folder / place.file, os.O_RDONLY)
        fd, at = self._open[place.file], place.begin + start * self.tensors[name].item_bytes
        data = out.data
        while len(data):
            got = os.preadv(fd, [data], at)
            if got <= 0:
                raise ConvertError(f"{self.folder / place.file}: ends at byte {at}; it was cut off while being read")
            data, at = data[got:], at + got

    def close(self) -> None:
        """Close the files."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ConvertError: it cannot be read, or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConvertError(f"{path}: is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: must hold a JSON object")
    return value


def _read_header(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Return type, shape and first byte of every tensor of a file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(size - 8, _LARGEST_HEADER):
                raise ConvertError(f"{path}: is no safetensors file, or its header is cut off ({size} bytes)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"{path}: its header is no JSON: {error}") from None
    try:
        return dict(_entries(path, header, 8 + length, size))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"{path}: its header is malformed: {error!r}") from None


def _entries(path: Path, header: dict[str, Any], data: int, size: int) -> Iterable[tuple[str, tuple[TensorInfo, int]]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        info = TensorInfo(entry["dtype"], tuple(int(n) for n in entry["shape"]))
        if info.dtype not in ITEM_BYTES or min(info.shape, default=0) < 0 or begin < 0:
            raise ConvertError(f"{path}: {name!r} is {info.dtype} {list(info.shape)}, which no tensor can be")
        if end - begin != math.prod(info.shape) * info.item_bytes:
            raise ConvertError(f"{path}: {name!r} has {end - begin} bytes, its shape {list(info.shape)} needs others")
        if data + end > size:
            raise ConvertError(f"{path}: is cut off: {name!r} ends at byte {data + end}, the file at {size}")
        yield name, (info, data + begin)


@dataclass(frozen=True)
class PlannedFile:
    """A file before it has content."""

    name: str
    header: bytes
    """Everything before the first tensor."""
    entries: list[tuple[str, int, int]]
    """Name, first element and first byte (from the start of the file) of what follows, without holes."""
    size: int
    """Bytes of the file."""


def plan_files(weights: Weights, max_file_bytes: int) -> list[PlannedFile]:
    """Spread tensors over files of at most ``max_file_bytes`` (a larger tensor gets one of its own), in their order."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, info in weights.tensors.items():
        size = math.prod(info.shape) * info.item_bytes
        if groups[-1] and used + size > max_file_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return [
        _plan(weights, name, group) for name, group in zip(names if len(groups) > 1 else [SINGLE], groups, strict=True)
    ]


def _plan(weights: Weights, file: str, names: list[str]) -> PlannedFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = [], 0
    for name in sorted(names, key=lambda n: -weights.tensors[n].item_bytes):  # stable; keeps every tensor aligned
        info = weights.tensors[name]
        begin, end = end, end + math.prod(info.shape) * info.item_bytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
        places.append((name, begin))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return PlannedFile(file, head, [(name, 0, len(head) + begin) for name, begin in places], len(head) + end)


def index_json(weights: Weights, files: list[PlannedFile]) -> dict[str, Any]:
    """Return the content of the index of several files."""
    total = sum(math.prod(info.shape) * info.item_bytes for info in weights.tensors.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: file.name for file in files for name, _, _ in file.entries},
    }
