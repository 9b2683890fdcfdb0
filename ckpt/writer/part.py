"""Write one rank's file from the arena: hash and write chunk by chunk while the rank still stages. Torch-free."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.manifest import digest, seal
from ckpt.storage import Storage
from ckpt.writer.arena import CHUNK_BYTES, Arena

THREADS = 2
"""Writing threads: one hashes while the other waits for the disk."""


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
    pieces: list[Any]
    """JSON form of what lies in the file."""
    tensors: dict[str, Any]
    """JSON form of the tensors that the pieces are parts of."""

    @property
    def file_name(self) -> str:
        """Name of the rank's file."""
        return f"rank_{self.rank:05d}.safetensors"


def part_name(rank: int, save_id: str) -> str:
    """Return the name of the file that says a rank's part is complete."""
    return f"rank_{rank:05d}.{save_id}.part.json"


def failure_name(rank: int, save_id: str) -> str:
    """Return the name of the file that says a rank's part will never be complete."""
    return f"rank_{rank:05d}.{save_id}.failed"


def write_part(order: PartOrder, arena: Arena, storage: Storage, parent_alive: Callable[[], bool]) -> int:
    """Write and sync the file of this rank, then the record that says so. Returns the bytes written.

    Raises:
        OSError: the disk refused.
        SaveAbortedError: the rank stopped staging.
    """
    storage.make_folder(order.folder)
    fd = storage.create(order.folder / order.file_name, order.size)
    try:
        chunks = _write_chunks(order.size, fd, arena, storage, parent_alive)
    except BaseException:
        storage.discard(fd)
        raise
    storage.finish(fd, order.size)
    file = {"name": order.file_name, "bytes": order.size, "chunk_bytes": CHUNK_BYTES, "chunks": chunks}
    record = {"save_id": order.save_id, "tensors": order.tensors, "file": file | {"pieces": order.pieces}}
    storage.sync_folder(order.folder)
    storage.write_small(order.folder / part_name(order.rank, order.save_id), seal("part", record))
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
    """Which chunks are done, shared by the writing threads."""

    def __init__(self, count: int, arena: Arena, size: int) -> None:
        self.lock = threading.Lock()
        self.hashes: list[str | None] = [None] * count
        self.next = self.done = 0
        self.arena, self.size = arena, size
        self.error: BaseException | None = None

    def take(self) -> int | None:
        with self.lock:
            if self.error or self.next == len(self.hashes):
                return None
            self.next += 1
            return self.next - 1

    def finish(self, index: int, chunk_hash: str) -> None:
        with self.lock:
            self.hashes[index] = chunk_hash
            while self.done < len(self.hashes) and self.hashes[self.done] is not None:
                self.done += 1
            self.arena.written = min(self.done * CHUNK_BYTES, self.size)
            self.arena.tick()


def _write_chunks(size: int, fd: int, arena: Arena, storage: Storage, parent_alive: Callable[[], bool]) -> list[str]:
    progress = _Progress(-(-size // CHUNK_BYTES), arena, size)

    def work() -> None:
        try:
            while (index := progress.take()) is not None:
                begin, end = index * CHUNK_BYTES, min((index + 1) * CHUNK_BYTES, size)
                _wait_until_staged(end, arena, parent_alive)
                data = arena.slot(begin, end)
                chunk_hash = digest(data[: end - begin])
                storage.write_at(fd, data, begin)
                progress.finish(index, chunk_hash)
        except BaseException as error:
            progress.error = progress.error or error

    threads = [threading.Thread(target=work, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if progress.error:
        raise progress.error
    return [chunk for chunk in progress.hashes if chunk is not None]


def _wait_until_staged(end: int, arena: Arena, parent_alive: Callable[[], bool]) -> None:
    while arena.staged < end:
        if arena.aborted or not parent_alive():
            raise SaveAbortedError("the rank gave the save up, or died, before it had handed everything over")
        arena.tick()
        time.sleep(0.001)
