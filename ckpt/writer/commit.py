"""Make a step out of the parts of all ranks: one manifest, one rename. Runs in the first rank's writer. Torch-free.

The order of the operations is the crash safety; tests/ckpt/test_power_loss.py cuts it everywhere:

    every rank:  data synced -> folder synced -> rank_N.part.json
    first rank:  all parts there and complete -> manifest.json (synced) -> folder synced
                 -> an existing step of this number is renamed to iter_N.old -> rename to iter_N -> root synced
                 -> latest -> what is no longer needed is removed, the parts' records too (until here they let a
                 restart finish the commit)
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt.errors import CheckpointError, CorruptCheckpointError
from ckpt.manifest import FORMAT, MANIFEST, VERSION, Manifest, compact, parse_manifest, seal_text
from ckpt.region import Region, tiling_error
from ckpt.retention import Retention, prune
from ckpt.steps import LATEST, PARTIAL, is_leftover, old_dir, step_dir
from ckpt.storage import Storage
from ckpt.writer.record import Record, commit_name, failure_name, part_name, read_record


@dataclass
class CommitOrder:
    """What the committing writer must know beyond the parts."""

    iteration: int
    save_id: str
    folder: Path
    ranks: list[int]
    """Ranks whose parts make the step."""
    timeout_s: float
    common: Any = None
    layout: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    retention: dict[str, Any] = field(default_factory=dict)
    score: float | None = None
    publish: bool = True
    """Rename the folder to the step's name; False leaves it where it is (its name is the caller's)."""

    @property
    def failure(self) -> Path:
        """What appears in a folder that is not published when the save has failed."""
        return self.folder / f"{self.save_id}.failed"


class Committer:
    """Commits saves one at a time, though several may wait for their parts.

    It remembers which parts it found to make whole tensors, so that equal ones need not be looked at again.
    """

    def __init__(self, storage: Storage) -> None:
        """Commit to ``storage``."""
        self.storage = storage
        self._lock = threading.Lock()
        self._key: Any = None
        self._tensors = b""

    def commit(self, order: CommitOrder) -> Path:
        """Wait for the parts and publish the step; return its folder.

        Raises:
            CheckpointError: a rank failed, took too long, or the parts do not make whole tensors.
            OSError: the disk refused. The folder under the temporary name is removed then.
        """
        try:
            _wait_for_parts(order, self.storage)
            with self._lock:  # or the tidying of a newer save would take the older one's folder
                self._complete(order)
                if not order.publish:
                    _remove_records(order, order.folder, self.storage)
                    return order.folder
                final = _publish(order, self.storage)
                with contextlib.suppress(OSError):  # the step is safe; what follows is convenience
                    _remove_records(order, final, self.storage)
                    _tidy(order, self.storage)
                return final
        except BaseException:
            if order.publish:
                self.storage.remove_tree(order.folder)
            else:
                with contextlib.suppress(OSError):
                    self.storage.write_small(order.failure, b"")
            raise

    def _complete(self, order: CommitOrder) -> None:
        """Write the manifest."""
        records = [_record(order, rank) for rank in order.ranks]
        text = _manifest(order, records, self._checked_tensors(order, records))
        self.storage.write_small(order.folder / MANIFEST, seal_text("manifest", text))
        self.storage.sync_folder(order.folder)

    def _checked_tensors(self, order: CommitOrder, records: list[Record]) -> bytes:
        """Return the table of all tensors as JSON text, if the parts make whole tensors, each element written once."""
        key = [record.key for record in records]
        if key != self._key:
            tensors = compact(_merged(order, records))
            manifest = parse_manifest(json.loads(_manifest(order, records, tensors)), order.folder / MANIFEST)
            check_complete(manifest)
            self._key, self._tensors = key, tensors
        return self._tensors


def _wait_for_parts(order: CommitOrder, storage: Storage) -> None:
    start = time.monotonic()
    while True:
        waited = time.monotonic() - start
        names = set(storage.names(order.folder))
        failed = [rank for rank in order.ranks if failure_name(rank, order.save_id) in names]
        if failed:
            raise CheckpointError(f"rank {failed[0]} could not write its part")
        missing = [rank for rank in order.ranks if part_name(rank, order.save_id) not in names]
        if not missing:
            return
        if waited > order.timeout_s:
            raise CheckpointError(
                f"{len(missing)} of {len(order.ranks)} ranks did not finish within {order.timeout_s:g} s, "
                f"the first of them is rank {missing[0]}"
            )
        time.sleep(min(0.002 + waited / 100, 0.2))


def _record(order: CommitOrder, rank: int) -> Record:
    path = order.folder / part_name(rank, order.save_id)
    record = read_record(path)
    if record.save_id != order.save_id:
        raise CorruptCheckpointError(f"{path}: belongs to save {record.save_id}, not to {order.save_id}")
    return record


def _merged(order: CommitOrder, records: list[Record]) -> dict[str, Any]:
    """Return the table of all tensors; ranks must agree on what they have in common."""
    tensors: dict[str, Any] = {}
    for rank, record in zip(order.ranks, records, strict=True):
        for key, described in json.loads(record.layout.tensors).items():
            if tensors.setdefault(key, described) != described:
                raise CheckpointError(f"rank {rank} describes {key!r} as {described}, another rank as {tensors[key]}")
    return tensors


def _manifest(order: CommitOrder, records: list[Record], tensors: bytes) -> bytes:
    """Return the value of the manifest as JSON text; what is large in it is text already."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": order.iteration,
        "save_id": order.save_id,
        "created": time.time(),
        "world_size": len(order.ranks),
        "layout": order.layout,
        "libraries": order.libraries,
        "common": order.common,
        "score": order.score,
    }
    files = [b'%s,"pieces":%s}' % (compact(record.file)[:-1], record.layout.pieces) for record in records]
    return b'%s,"tensors":%s,"files":[%s]}' % (compact(head)[:-1], tensors, b",".join(files))


def check_complete(manifest: Manifest) -> None:
    """Check that the files hold every element of every tensor exactly once.

    Raises:
        CheckpointError: they do not; names the tensor.
    """
    regions: dict[str, list[Region]] = {key: [] for key in manifest.tensors}
    for file in manifest.files:
        for piece in file.pieces:
            regions[piece.key].append(piece.region)
    for key, info in manifest.tensors.items():
        error = tiling_error(regions[key], info.shape)
        if error:
            raise CheckpointError(
                f"tensor {key!r} of shape {info.shape} ({math.prod(info.shape)} elements): {error}; the ranks do not "
                "describe their shards consistently (replica_id, writers, offsets)"
            )


def _publish(order: CommitOrder, storage: Storage) -> Path:
    root = order.folder.parent
    final, old = step_dir(root, order.iteration), old_dir(root, order.iteration)
    if final.name in storage.names(root):
        storage.remove_tree(old)
        storage.rename(final, old)
    storage.rename(order.folder, final)
    storage.sync_folder(root)
    return final


def _remove_records(order: CommitOrder, folder: Path, storage: Storage) -> None:
    """Remove what only the commit needs."""
    done = {part_name(rank, order.save_id) for rank in order.ranks} | {commit_name(order.save_id)}
    for name in storage.names(folder):
        if name in done:
            storage.unlink(folder / name)


def _tidy(order: CommitOrder, storage: Storage) -> None:
    root = order.folder.parent
    storage.write_small(root / LATEST, f"{order.iteration}\n".encode())
    storage.sync_folder(root)
    storage.remove_tree(old_dir(root, order.iteration))
    for name in storage.names(root):
        if is_leftover(name, order.save_id) and name.endswith(PARTIAL):
            storage.remove_tree(root / name)
    prune(root, Retention(**order.retention), storage)
