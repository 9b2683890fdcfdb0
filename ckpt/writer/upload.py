"""The second tier: from a node's own disk to the storage that all nodes share. Torch-free.

A rank's file is first written below the node-local folder, which frees the arena soon; then its writer copies it here,
in the background, verified on the way, and training may save again meanwhile. What is on the shared storage is removed
from the node's disk. After a crash :mod:`ckpt.tiers` finishes what the writers could not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckpt.descriptors import Descriptors
from ckpt.errors import CorruptCheckpointError
from ckpt.manifest import digest, seal, unseal
from ckpt.steps import is_leftover, partial_saves
from ckpt.storage import ALIGNMENT, PosixStorage, Storage, io_buffer, make_in
from ckpt.writer.record import commit_name, file_name, part_name, read_record


def keep_commit(folder: Path, save_id: str, commit: dict[str, Any], storage: Storage) -> None:
    """Write down how a save is to be committed, so that it can be finished without the rank that began it."""
    text = seal("commit", commit)
    make_in(storage, folder, lambda: storage.write_small(folder / commit_name(save_id), text))


def read_commit(folder: Path, save_id: str) -> dict[str, Any] | None:
    """Return what :func:`keep_commit` wrote, None if it is not there or not whole."""
    path = folder / commit_name(save_id)
    try:
        commit: dict[str, Any] = unseal("commit", path.read_bytes(), path)
    except (OSError, CorruptCheckpointError):
        return None
    return commit


def upload(
    local: Path, rank: int, save_id: str, folder: Path, storage: Storage, tick: Callable[[], None] | None = None
) -> None:
    """Copy a rank's part from the node's disk to ``folder``, durably, and remove it from the node's disk.

    How to commit travels with the first rank's part: the ranks of a node share its folder and copy side by side.

    Args:
        local: the save's folder on this node.
        rank: whose part.
        save_id: which save.
        folder: the save's folder under its temporary name on the shared storage.
        storage: the shared one.
        tick: called after each chunk.

    Raises:
        CorruptCheckpointError: the local file is not what was written.
        OSError: a disk refused.
    """
    record = read_record(local / part_name(rank, save_id))
    name, size = record.file["name"], record.file["bytes"]
    commit = read_commit(local, save_id) if rank == 0 else None
    if commit is not None:
        keep_commit(folder, save_id, commit, storage)
    fd = make_in(storage, folder, lambda: storage.create(folder / name, size))
    try:
        _copy_chunks(local, record.file, fd, storage, tick)
    except BaseException:
        storage.discard(fd)
        raise
    storage.finish(fd, size)
    storage.sync_folder(folder)
    storage.write_small(folder / part_name(rank, save_id), record.to_bytes())
    storage.sync_folder(folder)
    _forget(local, rank, save_id)


def forget_older(local: Path, rank: int, save_id: str) -> None:
    """Remove from the node's disk what a newer save on the shared storage makes useless.

    That is this rank's part of older saves whose copy failed, and everything that other sessions left.

    Args:
        local: folder of this run on the node's disk.
        rank: this rank.
        save_id: the save that is safe.
    """
    for _, other, folder in partial_saves(local):
        if other.split("-")[0] != save_id.split("-")[0]:
            PosixStorage().remove_tree(folder)
        elif is_leftover(folder.name, save_id):
            _forget(folder, rank, other)


def _forget(folder: Path, rank: int, save_id: str) -> None:
    names = [part_name(rank, save_id), file_name(rank), *([commit_name(save_id)] if rank == 0 else [])]
    for name in names:
        with contextlib.suppress(OSError):
            PosixStorage().unlink(folder / name)
    with contextlib.suppress(OSError):
        folder.rmdir()  # the last one does


def _copy_chunks(local: Path, file: dict[str, Any], fd: int, storage: Storage, tick: Callable[[], None] | None) -> None:
    step, size = file["chunk_bytes"], file["bytes"]
    buffer, source = memoryview(io_buffer(step)), Descriptors(local)
    try:
        for index, chunk_hash in enumerate(file["chunks"]):
            begin = index * step
            count = min(step, size - begin)
            source.read(file["name"], True, buffer, begin, count)
            if digest(buffer[:count]) != chunk_hash:
                raise CorruptCheckpointError(f"{local / file['name']}: chunk {index} does not match its hash")
            storage.write_at(fd, buffer[: -(-count // ALIGNMENT) * ALIGNMENT], begin)
            if tick:
                tick()
    finally:
        source.close()
