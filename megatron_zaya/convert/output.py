"""Write planned files from streamed weights, chunk by chunk on several threads, into a folder that appears at the end.

Invariant: the folder has its name only when everything in it is complete and on the disk; a failure leaves nothing.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from ckpt.storage import ALIGNMENT, POSIX, io_buffer, load_storage
from ckpt.writer.arena import CHUNK_BYTES
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.convert.safetensors_files import PlannedFile
from megatron_zaya.convert.weights import Bytes, Weights, check_finite

Progress = Callable[[int, int], None]
"""Is told of bytes that were written just now, and of how many there will be in all."""


def silent(size: int, total: int) -> None:
    """Tell nobody."""


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder under a temporary name beside ``path``; at the end of the block it is renamed to ``path``.

    Raises:
        ConvertError: ``path`` exists, or its parent cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise ConvertError(f"{path}: exists already; nothing is overwritten, choose another output or remove it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    storage = load_storage(POSIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        storage.sync_folder(temporary)
        if path.exists():
            raise ConvertError(f"{path}: somebody else made it in the meantime")
        storage.rename(temporary, path)
        storage.sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConvertError(f"{path}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class _Content:
    """The bytes of a planned file."""

    def __init__(self, file: PlannedFile, weights: Weights) -> None:
        self.file, self.weights = file, weights
        self._begins = np.array([begin for _, _, begin in file.entries], dtype=np.int64)

    def fill(self, begin: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes of the file from ``begin`` on.

        Raises:
            ConvertError: a value is not finite; names the tensor and the element.
        """
        end, head = begin + len(out), self.file.header
        if begin < len(head):
            part = np.frombuffer(head[begin:end], dtype=np.uint8)
            out[: len(part)] = part
        number = max(int(np.searchsorted(self._begins, begin, side="right")) - 1, 0)
        for name, first, at in self.file.entries[number:]:
            if at >= end:
                break
            info = self.weights.tensors[name]
            size = math.prod(info.shape) * info.item_bytes
            low, high = max(begin, at), min(end, at + size)
            if low < high:
                self._fill_tensor(name, first + (low - at) // info.item_bytes, out[low - begin : high - begin])

    def _fill_tensor(self, name: str, start: int, out: Bytes) -> None:
        self.weights.read(name, start, out)
        check_finite(self.weights, name, start, out)


def write_files(
    folder: Path,
    files: list[PlannedFile],
    weights: Weights,
    workers: int,
    progress: Progress,
    note: Callable[[str, int, Bytes], None] = lambda file, chunk, data: None,
) -> None:
    """Write and sync every file.

    Args:
        folder: where, existing.
        files: what.
        weights: where the tensors come from.
        workers: threads; each holds one chunk.
        progress: told after each chunk, in bytes of all files.
        note: sees (file's name, number of the chunk, its bytes), from any thread.

    Raises:
        ConvertError: a tensor cannot be read or is not finite.
        OSError: the disk refused.
    """
    total = sum(file.size for file in files)
    storage, buffers = load_storage(POSIX), threading.local()
    with ThreadPoolExecutor(workers) as pool:
        for file in files:
            content = _Content(file, weights)
            fd = storage.create(folder / file.name, file.size)

            def write(chunk: int, content: _Content = content, fd: int = fd) -> int:
                if not hasattr(buffers, "chunk"):
                    buffers.chunk = io_buffer(CHUNK_BYTES)
                begin = chunk * CHUNK_BYTES
                size = min(CHUNK_BYTES, content.file.size - begin)
                data = np.frombuffer(buffers.chunk, dtype=np.uint8, count=size)
                content.fill(begin, data)
                note(content.file.name, chunk, data)
                storage.write_at(fd, memoryview(buffers.chunk)[: -(-size // ALIGNMENT) * ALIGNMENT], begin)
                return size

            try:
                chunk_numbers = range(-(-file.size // CHUNK_BYTES))
                _run(pool, write, chunk_numbers, 2 * workers, lambda size: progress(size, total))
            except BaseException:
                storage.discard(fd)
                raise
            storage.finish(fd, file.size)


def _run(
    pool: ThreadPoolExecutor, work: Callable[[int], int], numbers: range, ahead: int, done: Callable[[int], None]
) -> None:
    """Call ``work`` on every number, at most ``ahead`` of them handed out at a time; the first error stops it."""
    running: set[Future[int]] = set()
    rest = iter(numbers)
    try:
        while True:
            while len(running) < ahead and (number := next(rest, None)) is not None:
                running.add(pool.submit(work, number))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                done(future.result())
    except BaseException:
        for future in running:
            future.cancel()
        wait(running)
        raise
