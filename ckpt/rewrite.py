"""Write a step again with another number of files, without torch and without the job: the bytes of tensors stay."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ckpt.errors import CheckpointError
from ckpt.manifest import Manifest, digest, piece_record, tensor_records
from ckpt.rankfile import FilePlan, Part, plan_file
from ckpt.reader import read
from ckpt.region import Region
from ckpt.steps import check_step, partial_dir, step_dir
from ckpt.storage import ALIGNMENT, PosixStorage, io_buffer
from ckpt.transfer import Target
from ckpt.writer.arena import CHUNK_BYTES
from ckpt.writer.commit import CommitOrder, Committer
from ckpt.writer.record import Layout, Record, file_name, part_name


def rewrite(folder: Path, root: Path, files: int, progress: Callable[[int], None] | None = None) -> Path:
    """Write the step in ``folder`` under ``root`` as ``files`` files of even size; return the new folder.

    Every chunk is verified on the way. Takes the memory of one new file.

    Raises:
        CheckpointError: the step is damaged, or there is one of this number under ``root`` already.
    """
    manifest = check_step(folder)
    if step_dir(root, manifest.iteration).exists():
        raise CheckpointError(f"{step_dir(root, manifest.iteration)}: is there already; choose another folder")
    save_id = f"{secrets.token_hex(4)}-1"
    partial = partial_dir(root.absolute(), manifest.iteration, save_id)
    storage = PosixStorage()
    storage.make_folder(partial)
    for number in range(files):
        plan = plan_file(_parts(manifest, number, files), number)
        _write_file(folder, manifest, plan, number, partial, save_id, progress)
    order = CommitOrder(
        manifest.iteration,
        save_id,
        partial,
        list(range(files)),
        timeout_s=60.0,
        common=manifest.common,
        layout=manifest.layout,
        libraries=manifest.libraries,
        score=manifest.score,
    )
    return Committer(storage).commit(order)


def _parts(manifest: Manifest, number: int, files: int) -> list[Part]:
    parts = []
    for key, info in manifest.tensors.items():
        numel = 1
        for size in info.shape:
            numel *= size
        everything = Region((0,) * len(info.shape), info.shape, 0, numel)
        parts.append(Part(key, info.dtype, info.shape, everything, number, files))
    return parts


def _write_file(
    folder: Path,
    manifest: Manifest,
    plan: FilePlan,
    number: int,
    partial: Path,
    save_id: str,
    progress: Callable[[int], None] | None,
) -> None:
    memory = io_buffer(max(plan.size, 1))
    memory[: plan.data_begin] = plan.header(manifest.iteration, save_id)
    content = np.frombuffer(memory, dtype=np.uint8)
    targets = []
    for piece in plan.pieces:
        info = manifest.tensors[piece.key]
        end = piece.begin + piece.region.numel * info.item_bytes
        targets.append(Target(piece.key, info, piece.region, content[piece.begin : end]))
    read(folder, manifest, targets, progress=progress)
    storage = PosixStorage()
    name = file_name(number)
    fd = storage.create(partial / name, plan.size)
    chunks = []
    for begin in range(0, plan.size, CHUNK_BYTES):
        end = min(begin + CHUNK_BYTES, plan.size)
        chunks.append(digest(memoryview(memory)[begin:end]))
        storage.write_at(fd, memoryview(memory)[begin : -(-end // ALIGNMENT) * ALIGNMENT], begin)
    storage.finish(fd, plan.size)
    file = {"name": name, "bytes": plan.size, "chunk_bytes": CHUNK_BYTES, "chunks": chunks}
    layout = Layout.of([piece_record(piece) for piece in plan.pieces], tensor_records(plan.tensors))
    storage.sync_folder(partial)
    storage.write_small(partial / part_name(number, save_id), Record(save_id, file, layout).to_bytes(), durable=False)


def difference(first: Path, second: Path, progress: Callable[[int], None] | None = None) -> dict[str, str]:
    """Compare the tensors of two steps; return what differs, by name. Layouts and files do not matter.

    Raises:
        CheckpointError: a step is damaged.
    """
    ours, theirs = check_step(first), check_step(second)
    found = dict.fromkeys(ours.tensors.keys() - theirs.tensors.keys(), f"only in {first}")
    found |= dict.fromkeys(theirs.tensors.keys() - ours.tensors.keys(), f"only in {second}")
    for key in sorted(ours.tensors.keys() & theirs.tensors.keys()):
        a, b = ours.tensors[key], theirs.tensors[key]
        if a != b:
            found[key] = f"{asdict(a)} and {asdict(b)}"
            continue
        one, other = (_whole(folder, manifest, key, progress) for folder, manifest in ((first, ours), (second, theirs)))
        width = a.item_bytes
        differing = int((one.reshape(-1, width) != other.reshape(-1, width)).any(axis=1).sum())
        if differing:
            found[key] = f"{differing} of {len(one) // width} elements differ"
    return dict(sorted(found.items()))


def _whole(folder: Path, manifest: Manifest, key: str, progress: Callable[[int], None] | None) -> np.ndarray:
    (part,) = (part for part in _parts(manifest, 0, 1) if part.key == key)
    info = manifest.tensors[key]
    memory = np.empty(part.region.numel * info.item_bytes, dtype=np.uint8)
    read(folder, manifest, [Target(key, info, part.region, memory)], progress=progress)
    return memory
