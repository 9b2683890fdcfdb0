"""What the machine can do at best, and what a method has used of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import time
from pathlib import Path

import psutil
import torch

from ckpt.storage import io_buffer
from ckpt.writer.arena import Arena

BLOCK = 4 << 20


def raw_write(path: Path, size: int) -> float:
    """Return the seconds to write and sync ``size`` bytes past the page cache."""
    buffer = mmap.mmap(-1, BLOCK)
    buffer.write(os.urandom(1 << 16) * (BLOCK >> 16))
    start = time.monotonic()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    for _ in range(-(-size // BLOCK)):
        os.write(fd, buffer)
    os.fsync(fd)
    os.close(fd)
    return time.monotonic() - start


def raw_read(path: Path, large_pages: bool = False) -> float:
    """Return the seconds to read a file past the page cache, into memory in small pages or in large ones."""
    buffer = io_buffer(BLOCK) if large_pages else mmap.mmap(-1, BLOCK)
    start = time.monotonic()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)
    return time.monotonic() - start


def memcpy(source: torch.Tensor, target: Arena) -> float:
    """Return the seconds to copy a buffer of bytes into shared memory that is there."""
    start = time.monotonic()
    ctypes.memmove(target.address, source.data_ptr(), len(source))
    return time.monotonic() - start


def cpu_seconds() -> float:
    """Processor seconds of this process and of all its descendants, living and gone."""
    gone = resource.getrusage(resource.RUSAGE_CHILDREN)
    me = psutil.Process()
    total = gone.ru_utime + gone.ru_stime
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def drop_from_cache(folder: Path) -> None:
    """Empty the page cache of the files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
