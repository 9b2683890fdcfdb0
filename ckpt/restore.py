"""Loading on all ranks together: agree on a step, read, agree on the outcome, fall back to an older step if need be."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import ProcessGroup

from ckpt.errors import CheckpointError, CorruptCheckpointError
from ckpt.manifest import Manifest
from ckpt.memory import collector_off, targets_of
from ckpt.reader import check_targets, read
from ckpt.shard import Shard
from ckpt.steps import check_step, step_folders

logger = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """What a load did on this rank."""

    iteration: int
    folder: Path
    common: Any
    """The JSON value that was saved beside the tensors."""
    layout: dict[str, Any]
    """The layout that wrote the step."""
    tensors: int = 0
    """Shards filled."""
    bytes_loaded: int = 0
    bytes_read: int = 0
    """From storage: whole chunks."""
    missing: list[str] = field(default_factory=list)
    """Asked for by this rank, not in the step."""
    unexpected: list[str] = field(default_factory=list)
    """In the step, asked for by no rank."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Newer steps that are damaged, and why."""
    seconds: float = 0.0

    def summary(self) -> str:
        """Return one line for people."""
        text = (
            f"{self.folder}: {self.tensors} tensors, {self.bytes_loaded / 1e9:.2f} GB loaded and verified in "
            f"{self.seconds:.2f} s, {len(self.missing)} missing, {len(self.unexpected)} unexpected"
        )
        return text + "".join(f"; step {i} passed over: {why}" for i, why in self.skipped.items())


@collector_off()
def load_newest(
    root: Path,
    group: ProcessGroup | None,
    shards: Sequence[Shard],
    iteration: int | None,
    partial: bool,
    optional: str | None,
) -> LoadReport:
    """See :meth:`ckpt.checkpointer.Checkpointer.load`."""
    start = time.monotonic()
    candidates = everyone(group, step_folders(root))[0]
    if not candidates:
        raise CheckpointError(f"{root}: holds no complete step")
    if iteration is not None and iteration not in candidates:
        raise CheckpointError(f"{root}: no complete step {iteration}; there are {', '.join(map(str, candidates))}")
    order = sorted(candidates, reverse=True) if iteration is None else [iteration]
    skipped: dict[int, str] = {}
    for number in order:
        outcome = _attempt(candidates[number], group, shards, partial, optional)
        failures = [one for one in everyone(group, outcome if isinstance(outcome, Exception) else None) if one]
        if not failures:
            assert isinstance(outcome, LoadReport)
            outcome.skipped, outcome.seconds = skipped, time.monotonic() - start
            return outcome
        for failure in failures:
            if number == order[-1] or not isinstance(failure, CorruptCheckpointError):
                raise failure
        skipped[number] = str(failures[0])
        logger.error("CHECKPOINT %d IS DAMAGED, falling back to an older one: %s", number, failures[0])
    raise AssertionError("the last step returns or raises")


def _attempt(
    folder: Path, group: ProcessGroup | None, shards: Sequence[Shard], partial: bool, optional: str | None
) -> LoadReport | CheckpointError:
    """Load one step on this rank; an error is returned, not raised, because the others must hear of it."""
    manifest: Manifest | None = None
    error: CheckpointError | None = None
    try:
        manifest = check_step(folder)
    except CheckpointError as problem:
        error = problem
    unexpected = _unasked(group, manifest, shards)
    if error is not None or manifest is None:
        return error or CheckpointError(f"{folder}: no manifest")
    left_over = [key for key in unexpected if not _is_optional(key, optional)]
    if left_over and not partial:
        return CheckpointError(f"{folder}: holds {_some(left_over)}, which nobody asks for; is this another model?")
    missing = sorted({shard.key for shard in shards} - set(manifest.tensors))
    lacking = [key for key in missing if not _is_optional(key, optional)]
    if lacking:
        return CheckpointError(f"{folder}: lacks {_some(lacking)}; is this another model?")
    wanted = [shard for shard in shards if shard.key in manifest.tensors]
    report = LoadReport(manifest.iteration, folder, manifest.common, manifest.layout)
    report.missing, report.unexpected = missing, unexpected
    try:
        targets, copies = targets_of(wanted)
        check_targets(manifest, targets, folder)
        moved = read(folder, manifest, targets, first_file=rank_in(group))
    except CheckpointError as problem:
        return problem
    for destination, host in copies:
        destination.copy_(host)
    report.tensors, report.bytes_loaded, report.bytes_read = len(wanted), moved.bytes_wanted, moved.bytes_read
    return report


def _is_optional(key: str, optional: str | None) -> bool:
    return optional is not None and key.startswith(optional)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _unasked(group: ProcessGroup | None, manifest: Manifest | None, shards: Sequence[Shard]) -> list[str]:
    """Return the tensors of the step that no rank asks for. One bit per tensor and rank is exchanged."""
    asked = {shard.key for shard in shards}
    keys = sorted(manifest.tensors) if manifest else []
    mine = np.packbits([key in asked for key in keys]) if keys else np.empty(0, dtype=np.uint8)
    theirs = [bits for bits in everyone(group, mine) if len(bits) == len(mine)]  # another length: found no manifest
    every = np.unpackbits(np.bitwise_or.reduce(theirs), count=len(keys))
    return [keys[number] for number in np.flatnonzero(every == 0)]


def _distributed() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def rank_in(group: ProcessGroup | None) -> int:
    """Return this process's number in the group."""
    return torch.distributed.get_rank(group) if _distributed() else 0


def everyone(group: ProcessGroup | None, value: Any) -> list[Any]:
    """Return the value of every rank, in order."""
    if not _distributed() or torch.distributed.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values
