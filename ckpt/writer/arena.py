"""Shared memory between a rank and its writer: a control page, then a ring of bytes that a file flows through.

Byte b of the file lies at ring position b modulo the capacity. The rank stages ahead of the writer by at most the
capacity; the counters of the control page say how far both are. A ring as large as the file never makes the rank wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

from ckpt.storage import ALIGNMENT

CHUNK_BYTES = 4 << 20
"""Bytes that are hashed, written and verified together."""
_STAGED, _WRITTEN, _ABORT, _BEAT = range(4)


class Arena:
    """One mapping of the shared memory. Counters are single aligned 8-byte stores, so they are never torn."""

    def __init__(self, fd: int, capacity: int) -> None:
        """Map ``capacity`` bytes (whole chunks) behind the control page of the file descriptor ``fd``."""
        assert capacity % CHUNK_BYTES == 0
        self.fd, self.capacity = fd, capacity
        self.memory = mmap.mmap(fd, ALIGNMENT + capacity)
        self.view = memoryview(self.memory)
        self.ring = self.view[ALIGNMENT:]
        self.control = self.view[:ALIGNMENT].cast("Q")

    @classmethod
    def create(cls, capacity: int) -> Arena:
        """Make shared memory whose pages are all there already: the first save is as fast as the others.

        Raises:
            OSError, MemoryError: there is not enough memory.
        """
        capacity = -(-max(capacity, 1) // CHUNK_BYTES) * CHUNK_BYTES
        fd = os.memfd_create("ckpt-arena", os.MFD_CLOEXEC)
        os.ftruncate(fd, ALIGNMENT + capacity)
        arena = cls(fd, capacity)
        with contextlib.suppress(OSError):  # the kernel gives shared memory large pages only if told to allow it
            arena.memory.madvise(mmap.MADV_HUGEPAGE)
        ctypes.memset(arena.address, 0, capacity)
        return arena

    @property
    def address(self) -> int:
        """Address of the ring's first byte in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory, ALIGNMENT))

    @property
    def staged_address(self) -> int:
        """Address of the counter ``staged`` in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory, _STAGED * 8))

    def begin(self) -> None:
        """Start a new file: nothing staged, nothing written."""
        self.control[_ABORT] = self.control[_WRITTEN] = self.control[_STAGED] = 0

    @property
    def staged(self) -> int:
        """Bytes of the file that the rank has put into the ring."""
        return self.control[_STAGED]

    @staged.setter
    def staged(self, value: int) -> None:
        self.control[_STAGED] = value

    @property
    def written(self) -> int:
        """Bytes from the start of the file that the writer needs no more."""
        return self.control[_WRITTEN]

    @written.setter
    def written(self, value: int) -> None:
        self.control[_WRITTEN] = value

    @property
    def aborted(self) -> bool:
        """Whether the rank gave this file up."""
        return bool(self.control[_ABORT])

    def abort(self) -> None:
        """Give this file up."""
        self.control[_ABORT] = 1

    @property
    def beat(self) -> int:
        """A number that the writer changes while it is alive and getting on."""
        return self.control[_BEAT]

    def tick(self) -> None:
        """Show progress."""
        self.control[_BEAT] += 1

    def slot(self, begin: int, end: int) -> memoryview:
        """Return the bytes [begin, end) of the file, which must not wrap around; rounded up to whole alignment."""
        at = begin % self.capacity
        return self.ring[at : at + -(-(end - begin) // ALIGNMENT) * ALIGNMENT]

    def close(self) -> None:
        """Give the memory back, as far as nothing else still refers to it."""
        self.control.release()
        self.ring.release()
        self.view.release()
        with contextlib.suppress(BufferError):  # a tensor still looks at it; the last reference frees it
            self.memory.close()
        os.close(self.fd)
