"""Between torch's tensors and plain memory: types, addresses, staging copies, registering with an accelerator.

With checkpointer.py, background.py, restore.py and the adapters the only code of this package that knows torch."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ckpt.errors import CheckpointError
from ckpt.manifest import TensorInfo
from ckpt.native import copy, copy_all
from ckpt.rankfile import FilePlan, Part
from ckpt.shard import Shard
from ckpt.transfer import Target

if TYPE_CHECKING:
    from ckpt.writer.arena import Arena

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def dtype_name(tensor: Tensor, key: str) -> str:
    """Return safetensors' name of a tensor's type.

    Raises:
        CheckpointError: it has none.
    """
    try:
        return DTYPES[tensor.dtype]
    except KeyError:
        raise CheckpointError(f"{key!r}: tensors of type {tensor.dtype} cannot be saved") from None


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Keep Python's garbage collector out of a block, or (as a decorator) of a function.

    Describing thousands of tensors makes enough small objects for it to walk through everything that a training
    process holds: 0.3 s for nothing, for these objects make no cycles.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def parts_of(shards: Sequence[Shard]) -> list[Part]:
    """Return the shards without their data."""
    return [
        Part(s.key, dtype_name(s.data, s.key), tuple(s.global_shape), s.region, s.replica_id, s.writers) for s in shards
    ]


def signature_of(shards: Sequence[Shard]) -> list[tuple[Any, ...]]:
    """Return what a plan depends on, quick to make and to compare."""
    return list(map(_SIGNATURE, shards))


_SIGNATURE = operator.attrgetter(
    *("key", "data.dtype", "global_shape", "global_offset", "local_shape", "flattened_range", "replica_id", "writers")
)


def stage(shards: Sequence[Shard], plan: FilePlan, header: bytes, ring: Ring) -> None:
    """Copy a file's content, piece by piece, into the ring. Afterwards the tensors may change."""
    ring.put_bytes(header)
    tensors = [shard.data for shard in shards]
    if not all(map(Tensor.is_contiguous, tensors)):
        tensors = [tensor.contiguous() for tensor in tensors]
    if ring.holds(plan.size) and all(map(_IS_CPU, tensors)):
        number, first, begin, size = plan.copies.T
        addresses = np.fromiter(map(Tensor.data_ptr, tensors), np.uint64, len(tensors))
        sources = addresses[number] + first.astype(np.uint64)
        copy_all(ring.base, begin, sources, size, ring.arena.staged_address, _ANNOUNCE)
        ring.at = plan.size
    else:
        for number, first, _, size in plan.copies.tolist():
            ring.put(tensors[number].detach(), first, size)
    ring.flush()


_IS_CPU = operator.attrgetter("is_cpu")
_ANNOUNCE = 1 << 30
"""Bytes after which the writer is told of what has been staged: a tenth of a second in which it leaves the memory and
the cores to the rank. (What comes from an accelerator is told when it has arrived.)"""


class Ring:
    """Puts tensors one after the other into an arena, waiting for the writer where it must."""

    def __init__(self, arena: Arena, wait_for: Callable[[int], None], pinned: Tensor | None = None) -> None:
        """Fill ``arena`` from its start; ``wait_for(position)`` returns when the file is written to there."""
        self.arena, self.wait_for, self.pinned = arena, wait_for, pinned
        self.base = arena.address
        self.at = 0
        self.stream: torch.cuda.Stream | None = None

    def holds(self, size: int) -> bool:
        """Return whether a file of ``size`` bytes never wraps around, so that positions are the file's own."""
        return size <= self.arena.capacity

    def _room(self, size: int) -> tuple[int, int]:
        """Return (ring position, bytes): how much of ``size`` can go there at once; waits if the ring is full."""
        capacity = self.arena.capacity
        if self.at - self.arena.written >= capacity:
            self.flush()
            self.wait_for(self.at - capacity + 1)
        free = capacity - (self.at - self.arena.written)
        position = self.at % capacity
        return position, min(size, free, capacity - position)

    def put_bytes(self, data: bytes) -> None:
        """Put plain bytes."""
        self._put_address(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0, len(data))

    def put(self, data: Tensor, begin: int, size: int) -> None:
        """Put ``size`` bytes of a contiguous tensor, from byte ``begin`` on."""
        if data.device.type == "cpu":
            self._put_address(data.data_ptr() + begin, size)
            return
        source = data.view(-1).view(torch.uint8)[begin : begin + size]
        if self.stream is None:
            self.stream = torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            while len(source):
                position, count = self._room(len(source))
                assert self.pinned is not None, "an arena is registered with the accelerator"
                self.pinned[position : position + count].copy_(source[:count], non_blocking=True)
                source = source[count:]
                self.at += count

    def _put_address(self, address: int, size: int) -> None:
        while size:
            position, count = self._room(size)
            copy(self.base + position, address, count)
            address, size, self.at = address + count, size - count, self.at + count
            if self.stream is None:
                self.arena.staged = self.at

    def flush(self) -> None:
        """Tell the writer of everything put so far, once copies from a device have arrived."""
        if self.stream is not None:
            self.stream.synchronize()
        self.arena.staged = self.at


def pin(arena: Arena) -> Tensor | None:
    """Register the ring with the accelerator, so that it copies straight into it; None without an accelerator."""
    if not torch.cuda.is_available():
        return None
    ring = torch.frombuffer(arena.memory, dtype=torch.uint8, count=arena.capacity, offset=arena.ring_begin)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(ring.data_ptr(), ring.numel(), 0))
    return ring


def unpin(ring: Tensor | None) -> None:
    """Undo :func:`pin`."""
    if ring is not None:
        torch.cuda.cudart().cudaHostUnregister(ring.data_ptr())


_FEW_COPIES = 2
"""So many ranks read the same bytes past the page cache: a read again costs less than the cache's pages and copies."""


def targets_of(shards: Sequence[Shard]) -> tuple[list[Target], list[tuple[Tensor, Tensor]]]:
    """Return targets that fill the shards, and (shard's tensor, host copy) pairs to be copied after the read."""
    targets, copies = [], []
    for shard in shards:
        data = shard.data.detach()
        if data.device.type != "cpu" or not data.is_contiguous():
            host = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.device.type == "cuda")
            copies.append((data, host))
            data = host
        info = TensorInfo(dtype_name(data, shard.key), tuple(shard.global_shape))
        targets.append(Target(shard.key, info, shard.region, _memory_of(data), shared=shard.writers > _FEW_COPIES))
    return targets, copies


def _memory_of(data: Tensor) -> np.ndarray:
    size = data.numel() * data.element_size()
    if not size:
        return np.empty(0, dtype=np.uint8)
    return np.frombuffer((ctypes.c_uint8 * size).from_address(data.data_ptr()), dtype=np.uint8)
