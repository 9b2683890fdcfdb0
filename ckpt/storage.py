"""File operations of checkpoints: a small protocol, and POSIX file systems (local disks, NFS, Lustre). Torch-free.

Invariant: every system call that changes the disk goes through :meth:`PosixStorage.call`, so that a subclass can
trace, delay or break each of them. The writer process makes its storage from a name, see :func:`load_storage`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
ALIGNMENT = 4096
"""Bytes; what direct input and output asks of addresses, offsets and lengths."""

LARGE_PAGE = 2 << 20
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def io_buffer(size: int) -> mmap.mmap:
    """Return at least ``size`` bytes for direct input and output, in large pages where the kernel gives them.

    The kernel pins and maps every page of a direct transfer; a chunk in small pages is a thousand of them.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory gets no large pages by default
    buffer = mmap.mmap(-1, -(-size // LARGE_PAGE) * LARGE_PAGE, flags=private)
    with contextlib.suppress(OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


class Storage(Protocol):
    """What a checkpoint needs of a place to lie in. Everything blocks, and raises OSError."""

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents; it may be there already."""

    def create(self, path: Path, size: int) -> int:
        """Create a file with room for ``size`` bytes; return its descriptor."""

    def write_at(self, fd: int, data: memoryview, offset: int) -> None:
        """Write aligned data at an aligned offset."""

    def finish(self, fd: int, size: int) -> None:
        """Cut the file to ``size``, make it durable and close it."""

    def discard(self, fd: int) -> None:
        """Close a file that will not be used; never fails."""

    def write_small(self, path: Path, data: bytes, durable: bool = True) -> None:
        """Write a file at once: complete whenever its name is there, and safe from a power loss if ``durable``."""

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file or folder; an existing file is replaced, an existing folder is not."""

    def sync_folder(self, path: Path) -> None:
        """Make creations and renames in a folder durable."""

    def unlink(self, path: Path) -> None:
        """Remove a file."""

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that it holds, as far as possible; never fails."""

    def names(self, path: Path) -> list[str]:
        """Return the entries of a folder, sorted; none if it is not there."""


def make_in(storage: Storage, folder: Path, make: Callable[[], T]) -> T:
    """Return what ``make`` makes in ``folder``, which is created before.

    Another rank of the node that is done with a save may remove the folder, still empty, in between; then again.

    Raises:
        OSError: the disk refused, or the folder vanished time and again.
    """
    for _ in range(_ATTEMPTS):
        storage.make_folder(folder)
        with contextlib.suppress(FileNotFoundError):
            return make()
    return make()


_ATTEMPTS = 10


def _fallocate(fd: int, size: int) -> None:
    """Reserve room on the disk. Not posix_fallocate, which writes zeros where the file system cannot reserve."""
    if _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code not in _NOT_SUPPORTED:
            raise OSError(code, os.strerror(code))


_libc = ctypes.CDLL(None, use_errno=True)


class PosixStorage:
    """A folder of a POSIX file system. Large files are written past the page cache where that is possible."""

    def call(self, name: str, function: Callable[..., T], *arguments: Any) -> T:
        """Make one system call that changes the disk."""
        return function(*arguments)

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents; it may be there already."""
        if not path.is_dir():
            self.make_folder(path.parent)
            with contextlib.suppress(FileExistsError):
                self.call("mkdir", os.mkdir, path)

    def create(self, path: Path, size: int) -> int:
        """Create a file with room for ``size`` bytes, or fail before a byte is written."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            fd = self.call("create", os.open, path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            fd = self.call("create", os.open, path, flags, 0o644)
        try:
            self.call("fallocate", _fallocate, fd, -(-size // ALIGNMENT) * ALIGNMENT)
        except BaseException:
            self.discard(fd)
            raise
        return fd

    def write_at(self, fd: int, data: memoryview, offset: int) -> None:
        """Write all of ``data`` (aligned, as its offset)."""
        while len(data):
            try:
                written = self.call("pwrite", os.pwrite, fd, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not _leave_direct(fd):
                    raise
                continue
            data, offset = data[written:], offset + written
            if written % ALIGNMENT:
                _leave_direct(fd)

    def finish(self, fd: int, size: int) -> None:
        """Cut the file to ``size``, make it durable and close it."""
        try:
            self.call("ftruncate", os.ftruncate, fd, size)
            self.call("fsync", os.fsync, fd)
        finally:
            self.discard(fd)

    def discard(self, fd: int) -> None:
        """Close a file that will not be used."""
        with contextlib.suppress(OSError):
            os.close(fd)

    def write_small(self, path: Path, data: bytes, durable: bool = True) -> None:
        """Write under a temporary name, sync, rename."""
        temporary = path.with_name(path.name + ".tmp")
        fd = self.call("create", os.open, temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            rest = memoryview(data)
            while len(rest):
                rest = rest[self.call("write", os.write, fd, rest) :]
            if durable:
                self.call("fsync", os.fsync, fd)
        finally:
            self.discard(fd)
        self.call("rename", os.replace, temporary, path)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file or folder."""
        self.call("rename", os.rename, old, new)

    def sync_folder(self, path: Path) -> None:
        """Make creations and renames in a folder durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.call("fsync", os.fsync, fd)
        finally:
            self.discard(fd)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        self.call("unlink", os.unlink, path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that it holds, as far as possible."""
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(path)):
                if entry.is_dir(follow_symlinks=False):
                    self.remove_tree(Path(entry.path))
                else:
                    self.unlink(Path(entry.path))
            self.call("rmdir", os.rmdir, path)

    def names(self, path: Path) -> list[str]:
        """Return the entries of a folder, sorted; none if it is not there."""
        try:
            return sorted(entry.name for entry in path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def _leave_direct(fd: int) -> bool:
    """Go on through the page cache where the file system refuses direct writes; False if the file already does."""
    import fcntl

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & os.O_DIRECT:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return True


POSIX = "ckpt.storage:PosixStorage"


def load_storage(name: str, options: dict[str, Any] | None = None) -> Storage:
    """Make the storage that ``module:factory`` names; ``options`` are its keyword arguments."""
    module, _, factory = name.partition(":")
    storage: Storage = getattr(importlib.import_module(module), factory)(**options or {})
    return storage
