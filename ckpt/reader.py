"""Read parts of global tensors out of a step: only the chunks that hold them, verified, into given memory. Torch-free.

Every chunk is read whole, hashed, and only then copied: no byte reaches its destination unverified. Reads, hashes and
copies of several chunks run side by side on threads (all three release Python's lock).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ckpt.errors import CheckpointError, CorruptCheckpointError
from ckpt.geometry import Copies, overlap
from ckpt.manifest import FileInfo, Manifest, TensorInfo, digest
from ckpt.region import Region, overlapping
from ckpt.storage import ALIGNMENT

THREADS = 3
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


@dataclass(frozen=True)
class _Transfer:
    """Copies from a file to a target, in bytes, ascending on both sides; positions count from the file's start."""

    copies: Copies
    target: Target

    @property
    def begin(self) -> int:
        return int(self.copies.source[0])

    @property
    def end(self) -> int:
        return int(self.copies.source[-1] + self.copies.length[-1])


@dataclass
class ReadReport:
    """What a read moved."""

    bytes_wanted: int = 0
    bytes_read: int = 0
    chunks: int = 0


def check_targets(manifest: Manifest, targets: Iterable[Target], where: Path) -> None:
    """Check that every target's tensor is in the step, as it is expected.

    Raises:
        CheckpointError: its type or global shape differs.
    """
    for target in targets:
        stored = manifest.tensors[target.key]
        if stored != target.info:
            raise CheckpointError(
                f"{where}: tensor {target.key!r} is {stored.dtype} {stored.shape} there, "
                f"{target.info.dtype} {target.info.shape} here; is this another model?"
            )


def _transfers(manifest: Manifest, targets: Sequence[Target], where: Path) -> dict[str, list[_Transfer]]:
    """Resolve targets to byte copies, by file, each list in the order of the file."""
    wanted: dict[str, list[Target]] = {}
    for target in targets:
        wanted.setdefault(target.key, []).append(target)
    regions: dict[str, list[Region]] = {key: [] for key in wanted}
    held = {id(target): 0 for target in targets}
    found: dict[str, list[_Transfer]] = {}
    for file in manifest.files:
        for piece in file.pieces:
            if piece.key not in wanted:
                continue
            info = manifest.tensors[piece.key]
            regions[piece.key].append(piece.region)
            for target in wanted[piece.key]:
                copies = overlap(piece.region, target.region, info.shape)
                if not len(copies.length):
                    continue
                held[id(target)] += int(copies.length.sum())
                size = info.item_bytes
                in_bytes = Copies(piece.begin + copies.source * size, copies.target * size, copies.length * size)
                found.setdefault(file.name, []).append(_Transfer(in_bytes, target))
    for key, parts in regions.items():
        if overlapping(parts, manifest.tensors[key].shape):
            raise CorruptCheckpointError(f"{where}: parts of {key!r} overlap")
    for target in targets:
        if held[id(target)] != target.region.numel:
            raise CorruptCheckpointError(
                f"{where}: {held[id(target)]} of the {target.region.numel} elements asked of {target.key!r} are there"
            )
    for transfers in found.values():
        transfers.sort(key=lambda transfer: transfer.begin)
    return found


def read(
    folder: Path,
    manifest: Manifest,
    targets: Sequence[Target],
    first_file: int = 0,
    threads: int = THREADS,
    progress: Callable[[int], None] | None = None,
) -> ReadReport:
    """Fill every target from the files of a step.

    Args:
        folder: the step.
        manifest: its manifest; every target's key must be in it (see :func:`check_targets`).
        targets: what to fill.
        first_file: number of the file to start with, so that ranks do not all read the same one.
        threads: chunks in flight.
        progress: called with the bytes of each chunk that is done, from any thread.

    Raises:
        CorruptCheckpointError: a chunk is not what was written; names file, bytes and tensors.
    """
    found = _transfers(manifest, targets, folder)
    files = [file for file in manifest.files if file.name in found]
    first_file %= max(len(files), 1)
    report = ReadReport(bytes_wanted=sum(len(target.memory) for target in targets))
    tasks = [task for file in files[first_file:] + files[:first_file] for task in _chunk_tasks(file, found[file.name])]
    local = threading.local()
    descriptors = _Descriptors(folder)

    def work(task: _ChunkTask) -> int:
        begin, end = task.file.chunk_span(task.index)
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, max(file.chunk_bytes for file in files) + ALIGNMENT)
        data = memoryview(local.buffer)[: end - begin]
        direct = not any(transfer.target.shared for transfer in task.transfers)
        descriptors.read(task.file, direct, memoryview(local.buffer), begin, end - begin)
        if digest(data) != task.file.chunks[task.index]:
            raise CorruptCheckpointError(_damage(folder, task.file, task.index))
        chunk = np.frombuffer(data, dtype=np.uint8)
        for transfer in task.transfers:
            _copy(chunk, begin, end, transfer)
        if progress:
            progress(end - begin)
        return end - begin

    try:
        with ThreadPoolExecutor(threads) as pool:
            for size in _first_error_stops(pool, work, tasks):
                report.bytes_read += size
                report.chunks += 1
    finally:
        descriptors.close()
    return report


@dataclass(frozen=True)
class _ChunkTask:
    file: FileInfo
    index: int
    transfers: list[_Transfer]


def _chunk_tasks(file: FileInfo, transfers: list[_Transfer]) -> list[_ChunkTask]:
    """Return the chunks of a file that hold anything wanted, each with the transfers that it serves."""
    by_chunk: dict[int, list[_Transfer]] = {}
    for transfer in transfers:
        if len(transfer.copies.source) == 1:
            last_chunk = (transfer.end - 1) // file.chunk_bytes
            for index in range(transfer.begin // file.chunk_bytes, last_chunk + 1):
                by_chunk.setdefault(index, []).append(transfer)
            continue
        first = transfer.copies.source // file.chunk_bytes
        last = (transfer.copies.source + transfer.copies.length - 1) // file.chunk_bytes
        touched = set(np.unique(np.concatenate([first, last])).tolist())
        for copy in np.flatnonzero(last > first + 1):
            touched.update(range(int(first[copy]) + 1, int(last[copy])))
        for index in touched:
            by_chunk.setdefault(index, []).append(transfer)
    return [_ChunkTask(file, index, by_chunk[index]) for index in sorted(by_chunk)]


def _first_error_stops(
    pool: ThreadPoolExecutor, work: Callable[[_ChunkTask], int], tasks: list[_ChunkTask]
) -> Iterable[int]:
    futures = [pool.submit(work, task) for task in tasks]
    try:
        for future in futures:
            yield future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


class _Descriptors:
    """Open files of a step, for direct and for cached reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.open: dict[tuple[str, bool], int] = {}

    def _get(self, name: str, direct: bool) -> int:
        with self.lock:
            if (name, direct) not in self.open:
                flags = os.O_RDONLY | os.O_NOFOLLOW
                try:
                    fd = os.open(self.folder / name, flags | (os.O_DIRECT if direct else 0))
                except OSError as error:
                    if not direct or error.errno != errno.EINVAL:
                        raise
                    fd = os.open(self.folder / name, flags)
                self.open[name, direct] = fd
            return self.open[name, direct]

    def read(self, file: FileInfo, direct: bool, buffer: memoryview, begin: int, size: int) -> None:
        """Read bytes [begin, begin + size) into the start of ``buffer``."""
        done = 0
        try:
            while done < size:
                direct = direct and done % ALIGNMENT == 0 and begin % ALIGNMENT == 0
                limit = -(-size // ALIGNMENT) * ALIGNMENT if direct else size
                got = os.preadv(self._get(file.name, direct), [buffer[done:limit]], begin + done)
                if got == 0:
                    raise CorruptCheckpointError(
                        f"{self.folder / file.name}: ends at byte {begin + done} of {file.size}"
                    )
                done += got
        except OSError as error:
            raise CorruptCheckpointError(
                f"{self.folder / file.name}: cannot be read at byte {begin + done}: {error.strerror}"
            ) from error

    def close(self) -> None:
        for fd in self.open.values():
            os.close(fd)


def _copy(chunk: Bytes, begin: int, end: int, transfer: _Transfer) -> None:
    """Copy what a transfer wants of the file's bytes [begin, end), which lie in ``chunk``."""
    source, target, length = transfer.copies
    if len(source) == 1:
        start, stop = max(transfer.begin, begin), min(transfer.end, end)
        at = int(target[0]) + start - transfer.begin
        _strided_copy(transfer.target.memory, at, 0, chunk, start - begin, 0, stop - start, 1)
        return
    first = int(np.searchsorted(source + length, begin, side="right"))
    last = int(np.searchsorted(source, end, side="left"))
    source, target, length = source[first:last].copy(), target[first:last].copy(), length[first:last].copy()
    if not len(source):
        return
    lead = max(begin - int(source[0]), 0)
    source[0], target[0], length[0] = source[0] + lead, target[0] + lead, length[0] - lead
    length[-1] = min(int(source[-1] + length[-1]), end) - int(source[-1])
    for s, t, n, count, s_step, t_step in _regular(source - begin, target, length):
        _strided_copy(transfer.target.memory, t, t_step, chunk, s, s_step, n, count)


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
        else:  # libc's memmove leaves the cache alone: twice as fast for large blocks
            ctypes.memmove(target.ctypes.data + t, source.ctypes.data + s, n)
        return
    last = count - 1
    assert s >= 0 and s + last * s_step + n <= len(source) and t >= 0 and t + last * t_step + n <= len(target)
    np.copyto(
        as_strided(target[t:], (count, n), (t_step, 1)),
        as_strided(source[s:], (count, n), (s_step, 1), writeable=False),
    )


def _damage(folder: Path, file: FileInfo, index: int) -> str:
    begin, end = file.chunk_span(index)
    ends = [piece.begin for piece in file.pieces[1:]] + [file.size]
    hit = [p.key for p, stop in zip(file.pieces, ends, strict=True) if p.begin < end and begin < stop]
    names = ", ".join(hit[:3]) + (f" and {len(hit) - 3} more" if len(hit) > 3 else "")
    return (
        f"{folder / file.name}: chunk {index} (bytes {begin} to {end}) does not match its hash; "
        f"it holds {names or 'the header of the file'}"
    )


def verify_file(folder: Path, file: FileInfo, progress: Callable[[int], None] | None = None) -> list[str]:
    """Read a whole file and return a message for each chunk that is damaged."""
    damage: list[str] = []
    descriptors = _Descriptors(folder)

    def check(index: int) -> str | None:
        begin, end = file.chunk_span(index)
        buffer = mmap.mmap(-1, file.chunk_bytes + ALIGNMENT)
        try:
            descriptors.read(file, True, memoryview(buffer), begin, end - begin)
        except CorruptCheckpointError as error:
            return str(error)
        good = digest(memoryview(buffer)[: end - begin]) == file.chunks[index]
        if progress:
            progress(end - begin)
        return None if good else _damage(folder, file, index)

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            damage.extend(message for message in pool.map(check, range(len(file.chunks))) if message)
    finally:
        descriptors.close()
    return damage
