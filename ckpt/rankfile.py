"""What one rank writes, and where in its file. Torch-free; every decision depends on the descriptions alone.

Replicas: a part that n ranks share the writing of is cut into up to n pieces of at least ``LEAST_PIECE`` bytes. Which
copy writes which piece follows from the part's name, so the ranks agree without talking, and the bytes are even.

A rank's file is a valid safetensors file: length of the header, header (JSON, padded with spaces so that the data are
aligned), tensors one after the other without holes, the largest element type first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from ckpt.errors import CheckpointError
from ckpt.manifest import ITEM_BYTES, Piece, TensorInfo
from ckpt.region import Region
from ckpt.storage import ALIGNMENT

LEAST_PIECE = 1 << 20
_STAMP = "iteration {:>16d} save {:>48s}"


@dataclass(frozen=True)
class Part:
    """What a rank holds of a tensor: a :class:`ckpt.shard.Shard` without its data."""

    key: str
    dtype: str
    global_shape: tuple[int, ...]
    region: Region
    replica_id: int = 0
    writers: int = 1


@dataclass(frozen=True)
class FilePlan:
    """A rank's file before it has content."""

    pieces: list[Piece]
    copies: NDArray[np.int64]
    """[pieces, 4]: number of its part, first byte within the part, first byte of the file, bytes."""
    tensors: dict[str, TensorInfo]
    size: int
    """Bytes of the file."""
    data_begin: int
    _header: bytes

    def header(self, iteration: int, save_id: str) -> bytes:
        """Return the first ``data_begin`` bytes of the file: its header, stamped with the step."""
        stamp = _STAMP.format(iteration, save_id).encode()
        assert len(stamp) == len(_STAMP.format(0, "")), "the stamp has a fixed width"
        return self._header.replace(_STAMP.format(0, "").encode(), stamp, 1)


def pieces_to_write(part: Part) -> Iterable[tuple[int, int]]:
    """Yield [start, stop) of the elements of ``part`` that this copy writes, counted within the part."""
    if part.replica_id >= part.writers:
        return
    numel = part.region.numel
    if part.writers == 1:
        yield 0, numel
        return
    parts = min(part.writers, max(1, numel * ITEM_BYTES[part.dtype] // LEAST_PIECE))
    first = xxhash.xxh3_64_intdigest(f"{part.key} {part.region}".encode()) % part.writers
    mine = (part.replica_id - first) % part.writers
    if mine < parts:
        yield numel * mine // parts, numel * (mine + 1) // parts


def plan_file(parts: Sequence[Part], rank: int) -> FilePlan:
    """Decide what this rank writes and where.

    Raises:
        CheckpointError: one name stands for two different tensors.
    """
    tensors: dict[str, TensorInfo] = {}
    chosen: list[tuple[int, int, int]] = []
    for number, part in enumerate(parts):
        info = TensorInfo(part.dtype, part.global_shape)
        if tensors.setdefault(part.key, info) != info:
            raise CheckpointError(f"{part.key!r} is both {tensors[part.key]} and {info}; names must be unique")
        chosen.extend((number, start, stop) for start, stop in pieces_to_write(part))
    chosen.sort(key=lambda c: (-ITEM_BYTES[parts[c[0]].dtype], parts[c[0]].key, parts[c[0]].region.offset, c[1]))
    header: dict[str, object] = {"__metadata__": {"format": "pt", "rank": str(rank), "step": _STAMP.format(0, "")}}
    places, end = [], 0
    for number, start, stop in chosen:
        part = parts[number]
        begin, end = end, end + (stop - start) * ITEM_BYTES[part.dtype]
        whole_box = part.region.start + start == 0 and stop - start == _box_numel(part.region)
        shape = list(part.region.shape) if whole_box else [stop - start]
        name = part.key if part.key not in header else f"{part.key}#{begin}"
        header[name] = {"dtype": part.dtype, "shape": shape, "data_offsets": [begin, end]}
        places.append(begin)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    data_begin = 8 + len(text)
    pieces = [
        Piece(parts[n].key, _cut(parts[n].region, start, stop), data_begin + begin)
        for (n, start, stop), begin in zip(chosen, places, strict=True)
    ]
    copies = []
    for (number, start, stop), begin in zip(chosen, places, strict=True):
        size = ITEM_BYTES[parts[number].dtype]
        copies.append((number, start * size, data_begin + begin, (stop - start) * size))
    table = np.array(copies, dtype=np.int64).reshape(-1, 4)
    return FilePlan(pieces, table, tensors, data_begin + end, data_begin, struct.pack("<Q", len(text)) + text)


def _box_numel(region: Region) -> int:
    numel = 1
    for size in region.shape:
        numel *= size
    return numel


def _cut(region: Region, start: int, stop: int) -> Region:
    return Region(region.offset, region.shape, region.start + start, region.start + stop)
