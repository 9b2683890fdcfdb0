"""Where the steps of a run lie on disk, and which of them are complete. Torch-free.

<root>/iter_0000120/           one complete step; it got this name by a rename after everything was written
<root>/iter_0000120.partial/   a save that is under way, or was killed; never loaded, replaced by the next save
"""

from __future__ import annotations

import re
from pathlib import Path

_STEP = re.compile(r"^iter_(\d{7,})$")


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message is for the user: what, where, the remedy."""


def step_dir(root: Path, iteration: int) -> Path:
    """Return the folder of a complete step."""
    return root / f"iter_{iteration:07d}"


def complete_iterations(root: Path) -> list[int]:
    """Return the iterations of the complete steps under ``root``, oldest first; empty if there is no such folder."""
    if not root.is_dir():
        return []
    matches = (_STEP.match(entry.name) for entry in root.iterdir() if (entry / "metadata.json").is_file())
    return sorted(int(match.group(1)) for match in matches if match)


def find_step(path: Path, iteration: int | None = None) -> tuple[Path, int]:
    """Resolve what a user calls a checkpoint: a run folder, its checkpoint folder, or one step.

    Args:
        path: any of the three.
        iteration: the wanted step; None takes the newest complete one.

    Returns:
        The folder that holds the steps, and the iteration.

    Raises:
        CheckpointError: there is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    match = _STEP.match(path.name)
    if match and iteration is None:
        path, iteration = path.parent, int(match.group(1))
    for root in (path, path / "checkpoints"):
        found = complete_iterations(root)
        if iteration in found:
            return root, iteration
        if found and iteration is None:
            return root, found[-1]
        if found:
            raise CheckpointError(f"{root}: no complete step {iteration}; there are {', '.join(map(str, found))}")
    raise CheckpointError(f"{path}: holds no complete checkpoint step (a folder iter_0000000 with metadata.json)")
