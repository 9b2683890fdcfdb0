"""Shared memory between a rank and its writer: a control page, then a ring of bytes that a file flows through.

Byte b of the file lies at ring position b modulo the capacity. The rank stages ahead of the writer by at most the
capacity; the counters of the control page say how far both are. A ring as large as the file never makes the rank wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

from ckpt.storage import ALIGNMENT, LARGE_PAGE

CHUNK_BYTES = 4 << 20
"""Bytes that are hashed, written and verified together."""
_STAGED, _WRITTEN, _ABORT, _BEAT = range(4)
_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25
"""Linux's numbers; Python's mmap module does not name them."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def map_at_large_page(fd: int, size: int) -> tuple[mmap.mmap, int]:
    """Map a shared file; return the memory and where in it the file begins: at the start of a large page.

    Only there can one entry of the page table stand for a large page of the file. The kernel finds such an address for
    shared memory only if told to give it large pages by default, so more is reserved, and the file mapped into that.
    """
    memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    reserved = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    begin = -reserved % LARGE_PAGE
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if _libc.mmap(reserved + begin, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != reserved + begin:
        raise OSError(ctypes.get_errno(), f"cannot map {size} bytes of shared memory")
    return memory, begin


class Arena:
    """One mapping of the shared memory. Counters are single aligned 8-byte stores, so they are never torn."""

    def __init__(self, fd: int, capacity: int) -> None:
        """Map ``capacity`` bytes (whole chunks) behind the control page of the file descriptor ``fd``."""
        assert capacity % CHUNK_BYTES == 0
        self.fd, self.capacity = fd, capacity
        self.memory, begin = map_at_large_page(fd, ALIGNMENT + capacity)
        self.ring_begin = begin + ALIGNMENT
        self.view = memoryview(self.memory)[begin : self.ring_begin + capacity]
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
        arena._fill()
        return arena

    def _fill(self) -> None:
        """Make all pages be there, large ones where the kernel can.

        Linux 6.1 and later join the small pages of a large one when asked to; one is enough, what is not there becomes
        zero. Older ones give shared memory large pages only where `shmem_enabled` allows it.
        """
        range_of_file = self.ring_begin - ALIGNMENT, len(self.view)
        with contextlib.suppress(OSError):
            self.memory.madvise(mmap.MADV_HUGEPAGE, *range_of_file)
        self.view[::LARGE_PAGE] = bytes(len(self.view[::LARGE_PAGE]))
        with contextlib.suppress(OSError):
            self.memory.madvise(_MADV_COLLAPSE, *range_of_file)
        ctypes.memset(self.address, 0, self.capacity)

    @property
    def address(self) -> int:
        """Address of the ring's first byte in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory, self.ring_begin))

    @property
    def staged_address(self) -> int:
        """Address of the counter ``staged`` in this process."""
        return self.address - ALIGNMENT + _STAGED * 8

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
