"""Steps of our checkpoints: read any run of elements of a weight, whatever layout wrote it, and plan new ones."""

from __future__ import annotations

import math
import platform
import secrets
import time
from pathlib import Path
from typing import Any

from ckpt.errors import CheckpointError
from ckpt.manifest import FileInfo, Manifest, digest, manifest_bytes
from ckpt.random_access import StepReader
from ckpt.rankfile import Part, plan_file
from ckpt.region import Region
from ckpt.steps import LATEST, check_step, find_step, step_dir, step_folders
from ckpt.storage import POSIX, load_storage
from ckpt.writer.arena import CHUNK_BYTES
from ckpt.writer.commit import check_complete
from megatron_zaya.convert.output import Progress, write_files
from megatron_zaya.convert.safetensors_files import PlannedFile
from megatron_zaya.convert.weights import Bytes, Weights

STATE = ("optimizer.", "balancing.", "rng.")
"""What a job saves beside its weights."""


class StepWeights:
    """The weights of a step, or all of its tensors."""

    def __init__(self, path: Path, iteration: int | None = None, with_state: bool = False) -> None:
        """Open a step.

        Args:
            path: a run folder, its checkpoint folder, or a step.
            iteration: which step; None is the newest.
            with_state: optimizer, balancing and random state too.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        root, iteration = find_step(path, iteration)
        self.folder = step_folders(root)[iteration]
        self.where = str(self.folder)
        self.manifest = check_step(self.folder)
        stored = self.manifest.tensors.items()
        self.tensors = {key: info for key, info in stored if with_state or not key.startswith(STATE)}
        self._reader = StepReader(self.folder, self.manifest, self.tensors)

    @property
    def config(self) -> dict[str, Any]:
        """The run configuration that was saved with it."""
        common = self.manifest.common
        if not isinstance(common, dict) or "config" not in common:
            raise CheckpointError(f"{self.folder}: no run configuration was saved with it; is this a training step?")
        config: dict[str, Any] = common["config"]
        return config

    def read(self, name: str, start: int, out: Bytes) -> None:
        """Fill ``out`` with elements of a tensor, from element ``start`` on."""
        self._reader.read(name, start, out)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def write_step(
    root: Path,
    weights: Weights,
    common: dict[str, Any],
    workers: int,
    max_file_bytes: int,
    progress: Progress,
    iteration: int = 0,
) -> Path:
    """Write a step into the empty folder ``root``, as one rank per file would have; return the step's folder."""
    folder = step_dir(root, iteration)
    folder.mkdir()
    save_id = f"{secrets.token_hex(4)}-1"
    plans = [plan_file(parts, rank) for rank, parts in enumerate(_ranks(weights, max_file_bytes))]
    files = [
        PlannedFile(
            f"rank_{rank:05d}.safetensors",
            plan.header(iteration, save_id),
            [(piece.key, piece.region.start, piece.begin) for piece in plan.pieces],
            plan.size,
        )
        for rank, plan in enumerate(plans)
    ]
    chunks: dict[str, dict[int, str]] = {file.name: {} for file in files}

    def note(file: str, chunk: int, data: Bytes) -> None:
        chunks[file][chunk] = digest(data.data)

    write_files(folder, files, weights, workers, progress, note)
    manifest = Manifest(
        iteration=iteration,
        save_id=save_id,
        created=time.time(),
        tensors=dict(weights.tensors),
        files=[
            FileInfo(f.name, f.size, CHUNK_BYTES, [chunks[f.name][i] for i in range(len(chunks[f.name]))], plan.pieces)
            for f, plan in zip(files, plans, strict=True)
        ],
        common=common,
        libraries={"python": platform.python_version()},
        world_size=len(files),
    )
    check_complete(manifest)
    storage = load_storage(POSIX)
    storage.write_small(folder / "manifest.json", manifest_bytes(manifest))
    storage.sync_folder(folder)
    storage.write_small(root / LATEST, f"{iteration}\n".encode())
    return folder


def _ranks(weights: Weights, max_file_bytes: int) -> list[list[Part]]:
    """Spread the tensors over files, in their order."""
    ranks: list[list[Part]] = [[]]
    used = 0
    for name, info in weights.tensors.items():
        numel = math.prod(info.shape)
        if ranks[-1] and used + numel * info.item_bytes > max_file_bytes:
            ranks.append([])
            used = 0
        region = Region((0,) * len(info.shape), info.shape, 0, numel)
        ranks[-1].append(Part(name, info.dtype, info.shape, region))
        used += numel * info.item_bytes
    return ranks
