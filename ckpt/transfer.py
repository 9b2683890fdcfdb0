"""From parts of tensors to bytes: which bytes of which chunks of a step's files go where in memory. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ckpt.errors import CorruptCheckpointError
from ckpt.geometry import Copies, overlap, single_overlap
from ckpt.manifest import FileInfo, Manifest, Piece, TensorInfo
from ckpt.native import copy
from ckpt.region import Region, overlapping

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Target:
    """Memory that wants a part of a global tensor."""

    key: str
    info: TensorInfo
    region: Region
    memory: Bytes
    """1-D, writable, as long as the region."""
    shared: bool = False
    """Other processes of this machine want the same bytes: read through the page cache."""


class Transfer(NamedTuple):
    """What goes from one piece of a file to one target; positions in bytes, of the file and of the target's memory."""

    target: Target
    begin: int
    """First byte in the file."""
    end: int
    at: int
    """Byte of the target that the first one goes to."""
    copies: Copies | None
    """None: one contiguous copy. Otherwise all copies, ascending on both sides."""


def transfer_of(piece: Piece, target: Target, info: TensorInfo) -> tuple[Transfer | None, int]:
    """Return what a piece gives to a target (None: nothing), and the number of elements."""
    size = info.item_bytes
    single = single_overlap(piece.region, target.region, info.shape)
    if single is not None:
        source, at, length = single
        begin = piece.begin + source * size
        return (Transfer(target, begin, begin + length * size, at * size, None) if length else None), length
    copies = overlap(piece.region, target.region, info.shape)
    if not len(copies.length):
        return None, 0
    in_bytes = Copies(piece.begin + copies.source * size, copies.target * size, copies.length * size)
    begin, end = int(in_bytes.source[0]), int(in_bytes.source[-1] + in_bytes.length[-1])
    return Transfer(target, begin, end, int(in_bytes.target[0]), in_bytes), int(copies.length.sum())


def transfers(manifest: Manifest, targets: Sequence[Target], where: Path) -> dict[str, list[Transfer]]:
    """Resolve targets to byte copies, by file, each list in the order of the file.

    Raises:
        CorruptCheckpointError: the files do not hold each wanted element exactly once.
    """
    wanted: dict[str, list[int]] = {}
    for number, target in enumerate(targets):
        wanted.setdefault(target.key, []).append(number)
    regions: dict[str, list[Region]] = {key: [] for key in wanted}
    held = [0] * len(targets)
    found: dict[str, list[Transfer]] = {}
    for file in manifest.files:
        moved = []
        for piece in file.pieces:
            numbers = wanted.get(piece.key)
            if numbers is None:
                continue
            info = manifest.tensors[piece.key]
            regions[piece.key].append(piece.region)
            for number in numbers:
                transfer, count = transfer_of(piece, targets[number], info)
                if transfer is not None:
                    held[number] += count
                    moved.append(transfer)
        if moved:
            found[file.name] = sorted(moved, key=lambda transfer: transfer.begin)
    for key, parts in regions.items():
        if len(parts) > 1 and overlapping(parts, manifest.tensors[key].shape):
            raise CorruptCheckpointError(f"{where}: parts of {key!r} overlap")
    for target, count in zip(targets, held, strict=True):
        if count != target.region.numel:
            raise CorruptCheckpointError(
                f"{where}: {count} of the {target.region.numel} elements asked of {target.key!r} are there"
            )
    return found


class ChunkTask(NamedTuple):
    """A chunk to read, and the transfers that it serves."""

    file: FileInfo
    number: int
    transfers: list[Transfer]


def chunk_tasks(file: FileInfo, wanted: Iterable[Transfer]) -> list[ChunkTask]:
    """Return the chunks of a file that hold anything wanted."""
    by_chunk: dict[int, list[Transfer]] = {}
    for transfer in wanted:
        for index in _touched(transfer, file.chunk_bytes):
            by_chunk.setdefault(index, []).append(transfer)
    return [ChunkTask(file, index, by_chunk[index]) for index in sorted(by_chunk)]


def _touched(transfer: Transfer, chunk_bytes: int) -> Iterable[int]:
    if transfer.copies is None:
        return range(transfer.begin // chunk_bytes, (transfer.end - 1) // chunk_bytes + 1)
    first = transfer.copies.source // chunk_bytes
    last = (transfer.copies.source + transfer.copies.length - 1) // chunk_bytes
    touched = set(np.unique(np.concatenate([first, last])).tolist())
    for index in np.flatnonzero(last > first + 1):
        touched.update(range(int(first[index]) + 1, int(last[index])))
    return touched


def copy_out(chunk: Bytes, begin: int, end: int, transfer: Transfer) -> None:
    """Copy what a transfer wants of the file's bytes [begin, end), which lie in ``chunk``."""
    memory = transfer.target.memory
    if transfer.copies is None:
        start, stop = max(transfer.begin, begin), min(transfer.end, end)
        _strided_copy(memory, transfer.at + start - transfer.begin, 0, chunk, start - begin, 0, stop - start, 1)
        return
    source, target, length = transfer.copies
    first = int(np.searchsorted(source + length, begin, side="right"))
    last = int(np.searchsorted(source, end, side="left"))
    source, target, length = source[first:last].copy(), target[first:last].copy(), length[first:last].copy()
    if not len(source):
        return
    lead = max(begin - int(source[0]), 0)
    source[0], target[0], length[0] = source[0] + lead, target[0] + lead, length[0] - lead
    length[-1] = min(int(source[-1] + length[-1]), end) - int(source[-1])
    for s, t, n, count, s_step, t_step in _regular(source - begin, target, length):
        _strided_copy(memory, t, t_step, chunk, s, s_step, n, count)


def _regular(
    source: NDArray[np.int64], target: NDArray[np.int64], length: NDArray[np.int64]
) -> Iterable[tuple[int, int, int, int, int, int]]:
    """Group copies of equal length at constant distances: (source, target, length, count, distances)."""
    if len(source) == 1:
        yield int(source[0]), int(target[0]), int(length[0]), 1, 0, 0
        return
    steps = np.stack([np.diff(source), np.diff(target)])
    change = (steps[:, 1:] != steps[:, :-1]).any(axis=0)
    index, count = 0, len(source)
    breaks = np.flatnonzero(change) + 2  # a run of equal steps ends before these
    uneven = np.flatnonzero(length[1:] != length[:-1]) + 1
    stops = np.union1d(breaks, uneven)
    while index < count:
        following = stops[np.searchsorted(stops, index + 1) :]
        # The step after `index` decides; a break right behind it leaves a run of one or two.
        stop = int(following[0]) if len(following) else count
        size = stop - index
        s_step, t_step = (int(steps[0, index]), int(steps[1, index])) if size > 1 else (0, 0)
        yield int(source[index]), int(target[index]), int(length[index]), size, s_step, t_step
        index = stop


def _strided_copy(target: Bytes, t: int, t_step: int, source: Bytes, s: int, s_step: int, n: int, count: int) -> None:
    if count == 1:
        if n < 1 << 16:
            target[t : t + n] = source[s : s + n]
        else:
            copy(target.ctypes.data + t, source.ctypes.data + s, n)
        return
    last = count - 1
    assert s >= 0 and s + last * s_step + n <= len(source) and t >= 0 and t + last * t_step + n <= len(target)
    np.copyto(
        as_strided(target[t:], (count, n), (t_step, 1)),
        as_strided(source[s:], (count, n), (s_step, 1), writeable=False),
    )
