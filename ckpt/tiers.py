"""After a crash: complete, on the shared storage, the newest save that had reached the nodes' own disks.

A save counts as recoverable if every rank's part is either on the shared storage already or on the disk of a node that
is in the job again, and somebody has the commit's order. Parts are copied (verified), the step is committed as if
nothing had happened, and then any layout can load it. If a node is lost with its part, the step before is the newest.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from ckpt.errors import CheckpointError
from ckpt.restore import everyone, rank_in
from ckpt.steps import complete_iterations, partial_dir, partial_saves
from ckpt.storage import PosixStorage
from ckpt.writer.commit import CommitOrder, Committer
from ckpt.writer.record import read_record
from ckpt.writer.upload import read_commit, upload

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A save without a step's name, as one process sees it."""

    iteration: int
    save_id: str
    ranks: frozenset[int]
    """Whose parts are whole."""
    commit: dict[str, Any] | None
    """How to commit it; None if that is not here."""
    shared: bool
    """On the shared storage."""


@dataclass(frozen=True)
class Rescue:
    """A save that can be completed."""

    iteration: int
    save_id: str
    commit: dict[str, Any]
    uploads: dict[int, int]
    """Part -> number of the process that copies it."""


def found_under(root: Path, shared: bool) -> list[Found]:
    """Return the unfinished saves under a folder."""
    found = []
    for iteration, save_id, folder in partial_saves(root):
        ranks = set()
        for path in folder.glob(f"rank_*.{save_id}.part.json"):
            try:
                read_record(path)
            except (OSError, ValueError):
                continue  # cut off by the crash: as if it were not there
            ranks.add(int(path.name.split(".")[0].removeprefix("rank_")))
        found.append(Found(iteration, save_id, frozenset(ranks), read_commit(folder, save_id), shared))
    return found


def rescues(seen: Sequence[Sequence[Found]], newest: int) -> list[Rescue]:
    """Return what can be completed and is newer than ``newest``, the newest first; parts are spread over processes.

    Args:
        seen: for each process, what it found on its node and (the first one) on the shared storage.
        newest: the newest complete step.
    """
    saves = {(f.iteration, f.save_id) for found in seen for f in found if f.iteration > newest}
    possible = []
    for iteration, save_id in sorted(saves, reverse=True):
        here = [(number, f) for number, found in enumerate(seen) for f in found if f.save_id == save_id]
        commit_order = next((f.commit for _, f in here if f.commit is not None), None)
        if commit_order is None:
            continue
        safe = {rank for _, f in here if f.shared for rank in f.ranks}
        uploads: dict[int, int] = {}
        for rank in set(commit_order["ranks"]) - safe:
            holders = [number for number, f in here if not f.shared and rank in f.ranks]
            if holders:
                uploads[rank] = holders[rank % len(holders)]
        if safe | set(uploads) >= set(commit_order["ranks"]):
            possible.append(Rescue(iteration, save_id, commit_order, uploads))
    return possible


def recover(root: Path, local: Path, group: ProcessGroup | None = None) -> int | None:
    """Complete the newest save that is newer than every step under ``root``; return its iteration. Collective.

    Args:
        root: folder of the steps, shared by all ranks.
        local: the run's folder on this node's own disk.
        group: the ranks; None is the world.

    Returns:
        None if there was nothing to do, or nothing that can be completed.
    """
    me = rank_in(group)
    seen = found_under(local, shared=False) + (found_under(root, shared=True) if me == 0 else [])
    newest = max(complete_iterations(root), default=-1)
    gathered = everyone(group, (newest, seen))
    for rescue in rescues([found for _, found in gathered], gathered[0][0]):
        error = _complete(rescue, root, local, me, group)
        if error is None:
            logger.warning("step %d lay on the nodes' disks only; it is complete now", rescue.iteration)
            if me == 0:
                shutil.rmtree(partial_dir(local, rescue.iteration, rescue.save_id), ignore_errors=True)
            return rescue.iteration
        logger.error("step %d on the nodes' disks cannot be completed: %s", rescue.iteration, error)
    return None


def _complete(rescue: Rescue, root: Path, local: Path, me: int, group: ProcessGroup | None) -> str | None:
    """Copy what is missing and commit; return what went wrong anywhere."""
    source = partial_dir(local, rescue.iteration, rescue.save_id)
    target, storage, error = partial_dir(root, rescue.iteration, rescue.save_id), PosixStorage(), None
    try:
        for rank, number in rescue.uploads.items():
            if number == me:
                upload(source, rank, rescue.save_id, target, storage)
    except (OSError, CheckpointError) as problem:
        error = str(problem)
    failed: list[str] = [e for e in everyone(group, error) if e]
    if failed:
        return failed[0]
    if me == 0:
        try:
            order = rescue.commit | {"folder": target, "save_id": rescue.save_id, "timeout_s": 0.0}
            Committer(storage).commit(CommitOrder(**order))
        except (OSError, CheckpointError) as problem:
            error = str(problem)
    outcome: str | None = everyone(group, error)[0]
    return outcome
