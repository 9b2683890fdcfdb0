"""Make a step out of the parts of all ranks: one manifest, one rename. Runs in the first rank's writer. Torch-free.

The order of the operations is the crash safety; tests/ckpt/test_power_loss.py cuts it everywhere:

    every rank:  data synced -> rank_N.part.json (synced) -> folder synced
    first rank:  all parts there and complete -> manifest.json (synced) -> folder synced
                 -> an existing step of this number is renamed to iter_N.old -> rename to iter_N -> root synced
                 -> latest -> what is no longer needed is removed
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt.errors import CheckpointError, CorruptCheckpointError
from ckpt.manifest import FORMAT, MANIFEST, VERSION, Manifest, parse_manifest, seal, unseal
from ckpt.region import Region, tiling_error
from ckpt.retention import Retention, prune
from ckpt.steps import LATEST, PARTIAL, is_leftover, old_dir, step_dir
from ckpt.storage import Storage
from ckpt.writer.part import failure_name, part_name


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
    node: str | None = None
    score: float | None = None
    publish: bool = True
    """Rename the folder to the step's name; False leaves it where it is (its name is the caller's)."""

    @property
    def failure(self) -> Path:
        """What appears in a folder that is not published when the save has failed."""
        return self.folder / f"{self.save_id}.failed"


def commit(order: CommitOrder, storage: Storage) -> Path:
    """Wait for the parts and publish the step; return its folder.

    Raises:
        CheckpointError: a rank failed, took too long, or the parts do not make whole tensors.
        OSError: the disk refused. The folder under the temporary name is removed then.
    """
    try:
        _wait_for_parts(order, storage)
        storage.write_small(order.folder / MANIFEST, seal("manifest", _merge(order)))
        for rank in order.ranks:
            storage.unlink(order.folder / part_name(rank, order.save_id))
        storage.sync_folder(order.folder)
        if not order.publish:
            return order.folder
        final = _publish(order, storage)
    except BaseException:
        if order.publish:
            storage.remove_tree(order.folder)
        else:
            with contextlib.suppress(OSError):
                storage.write_small(order.failure, b"")
        raise
    with contextlib.suppress(OSError):  # the step is safe; what follows is convenience
        _tidy(order, storage)
    return final


def _wait_for_parts(order: CommitOrder, storage: Storage) -> None:
    deadline, pause = time.monotonic() + order.timeout_s, 0.002
    while True:
        names = set(storage.names(order.folder))
        failed = [rank for rank in order.ranks if failure_name(rank, order.save_id) in names]
        if failed:
            raise CheckpointError(f"rank {failed[0]} could not write its part")
        missing = [rank for rank in order.ranks if part_name(rank, order.save_id) not in names]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{len(missing)} of {len(order.ranks)} ranks did not finish within {order.timeout_s:g} s, "
                f"the first of them is rank {missing[0]}"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)


def _merge(order: CommitOrder) -> dict[str, Any]:
    """Return the JSON value of the manifest; the parts must make whole tensors, each element written once."""
    tensors: dict[str, Any] = {}
    files = []
    for rank in order.ranks:
        path = order.folder / part_name(rank, order.save_id)
        part = unseal("part", path.read_bytes(), path)
        if part["save_id"] != order.save_id:
            raise CorruptCheckpointError(f"{path}: belongs to save {part['save_id']}, not to {order.save_id}")
        for key, record in part["tensors"].items():
            if tensors.setdefault(key, record) != record:
                raise CheckpointError(f"rank {rank} describes {key!r} as {record}, another rank as {tensors[key]}")
        files.append(part["file"])
    value = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": order.iteration,
        "save_id": order.save_id,
        "created": time.time(),
        "world_size": len(order.ranks),
        "node": order.node,
        "layout": order.layout,
        "libraries": order.libraries,
        "common": order.common,
        "score": order.score,
        "tensors": tensors,
        "files": files,
    }
    manifest = parse_manifest(value, order.folder / MANIFEST)
    if order.node is None:
        check_complete(manifest)
    return value


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


def _tidy(order: CommitOrder, storage: Storage) -> None:
    root = order.folder.parent
    storage.write_small(root / LATEST, f"{order.iteration}\n".encode())
    storage.sync_folder(root)
    storage.remove_tree(old_dir(root, order.iteration))
    for name in storage.names(root):
        if is_leftover(name, order.save_id) and name.endswith(PARTIAL):
            storage.remove_tree(root / name)
    prune(root, Retention(**order.retention), storage)
