"""What the disk under a folder gives, and what of it a save and a load of one process reach."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from pathlib import Path

import torch

from ckpt.checkpointer import Checkpointer
from ckpt.errors import CheckpointError
from ckpt.shard import whole
from ckpt.writer.arena import CHUNK_BYTES

TENSOR_BYTES = 16 << 20


def measure(folder: Path, gigabytes: float = 1.0) -> dict[str, float]:
    """Return GB/s of raw O_DIRECT writing and reading, of a save until it is safe, of its stall, of a verified load.

    Everything is written below a temporary folder inside ``folder``, and removed.

    Raises:
        CheckpointError: the save failed; says why.
    """
    count = max(1, round(gigabytes * 1e9 / TENSOR_BYTES))
    tensors = [torch.ones(TENSOR_BYTES // 4) for _ in range(count)]
    shards = [whole(f"tensor.{number}", tensor) for number, tensor in enumerate(tensors)]
    size = count * TENSOR_BYTES / 1e9
    with tempfile.TemporaryDirectory(dir=folder, prefix="ckpt-bench-") as name:
        raw = _raw(Path(name) / "raw", count * TENSOR_BYTES)
        checkpointer = Checkpointer(Path(name))
        for iteration in (1, 2):  # the first one starts the writer
            save = checkpointer.save(iteration, shards)
            checkpointer.wait()
            if save.error is not None:
                raise CheckpointError(f"{folder}: {save.error}")
        assert save.durable_s is not None
        start = time.monotonic()
        checkpointer.load(shards)
        load_s = time.monotonic() - start
        checkpointer.close()
    stall, durable = size / save.stall_s, size / save.durable_s
    return raw | {"stall_gbps": stall, "durable_gbps": durable, "load_gbps": size / load_s, "gigabytes": size}


def _raw(path: Path, size: int) -> dict[str, float]:
    buffer = mmap.mmap(-1, CHUNK_BYTES)
    buffer.write(b"x" * CHUNK_BYTES)
    start = time.monotonic()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0))
    for _ in range(size // CHUNK_BYTES):
        os.write(fd, buffer)
    os.fsync(fd)
    os.close(fd)
    written = time.monotonic()
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)
    done = time.monotonic()
    path.unlink()
    return {"raw_write_gbps": size / 1e9 / (written - start), "raw_read_gbps": size / 1e9 / (done - written)}
