"""Damage: every one of many random mutations of a step is noticed before a byte of it is used, and is located."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from ckpt.checkpointer import Checkpointer
from ckpt.errors import CheckpointError, CorruptCheckpointError
from ckpt.manifest import MANIFEST, seal
from ckpt.shard import Shard, whole
from ckpt.steps import check_step, step_dir
from tests.ckpt.conftest import assert_equal, shards, tensors, zeros

MUTATIONS = 520
BIG = 3
"""Large tensors of the state: each rank's file has two chunks."""
FILES = ["rank_00000.safetensors", "rank_00001.safetensors"]
UNTOUCHED = 77.0


def save_two_ranks(root: Path, iteration: int, big: int) -> None:
    ranks = [Checkpointer(root), Checkpointer(root)]
    state = tensors(iteration, big)
    for rank, checkpointer in enumerate(ranks):
        checkpointer.rank, checkpointer.world_size, checkpointer._session = rank, 2, f"{iteration:04x}"
        checkpointer.save(iteration, [whole(k, t, rank, 2) for k, t in state.items()], {"iteration": iteration})
    assert not any(save.failed for c in ranks for save in c.wait(30))
    for checkpointer in ranks:
        checkpointer.close()


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Folder of the steps 1 and 2, of two ranks, with several chunks each."""
    root = tmp_path_factory.mktemp("damage") / "steps"
    for iteration in (1, 2):
        save_two_ranks(root, iteration, big=BIG)
    return root


def flip_bit(path: Path, random: random.Random) -> int:
    with path.open("r+b") as file:
        at = random.randrange(path.stat().st_size)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << random.randrange(8)]))
    return at


def zero_page(path: Path, random: random.Random) -> int:
    with path.open("r+b") as file:
        while True:
            at = random.randrange(0, path.stat().st_size, 4096)
            file.seek(at)
            page = file.read(4096)
            if page.strip(b"\0"):
                file.seek(at)
                file.write(bytes(len(page)))
                return at


def move_page(path: Path, random: random.Random) -> int:
    """A misdirected write: one page lies where another belongs."""
    with path.open("r+b") as file:
        pages = path.stat().st_size // 4096
        while True:
            a, b = random.sample(range(pages), 2)
            file.seek(a * 4096)
            page = file.read(4096)
            file.seek(b * 4096)
            if file.read(4096) != page:
                file.seek(b * 4096)
                file.write(page)
                return b * 4096


def truncate(path: Path, random: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(random.randrange(path.stat().st_size))


def extend(path: Path, random: random.Random) -> None:
    with path.open("ab") as file:
        file.write(random.randbytes(random.randint(1, 5000)))


def edit_manifest(path: Path, random: random.Random) -> None:
    """Change one digit or letter of the text, as an editor would."""
    text = bytearray(path.read_bytes())
    at = random.choice([i for i, c in enumerate(text) if chr(c).isalnum()])
    text[at] = random.choice([c for c in b"0123456789abcxyz" if c != text[at]])
    path.write_bytes(text)


def mutate(step: Path, kind: str, random: random.Random) -> tuple[Path, int | None]:
    """Damage a step; return the damaged file, and where if that is one place."""
    path = step / random.choice(FILES)
    match kind:
        case "flip":
            return path, flip_bit(path, random)
        case "zero":
            return path, zero_page(path, random)
        case "move":
            return path, move_page(path, random)
        case "truncate":
            truncate(path, random)
        case "extend":
            extend(path, random)
        case "swap":
            first, second = (step / name for name in FILES)
            first.rename(step / "x")
            second.rename(first)
            (step / "x").rename(second)
        case "other step":
            shutil.copy(step.parent / "iter_0000001" / path.name, path)
        case "missing":
            path.unlink()
        case "manifest flip":
            path = step / MANIFEST
            flip_bit(path, random)
        case "manifest edit":
            path = step / MANIFEST
            edit_manifest(path, random)
        case "manifest cut":
            path = step / MANIFEST
            truncate(path, random)
    return path, None


KINDS = {"flip": 30, "zero": 12, "move": 8, "truncate": 10, "extend": 5, "swap": 2, "other step": 3, "missing": 2}
KINDS |= {"manifest flip": 15, "manifest edit": 10, "manifest cut": 3}


def test_every_mutation_is_noticed_located_and_passed_over(steps):
    generator = random.Random(1234)
    good = {path: path.read_bytes() for path in step_dir(steps, 2).iterdir()}
    manifest = check_step(step_dir(steps, 2))
    by_name = {file.name: file for file in manifest.files}
    checkpointer = Checkpointer(steps)
    counted = dict.fromkeys(KINDS, 0)
    kinds = generator.choices(list(KINDS), list(KINDS.values()), k=MUTATIONS)
    right = tensors(2, big=BIG)
    state = zeros(right)
    for kind in kinds:
        path, at = mutate(step_dir(steps, 2), kind, generator)
        for tensor in state.values():
            tensor.fill_(UNTOUCHED)
        with pytest.raises(CorruptCheckpointError) as caught:
            checkpointer.load(shards(state), 2)
        message = str(caught.value)
        assert str(path) in message or (kind in ("swap", "extend") and FILES[0][:5] in message), (kind, message)
        if at is not None:
            file = by_name[path.name]
            chunk = at // file.chunk_bytes
            assert f"chunk {chunk} " in message, (kind, at, message)
            hit = [p.key for p in file.pieces if chunk * file.chunk_bytes <= p.begin < (chunk + 1) * file.chunk_bytes]
            assert any(key in message for key in hit) or "more" in message or not hit
        for key, tensor in state.items():  # what was filled before the damage was found is right
            untouched = tensor == torch.tensor(UNTOUCHED).to(tensor.dtype)
            assert (untouched | (tensor == right[key])).all(), (kind, key)
        for name, content in good.items():
            if not name.exists() or name.stat().st_size != len(content) or name == path or kind == "swap":
                name.write_bytes(content)
        counted[kind] += 1
    assert sum(counted.values()) == MUTATIONS >= 500
    assert min(counted.values()) > 0


def test_damage_falls_back_to_the_step_before_loudly(steps, caplog, tmp_path):
    root = shutil.copytree(steps, tmp_path / "steps")
    flip_bit(step_dir(root, 2) / FILES[1], random.Random(5))
    state = zeros(tensors(big=BIG))
    report = Checkpointer(root).load(shards(state))
    assert_equal(state, tensors(1, big=BIG))
    assert (report.iteration, list(report.skipped)) == (1, [2])
    assert FILES[1] in report.skipped[2]
    assert "step 2 passed over" in report.summary()
    assert "CHECKPOINT 2 IS DAMAGED" in caplog.text
    flip_bit(step_dir(root, 1) / MANIFEST, random.Random(6))
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        Checkpointer(root).load(shards(state))


def test_a_part_that_needs_only_good_chunks_can_still_be_read(steps, tmp_path):
    root = shutil.copytree(steps, tmp_path / "steps")
    file = check_step(step_dir(root, 2)).files[0]
    last = [piece for piece in file.pieces if piece.key.startswith("big")][-1]
    with (step_dir(root, 2) / file.name).open("r+b") as f:
        f.seek(100)
        f.write(b"\xff" * 8)
    info = check_step(step_dir(root, 2)).tensors[last.key]
    start, stop = last.region.stop - 1000, last.region.stop  # in the second chunk
    out = torch.zeros(1000)
    part = Shard(last.key, out, info.shape, last.region.offset, last.region.shape, (start, stop))
    Checkpointer(root).load([part], 2, partial=True)
    assert torch.equal(out, tensors(2, big=BIG)[last.key].view(-1)[start:stop])


# ---------------------------------------------------------------- what could not have been written by us


@pytest.fixture
def forged(steps, tmp_path):
    """Return a function that rewrites the manifest of a step with a right hash, and a load of it."""
    root = shutil.copytree(steps, tmp_path / "steps")
    path = step_dir(root, 2) / MANIFEST
    value = json.loads(path.read_bytes())["manifest"]

    def load(change) -> None:
        changed = change(value)
        path.write_bytes(seal("manifest", value if changed is None else changed))
        state = zeros(tensors(big=BIG))
        try:
            Checkpointer(root).load(shards(state), 2)
        finally:
            assert_equal(state, zeros(state))

    return load


def set_at(*keys):
    """Return a change that sets the item at ``keys[:-1]`` to ``keys[-1]``."""

    def change(value):
        for key in keys[:-2]:
            value = value[key]
        value[keys[-2]] = keys[-1]

    return change


def overlap_bytes(value):
    pieces = value["files"][0]["pieces"]
    pieces[2][5] = pieces[1][5]


def overlap_regions(value):
    first, second = (next(p for p in value["files"][r]["pieces"] if p[0] == "big.0") for r in (0, 1))
    second[3:5] = first[3:5]


FORGERIES = {
    "path traversal": (set_at("files", 0, "name", "../../secret"), "is no name of a rank's file"),
    "absolute path": (set_at("files", 0, "name", "/etc/passwd"), "is no name of a rank's file"),
    "path in a good name": (set_at("files", 0, "name", "rank_00000.safetensors/../x"), "is no name of a rank's file"),
    "absurd size": (set_at("files", 0, "bytes", 1 << 60), "no possible count"),
    "size of another kind": (set_at("files", 0, "bytes", "12"), "no possible count"),
    "negative": (set_at("files", 0, "pieces", 0, 5, -8), "no possible count"),
    "not the files size": (set_at("files", 0, "bytes", 1 << 40), "cannot make"),
    "absurd shape": (set_at("tensors", "big.0", ["F32", [1 << 40, 1 << 40]]), "beyond reason"),
    "many dimensions": (set_at("tensors", "big.0", ["F32", [1] * 1000]), "beyond reason"),
    "unknown type": (set_at("tensors", "big.0", ["OBJECT", [3]]), "unknown type"),
    "unknown tensor": (set_at("files", 0, "pieces", 0, 0, "other"), "no tensor of this step"),
    "outside its tensor": (set_at("files", 0, "pieces", 0, 1, [5, 5]), "outside the tensor"),
    "beyond the file": (set_at("files", 0, "pieces", -1, 5, 1 << 50), "its last tensor ends at"),
    "overlapping bytes": (overlap_bytes, "overlap"),
    "overlapping regions": (overlap_regions, "parts of 'big.0' overlap"),
    "zero chunks": (set_at("files", 0, "chunk_bytes", 0), "cannot make"),
    "huge chunks": (set_at("files", 0, "chunk_bytes", 1 << 50), "cannot make"),
    "hash of another kind": (set_at("files", 0, "chunks", 0, "z" * 32), "hash is malformed"),
    "one file twice": (set_at("files", 1, "name", FILES[0]), "listed twice"),
    "newer version": (set_at("version", 2), "format version 2"),
    "another format": (set_at("format", "x"), "no checkpoint of this program"),
    "a field is missing": (lambda value: {k: v for k, v in value.items() if k != "files"}, "missing or malformed"),
    "no object": (lambda value: [value], "missing or malformed"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_malicious_manifest_is_refused(forged, forgery):
    change, message = FORGERIES[forgery]
    with pytest.raises(CorruptCheckpointError, match=message):
        forged(change)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("name", [MANIFEST, FILES[0]])
@pytest.mark.parametrize("write", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_a_pickle_is_never_opened(steps, tmp_path, name, write):
    root = shutil.copytree(steps, tmp_path / "steps")
    path, hit = step_dir(root, 2) / name, tmp_path / "hit"
    size = path.stat().st_size
    if write:
        path.write_bytes(write(Payload(hit)))
    else:
        torch.save(Payload(hit), path)
    with path.open("ab") as file:
        file.write(b"\0" * max(size - path.stat().st_size, 0))
    with pytest.raises(CorruptCheckpointError, match=name):
        Checkpointer(root).load(shards(zeros(tensors(big=BIG))), 2)
    assert not hit.exists()


def test_a_link_out_of_the_step_is_not_followed(steps, tmp_path):
    root = shutil.copytree(steps, tmp_path / "steps")
    path = step_dir(root, 2) / FILES[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=FILES[0]):
        Checkpointer(root).load(shards(zeros(tensors(big=BIG))), 2)


def test_the_header_of_a_file_is_never_believed(steps, tmp_path):
    """A forged safetensors header changes the first chunk; nothing is read by it."""
    root = shutil.copytree(steps, tmp_path / "steps")
    path = step_dir(root, 2) / FILES[0]
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 62))
    with pytest.raises(CorruptCheckpointError, match="chunk 0"):
        Checkpointer(root).load(shards(zeros(tensors(big=BIG))), 2)
    assert np.frombuffer(path.read_bytes()[:8], dtype="<u8")[0] == 1 << 62
