"""Read parts of global tensors out of a step: only the chunks that hold them, verified, into given memory. Torch-free.

Every chunk is read whole, hashed, and only then copied: no byte reaches its destination unverified. Reads, hashes and
copies of several chunks run side by side on threads (all three release Python's lock).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckpt.descriptors import Descriptors
from ckpt.errors import CheckpointError, CorruptCheckpointError
from ckpt.manifest import FileInfo, Manifest, digest
from ckpt.storage import io_buffer
from ckpt.transfer import ChunkTask, Target, chunk_tasks, copy_out, transfers

THREADS = 3


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
    found = transfers(manifest, targets, folder)
    files = [file for file in manifest.files if file.name in found]
    first_file %= max(len(files), 1)
    report = ReadReport(bytes_wanted=sum(len(target.memory) for target in targets))
    tasks = [task for file in files[first_file:] + files[:first_file] for task in chunk_tasks(file, found[file.name])]
    local = threading.local()
    descriptors = Descriptors(folder)

    def work(task: ChunkTask) -> int:
        begin, end = task.file.chunk_span(task.number)
        if not hasattr(local, "buffer"):
            local.buffer = io_buffer(max(file.chunk_bytes for file in files))
        data = memoryview(local.buffer)[: end - begin]
        direct = not any(transfer.target.shared for transfer in task.transfers)
        descriptors.read(task.file.name, direct, memoryview(local.buffer), begin, end - begin)
        if digest(data) != task.file.chunks[task.number]:
            raise CorruptCheckpointError(damage_of(folder, task.file, task.number))
        chunk = np.frombuffer(data, dtype=np.uint8)
        for transfer in task.transfers:
            copy_out(chunk, begin, end, transfer)
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


def _first_error_stops(
    pool: ThreadPoolExecutor, work: Callable[[ChunkTask], int], tasks: list[ChunkTask]
) -> Iterable[int]:
    futures = [pool.submit(work, task) for task in tasks]
    try:
        for future in futures:
            yield future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def damage_of(folder: Path, file: FileInfo, index: int) -> str:
    """Return what to say of a damaged chunk."""
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
    local = threading.local()
    descriptors = Descriptors(folder)

    def check(index: int) -> str | None:
        begin, end = file.chunk_span(index)
        if not hasattr(local, "buffer"):
            local.buffer = io_buffer(file.chunk_bytes)
        try:
            descriptors.read(file.name, True, memoryview(local.buffer), begin, end - begin)
        except CorruptCheckpointError as error:
            return str(error)
        good = digest(memoryview(local.buffer)[: end - begin]) == file.chunks[index]
        if progress:
            progress(end - begin)
        return None if good else damage_of(folder, file, index)

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            damage.extend(message for message in pool.map(check, range(len(file.chunks))) if message)
    finally:
        descriptors.close()
    return damage
