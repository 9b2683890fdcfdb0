"""Where the steps of a run lie on disk, and which of them can be used. Torch-free.

<root>/iter_0000120/             a complete step: it got this name by a rename after everything was written and synced
<root>/iter_0000120.old/         the step that a newer save of the same number replaces; counts while that one is absent
<root>/iter_0000120.<id>.partial a save that is under way, was killed, or is being deleted; never loaded
<root>/latest                    number of the newest step, for people and scripts; never believed
"""

from __future__ import annotations

import re
from pathlib import Path

from ckpt.errors import CheckpointError, CorruptCheckpointError
from ckpt.manifest import MANIFEST, Manifest, read_manifest

LATEST, PARTIAL, OLD = "latest", ".partial", ".old"
_STEP = re.compile(r"^iter_(\d{7,})(\.old)?$")
_LEFTOVER = re.compile(r"^iter_(\d{7,})\.([0-9a-f]+)-(\d+)\.partial$")


def step_dir(root: Path, iteration: int) -> Path:
    """Return the folder of a complete step."""
    return root / f"iter_{iteration:07d}"


def old_dir(root: Path, iteration: int) -> Path:
    """Return where a step lies while another save of its number takes its place."""
    return root / f"iter_{iteration:07d}{OLD}"


def partial_dir(root: Path, iteration: int, save_id: str) -> Path:
    """Return where a save gathers its files."""
    return root / f"iter_{iteration:07d}.{save_id}{PARTIAL}"


def is_leftover(name: str, save_id: str) -> bool:
    """Return whether a folder was left by a save before ``save_id`` (session-number), or by another session."""
    if not name.endswith(PARTIAL):
        return False
    match = _LEFTOVER.match(name)
    session, _, number = save_id.rpartition("-")
    return match is None or match.group(2) != session or int(match.group(3)) < int(number)


def partial_saves(root: Path) -> list[tuple[int, str, Path]]:
    """Return (iteration, save_id, folder) of the saves under ``root`` that have no step's name."""
    matches = [_LEFTOVER.match(path.name) for path in root.iterdir()] if root.is_dir() else []
    return [(int(m[1]), f"{m[2]}-{m[3]}", root / m[0]) for m in matches if m]


def step_folders(root: Path) -> dict[int, Path]:
    """Return the complete steps under ``root`` by iteration, oldest first; empty if there is no such folder."""
    if not root.is_dir():
        return {}
    found: dict[int, Path] = {}
    for entry in sorted(root.iterdir(), reverse=True):  # iter_N.old before iter_N, which then replaces it
        match = _STEP.match(entry.name)
        if match and (entry / MANIFEST).is_file():
            found[int(match.group(1))] = entry
    return dict(sorted(found.items()))


def complete_iterations(root: Path) -> list[int]:
    """Return the iterations of the complete steps under ``root``, oldest first."""
    return list(step_folders(root))


def check_step(folder: Path) -> Manifest:
    """Check everything about a step that can be checked without reading its tensors; return its manifest.

    Raises:
        CorruptCheckpointError: the manifest is damaged, a file is missing or has another size.
    """
    manifest = read_manifest(folder)
    for file in manifest.files:
        path = folder / file.name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CorruptCheckpointError(f"{path}: {error.strerror}, the manifest lists it") from None
        if size != file.size:
            raise CorruptCheckpointError(f"{path}: has {size} bytes, {file.size} were written")
    return manifest


def newest_valid(root: Path, iteration: int | None = None) -> Manifest:
    """Return the manifest of the newest step that passes :func:`check_step`, or of ``iteration``.

    Raises:
        CheckpointError: there is no such step, or (CorruptCheckpointError) all are damaged.
    """
    folders = step_folders(root)
    wanted = sorted(folders, reverse=True) if iteration is None else [i for i in folders if i == iteration]
    damage = CheckpointError(f"{root}: holds no complete step{'' if iteration is None else f' {iteration}'}")
    for number in wanted:
        try:
            return check_step(folders[number])
        except CorruptCheckpointError as error:
            damage = error
    raise damage


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
    raise CheckpointError(f"{path}: holds no complete checkpoint step (a folder iter_0000000 with {MANIFEST})")
