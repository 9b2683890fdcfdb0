"""A model of power loss: the real writers' system calls are traced, then every state is built that a file system may
be left in, and each must hold a right step: the new one once its save was reported, else it or the one before.

The model: a file's bytes and length are safe after its fsync, a folder's entries after the folder's fsync. At a cut
after any call, each file and each folder loses any suffix of what it has done since its last fsync, one independently
of the others. That is harsher than ext4, xfs or btrfs.
"""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from ckpt.checkpointer import Checkpointer
from ckpt.retention import Retention
from ckpt.shard import whole

LARGEST_PRODUCT = 64
"""Independent losses of several files at one cut are combined fully up to here; beyond, each alone and all at once."""


@dataclass
class Node:
    """A file or folder: what is safe, and what has been done since."""

    folder: bool
    safe: dict | bytes = field(default_factory=bytes)
    pending: list = field(default_factory=list)

    def apply(self, count: int) -> dict | bytes:
        """Return the content with the first ``count`` pending operations."""
        content = dict(self.safe) if self.folder else bytearray(self.safe)
        for operation in self.pending[:count]:
            operation(content)
        return content


class Disk:
    """Replays traced calls under ``root``; nodes are reached through their folders' pending entries."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nodes = [Node(True, {})]

    def find(self, path: str) -> tuple[int, int, str]:
        """Return (node of the folder, node of the entry or -1, name)."""
        number = 0
        *folders, name = Path(path).relative_to(self.root).parts
        for part in folders:
            number = self.nodes[number].apply(len(self.nodes[number].pending))[part]
        return number, self.nodes[number].apply(len(self.nodes[number].pending)).get(name, -1), name

    def node_of(self, path: str) -> Node:
        return self.nodes[0] if Path(path) == self.root else self.nodes[self.find(path)[1]]

    def do(self, record: dict) -> None:
        path = record["path"]
        match record["op"]:
            case "mkdir" | "create":
                self._create(path, record["op"] == "mkdir")
            case "pwrite" | "write":
                data, offset = bytes.fromhex(record["data"]), record["offset"]
                self.node_of(path).pending.append(lambda content: _write(content, data, offset))
            case "fallocate" | "ftruncate":
                size, cut = record["size"], record["op"] == "ftruncate"
                self.node_of(path).pending.append(lambda content: _resize(content, size, cut))
            case "fsync":
                node = self.node_of(path)
                node.safe, node.pending = node.apply(len(node.pending)), []
            case "rename":
                folder, number, name = self.find(path)
                other, _, new = self.find(record["to"])
                assert folder == other, "renames stay in their folder"
                self.nodes[folder].pending.append(lambda entries: _rename(entries, name, new, number))
            case "unlink" | "rmdir":
                folder, _, name = self.find(path)
                self.nodes[folder].pending.append(lambda entries: entries.pop(name, None))
            case other:
                raise AssertionError(f"unknown call {other}")

    def _create(self, path: str, is_folder: bool) -> None:
        if Path(path) == self.root:
            return
        folder, number, name = self.find(path)
        if number >= 0:
            self.nodes[number].pending.append(lambda content: content.clear())
            return
        self.nodes.append(Node(is_folder, {} if is_folder else b""))
        created = len(self.nodes) - 1
        self.nodes[folder].pending.append(lambda entries: entries.update({name: created}))

    def states(self):
        """Yield how many pending operations each node keeps: everything a power loss may leave."""
        busy = [number for number, node in enumerate(self.nodes) if node.pending]
        choices = [range(len(self.nodes[number].pending) + 1) for number in busy]
        everything = {number: len(self.nodes[number].pending) for number in busy}
        product = 1
        for choice in choices:
            product *= len(choice)
        if product <= LARGEST_PRODUCT:
            for kept in itertools.product(*choices):
                yield dict(zip(busy, kept, strict=True))
            return
        yield from (everything | {n: kept} for n, choice in zip(busy, choices, strict=True) for kept in choice)
        yield from (
            dict.fromkeys(busy, 0) | {n: kept} for n, choice in zip(busy, choices, strict=True) for kept in choice
        )

    def content(self, kept: dict[int, int], number: int = 0, under: str = "") -> dict[str, bytes | None]:
        """Return what a power loss leaves: path -> content of a file, None for a folder."""
        found: dict[str, bytes | None] = {}
        for name, child in self.nodes[number].apply(kept.get(number, 0)).items():
            node = self.nodes[child]
            found[under + name] = None if node.folder else bytes(node.apply(kept.get(child, 0)))
            if node.folder:
                found |= self.content(kept, child, f"{under}{name}/")
        return found


def _write(content: bytearray, data: bytes, offset: int | None) -> None:
    begin = len(content) if offset is None else offset
    content.extend(b"\0" * (begin + len(data) - len(content)))
    content[begin : begin + len(data)] = data


def _resize(content: bytearray, size: int, cut: bool) -> None:
    content.extend(b"\0" * (size - len(content)))
    if cut:
        del content[size:]


def _rename(entries: dict, name: str, new: str, number: int) -> None:
    entries.pop(name, None)
    entries[new] = number


def described(value: float, rank: int) -> list:
    return [whole(f"t{i}", torch.full((40 + i,), value), rank, 2) for i in range(4)]


def trace_of_saves(root: Path, iterations: list[int], retention: Retention) -> list[dict]:
    """Save on two ranks; return the calls of both writers, with a note after each save that was reported."""
    log = root.with_name("trace.jsonl")
    ranks = [
        Checkpointer(root, retention=retention, storage="tests.ckpt.faults:Tracing", storage_options={"log": str(log)})
        for _ in (0, 1)
    ]
    for rank, checkpointer in enumerate(ranks):
        checkpointer.rank, checkpointer.world_size, checkpointer._session = rank, 2, "abcd"
    for value, iteration in enumerate(iterations, start=1):
        for rank in (1, 0):
            ranks[rank].save(iteration, described(float(value), rank), {"value": value})
            if rank:  # one writer after the other: the trace is in one possible order
                assert [s.error for s in ranks[rank].wait(30)] == [None]
        assert [s.error for s in ranks[0].wait(30)] == [None]
        with log.open("a") as file:
            file.write(json.dumps({"op": "reported", "value": value}) + "\n")
    for checkpointer in ranks:
        checkpointer.close()
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    ("iterations", "retention"),
    [([1, 2], Retention()), ([1, 1, 1], Retention()), ([1, 2, 3], Retention(keep_last=1))],
    ids=["new", "replacing", "pruning"],
)
def test_every_state_that_a_power_loss_may_leave_is_recoverable(tmp_path, iterations, retention):
    root = tmp_path / "steps"
    disk = Disk(root)
    reported, checked, seen = 0, 0, set()
    known: dict[frozenset, float] = {}
    """What was found in states that were built; many cuts leave the same."""
    for record in trace_of_saves(root, iterations, retention):
        if record["op"] == "reported":
            reported = record["value"]
        elif record["path"].startswith(str(root)):
            disk.do(record)
        if not reported:
            continue  # the first step is the ground to stand on
        for kept in disk.states():
            content = disk.content(kept)
            state = frozenset(content.items())
            if state not in known:
                known[state] = value_of_newest(write(content, tmp_path / "after"))
            found = known[state]
            assert found in (reported, reported + 1), f"after {record['op']} {record['path']}, {kept}: {found}"
            seen.add(found)
            checked += 1
    assert seen == set(range(1, len(iterations) + 1)), "every save is found in some states"
    assert checked > 150, f"only {checked} states"


def write(content: dict[str, bytes | None], root: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, data in content.items():  # folders come before what is in them
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)
    return root


def value_of_newest(root: Path) -> float:
    tensors = [whole(f"t{i}", torch.zeros(40 + i)) for i in range(4)]
    report = Checkpointer(root).load(tensors)
    value = report.common["value"]
    assert not report.skipped, "no torn step may look like a step"
    assert all((shard.data == value).all() for shard in tensors)
    return value
