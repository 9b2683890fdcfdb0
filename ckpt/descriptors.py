"""Open files of a step, for reading past the page cache or through it. Torch-free, numpy-free: writers use it too."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from ckpt.errors import CorruptCheckpointError
from ckpt.storage import ALIGNMENT


class Descriptors:
    """Open files of a step, for direct and for cached reads."""

    def __init__(self, folder: Path) -> None:
        """Open nothing yet."""
        self.folder = folder
        self.lock = threading.Lock()
        self.open: dict[tuple[str, bool], int] = {}

    def _get(self, name: str, direct: bool) -> int:
        with self.lock:
            if (name, direct) not in self.open:
                flags = os.O_RDONLY | os.O_NOFOLLOW
                try:
                    fd = os.open(self.folder / name, flags | (os.O_DIRECT if direct else 0))
                except OSError as error:
                    if not direct or error.errno != errno.EINVAL:
                        raise
                    fd = os.open(self.folder / name, flags)
                self.open[name, direct] = fd
            return self.open[name, direct]

    def read(self, name: str, direct: bool, buffer: memoryview, begin: int, size: int) -> None:
        """Read bytes [begin, begin + size) of a file into the start of ``buffer``, which is a little longer.

        Raises:
            CorruptCheckpointError: the file ends before, or cannot be read.
        """
        done = 0
        try:
            while done < size:
                direct = direct and done % ALIGNMENT == 0 and begin % ALIGNMENT == 0
                limit = -(-size // ALIGNMENT) * ALIGNMENT if direct else size
                got = os.preadv(self._get(name, direct), [buffer[done:limit]], begin + done)
                if got == 0:
                    raise CorruptCheckpointError(f"{self.folder / name}: ends at byte {begin + done}")
                done += got
        except OSError as error:
            raise CorruptCheckpointError(
                f"{self.folder / name}: cannot be read at byte {begin + done}: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Close the files."""
        for fd in self.open.values():
            os.close(fd)
