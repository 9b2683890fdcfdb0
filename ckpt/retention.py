"""Which steps of a run are kept, and how the others go. Torch-free.

Invariant: nothing is removed unless a newer step that passes :func:`ckpt.steps.check_step` stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt.errors import CheckpointError, CorruptCheckpointError
from ckpt.manifest import Manifest
from ckpt.steps import OLD, PARTIAL, check_step, step_folders
from ckpt.storage import PosixStorage, Storage


@dataclass(frozen=True)
class Retention:
    """A step stays if any of these wants it. With none of them set everything stays."""

    keep_last: int | None = None
    """The newest steps."""
    keep_every: int | None = None
    """Every step whose iteration is a multiple of this."""
    keep_best: int | None = None
    """The steps of the lowest scores, among those that have one."""

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every", "keep_best"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CheckpointError(f"{name}={value} must be at least 1, or not given")

    def kept(self, scores: dict[int, float | None]) -> set[int]:
        """Return the iterations that stay, of all that are there with their scores."""
        newest_first = sorted(scores, reverse=True)
        if self.keep_last is self.keep_every is self.keep_best is None:
            return set(newest_first)
        kept = set(newest_first[: self.keep_last or 0])
        if self.keep_every:
            kept.update(i for i in newest_first if i % self.keep_every == 0)
        scored = sorted((score, -i) for i, score in scores.items() if score is not None)
        kept.update(-i for _, i in scored[: self.keep_best or 0])
        return kept


def prune(root: Path, retention: Retention, storage: Storage | None = None, dry_run: bool = False) -> list[int]:
    """Remove the steps that ``retention`` does not want; return them. The newest valid step always stays.

    Args:
        root: the folder of the steps.
        retention: what stays.
        storage: does the removing; a POSIX file system if not given.
        dry_run: only say what would go.
    """
    storage = storage or PosixStorage()
    folders = step_folders(root)
    manifests: dict[int, Manifest] = {}
    for iteration, folder in folders.items():
        try:
            manifests[iteration] = check_step(folder)
        except CorruptCheckpointError:
            continue  # a damaged step is no reason to remove anything, and is left for people to look at
    if not manifests:
        return []
    kept = retention.kept({i: m.score for i, m in manifests.items()}) | {max(manifests)}
    going = [iteration for iteration in manifests if iteration not in kept]
    if not dry_run:
        for iteration in going:
            folder = folders[iteration]
            # Out of sight first: a step that is half removed must never look complete.
            doomed = folder.with_name(folder.name.removesuffix(OLD) + ".deleted" + PARTIAL)
            storage.remove_tree(doomed)
            storage.rename(folder, doomed)
            storage.sync_folder(root)
            storage.remove_tree(doomed)
    return going
