"""Writes one `.bin`/`.idx` pair and its sidecar so that nobody ever sees half of it.

Everything goes to hidden temporary names in the target folder, is synced to disk, and is then renamed:
sidecar, `.bin`, and last `.idx`, without which no reader takes the data for data. When a pair is replaced,
its old `.idx` goes first. So a kill leaves the old pair, the new pair, or no visible pair; the next run
clears what it left.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_zaya.data.errors import DataError
from megatron_zaya.data.index_file import bin_path, idx_path, read_sidecar, sidecar_path


class PairWriter:
    """A context manager: `add` documents, then `commit`; leaving without a commit leaves no trace.

    One writer at a time per prefix (an advisory lock on file systems that have them). Raises DataError when
    the prefix is taken and `overwrite` is false, when another process is writing it, or when the folder is
    not writable.
    """

    def __init__(self, prefix: Path, dtype: type[np.integer[Any]], *, overwrite: bool = False) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.documents = 0
        self.tokens = 0
        self._overwrite = overwrite
        self._digest = hashlib.sha256()
        self._made_folders: list[Path] = []
        self._lock: IO[bytes] | None = None
        self._builder: Any = None

    def __enter__(self) -> PairWriter:
        refuse_existing(self.prefix, self._overwrite)
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        try:
            self._make_folder(self.prefix.parent)
            self._lock = self._acquire_lock()
            refuse_existing(self.prefix, self._overwrite)  # the holder of the lock may have just finished
            self._remove_temporaries()
            self._builder = IndexedDatasetBuilder(str(self._temporary("bin")), dtype=self.dtype)
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise DataError(
                    f"the output cannot be written: {error.strerror}",
                    where=self.prefix.parent,
                    remedy="Choose a folder that you may write to",
                ) from error
            raise
        return self

    def add(self, tokens: np.ndarray, lengths: list[int]) -> None:
        """Append `len(lengths)` documents: `tokens` `[sum(lengths)]`, of the writer's dtype."""
        if lengths and max(lengths) > np.iinfo(np.int32).max:
            raise DataError("a document has more tokens than an index can hold", value=max(lengths), remedy="Cut it up")
        self._digest.update(tokens)
        start = 0
        for length in lengths:
            self._builder.add_document(tokens[start : start + length], [length])
            start += length
        self.documents += len(lengths)
        self.tokens += start

    def commit(self, description: dict[str, Any]) -> None:
        """Make the pair visible. `description` completes the sidecar. On return all of it is on disk."""
        self._builder.finalize(str(self._temporary("idx")))
        self._builder = None
        bin_sha256 = self._digest.hexdigest()
        sidecar = {
            **description,
            "documents": self.documents,
            "tokens": self.tokens,
            "bin_sha256": bin_sha256,
        }
        self._temporary("json").write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
        for ending in ("bin", "idx", "json"):
            _sync(self._temporary(ending))
        with contextlib.suppress(FileNotFoundError):
            idx_path(self.prefix).unlink()
        _sync(self.prefix.parent)
        self._temporary("json").replace(sidecar_path(self.prefix))
        self._temporary("bin").replace(bin_path(self.prefix))
        _sync(self.prefix.parent)  # the .idx must not reach the disk before what it vouches for
        self._temporary("idx").replace(idx_path(self.prefix))
        _sync(self.prefix.parent)
        self._made_folders.clear()

    def __exit__(self, *_exception: object) -> None:
        if self._builder is not None:
            self._builder.data_file.close()
        self._remove_temporaries()
        self._release()

    def _temporary(self, ending: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}.{ending}.tmp")

    def _remove_temporaries(self) -> None:
        for ending in ("bin", "idx", "json"):
            self._temporary(ending).unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made_folders = missing

    def _acquire_lock(self) -> IO[bytes]:
        path = self.prefix.with_name(f".{self.prefix.name}.lock")
        while True:
            lock = path.open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.close()
                raise DataError(
                    "another process is writing this output",
                    where=self.prefix,
                    remedy="Wait for it, or end it",
                ) from error
            except OSError:
                pass  # a file system without locks: go on, the renames still keep the output whole
            # The previous holder may have removed the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    return lock
            lock.close()

    def _release(self) -> None:
        if self._lock is not None:
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        for folder in self._made_folders:
            with contextlib.suppress(OSError):  # somebody else put something there meanwhile
                folder.rmdir()
        self._made_folders.clear()


def refuse_existing(prefix: Path, overwrite: bool) -> None:
    """Raise DataError when writing `prefix` would destroy data and `overwrite` is false.

    A `.bin` without `.idx` beside our own sidecar is what a kill in the last moment left, and is no data.
    """
    if overwrite:
        return
    remains = bin_path(prefix).exists() and read_sidecar(prefix) is not None and not idx_path(prefix).exists()
    taken = [path for path in (idx_path(prefix), bin_path(prefix)) if path.exists() and not remains]
    if not taken and sidecar_path(prefix).exists() and read_sidecar(prefix) is None:
        taken = [sidecar_path(prefix)]  # a .json of the user's own
    if taken:
        raise DataError(
            "the output is already there",
            where=taken[0],
            remedy="Choose another prefix, or allow to overwrite it",
        )


def _sync(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
