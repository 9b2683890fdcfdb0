"""Which steps of a run are kept, and how the others go. Torch-free.

Invariant: nothing is removed unless a newer step that passes :func:`ckpt.steps.check_step` stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt.errors import CheckpointError, CorruptCheckpointError
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

    @property
    def keeps_all(self) -> bool:
        """Whether nothing ever goes."""
        return self.keep_last is self.keep_every is self.keep_best is None

    def keeps_number(self, iteration: int) -> bool:
        """Return whether a step stays for its number alone."""
        return self.keep_every is not None and iteration % self.keep_every == 0

    def kept(self, scores: dict[int, float | None]) -> set[int]:
        """Return the iterations that stay, of all that are there with their scores."""
        newest_first = sorted(scores, reverse=True)
        if self.keeps_all:
            return set(newest_first)
        kept = set(newest_first[: self.keep_last or 0])
        kept.update(filter(self.keeps_number, newest_first))
        scored = sorted((score, -i) for i, score in scores.items() if score is not None)
        kept.update(-i for _, i in scored[: self.keep_best or 0])
        return kept


def _scores(folders: dict[int, Path], retention: Retention) -> dict[int, float | None]:
    """Return the scores of the valid steps among which some may go, reading no more manifests than that takes.

    This runs after every save: steps that stay whatever their manifest says must not make it longer and longer.
    """
    scores: dict[int, float | None] = {}
    if retention.keeps_all:
        return scores
    for iteration in sorted(folders, reverse=True):
        decided = retention.keep_best is None and len(scores) >= (retention.keep_last or 1)
        if decided and retention.keeps_number(iteration):
            continue
        try:
            scores[iteration] = check_step(folders[iteration]).score
        except CorruptCheckpointError:
            continue  # a damaged step is no reason to remove anything, and is left for people to look at
    return scores


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
    scores = _scores(folders, retention)
    if not scores:
        return []
    kept = retention.kept(scores) | {max(scores)}
    going = sorted(set(scores) - kept)
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
