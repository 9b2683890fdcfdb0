"""Write one rank's file from the arena, chunk by chunk, while the rank still stages. Torch-free.

Writing past the page cache costs the processor next to nothing, so it begins at once; hashing costs some and waits
until the rank has staged everything, so that the two do not fight for a core while training stands still. (An arena
smaller than the file cannot wait: there room is made by writing and hashing.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckpt.manifest import digest
from ckpt.storage import Storage, make_in
from ckpt.writer.arena import CHUNK_BYTES, Arena
from ckpt.writer.record import Layout, Record, failure_name, file_name, part_name

THREADS = 2
"""Writing threads: one prepares while the other waits for the disk."""
_POLL_S = 0.005
"""How often a thread that waits for the rank looks: the rank needs the cores meanwhile."""


class SaveAbortedError(RuntimeError):
    """The rank gave the save up or died before it had staged everything."""


@dataclass
class PartOrder:
    """One rank's part of a save."""

    rank: int
    save_id: str
    folder: Path
    """The step's folder under its temporary name."""
    size: int
    """Bytes of the file."""
    layout: Layout
    """What lies in the file."""

    @property
    def file_name(self) -> str:
        """Name of the rank's file."""
        return file_name(self.rank)


def write_part(
    order: PartOrder, arena: Arena, storage: Storage, parent_alive: Callable[[], bool], durable: bool = False
) -> int:
    """Write and sync the file of this rank, then the record that says so. Returns the bytes written.

    Only those alive need the record, unless it is ``durable``: a save that a power loss interrupts is thrown away.

    Raises:
        OSError: the disk refused.
        SaveAbortedError: the rank stopped staging.
    """
    fd = make_in(storage, order.folder, lambda: storage.create(order.folder / order.file_name, order.size))
    try:
        chunks = _write_chunks(order.size, fd, arena, storage, parent_alive)
    except BaseException:
        storage.discard(fd)
        raise
    storage.finish(fd, order.size)
    file = {"name": order.file_name, "bytes": order.size, "chunk_bytes": CHUNK_BYTES, "chunks": chunks}
    storage.sync_folder(order.folder)
    record = Record(order.save_id, file, order.layout).to_bytes()
    storage.write_small(order.folder / part_name(order.rank, order.save_id), record, durable)
    if durable:
        storage.sync_folder(order.folder)
    return order.size


def report_failure(order: PartOrder, storage: Storage) -> None:
    """Tell the rank that commits not to wait: by renaming what is there, for a full disk creates nothing."""
    try:
        storage.rename(order.folder / order.file_name, order.folder / failure_name(order.rank, order.save_id))
    except OSError:
        try:
            storage.make_folder(order.folder)
            storage.write_small(order.folder / failure_name(order.rank, order.save_id), b"")
        except OSError:
            pass  # then the committing rank waits for its time limit


class _Progress:
    """Which chunks are written and which are hashed, shared by the threads."""

    def __init__(self, count: int, arena: Arena, size: int) -> None:
        self.lock = threading.Lock()
        self.hashes: list[str | None] = [None] * count
        self.written = [False] * count
        self.next = self.done = 0
        self.arena, self.size = arena, size
        self.error: BaseException | None = None

    def take(self) -> int | None:
        """Return a chunk that nobody writes yet."""
        with self.lock:
            if self.error or self.next == len(self.hashes):
                return None
            self.next += 1
            return self.next - 1

    def finish(self, index: int, chunk_hash: str | None = None) -> None:
        """Note that a chunk is written, or its hash; the arena's place is free when both are there."""
        with self.lock:
            if chunk_hash is None:
                self.written[index] = True
            else:
                self.hashes[index] = chunk_hash
            while self.done < len(self.hashes) and self.written[self.done] and self.hashes[self.done] is not None:
                self.done += 1
            self.arena.written = min(self.done * CHUNK_BYTES, self.size)
            self.arena.tick()


def _write_chunks(size: int, fd: int, arena: Arena, storage: Storage, parent_alive: Callable[[], bool]) -> list[str]:
    progress = _Progress(-(-size // CHUNK_BYTES), arena, size)

    def span(index: int) -> tuple[int, int]:
        return index * CHUNK_BYTES, min((index + 1) * CHUNK_BYTES, size)

    def wait_until_staged(end: int) -> None:
        while arena.staged < end:
            if progress.error or arena.aborted or not parent_alive():
                raise SaveAbortedError("the rank gave the save up, or died, before it had handed everything over")
            arena.tick()
            time.sleep(_POLL_S)

    def write() -> None:
        while (index := progress.take()) is not None:
            begin, end = span(index)
            wait_until_staged(end)
            storage.write_at(fd, arena.slot(begin, end), begin)
            progress.finish(index)

    def hash_all() -> None:
        if arena.capacity >= size:
            wait_until_staged(size)
        for index in range(len(progress.hashes)):
            begin, end = span(index)
            wait_until_staged(end)
            progress.finish(index, digest(arena.slot(begin, end)[: end - begin]))

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            progress.error = progress.error or error

    works = [hash_all, *[write] * THREADS]
    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if progress.error:
        raise progress.error
    return [chunk for chunk in progress.hashes if chunk is not None]
