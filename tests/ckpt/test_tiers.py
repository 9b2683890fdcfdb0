"""Two tiers: node-local files, copied to the shared folder in the background, and completed there after a crash.

Two nodes of one rank each: real writers, real processes, real SIGKILL. What differs from a cluster is that both nodes'
disks are folders of this machine.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from ckpt.checkpointer import Checkpointer
from ckpt.steps import complete_iterations, partial_dir, partial_saves
from ckpt.storage import PosixStorage, make_in
from ckpt.tiers import Found, found_under, recover, rescues
from ckpt.writer.upload import upload
from tests.ckpt.conftest import assert_equal, shards, tensors, zeros
from tests.ckpt.test_failures import FAULTS, newest
from tests.ranks import run_ranks

SLOW = {"armed": "/nonexistent", "action": "kill", "slow_s": 0.3}
"""A shared storage on which every write takes 0.3 s."""


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file()) if root.exists() else []


def test_saves_flow_through_the_nodes_disk_and_leave_nothing_there(make_checkpointer, tmp_path):
    checkpointer = make_checkpointer(local=tmp_path / "node")
    for iteration in (1, 2, 3):
        checkpointer.save(iteration, shards(tensors(iteration, big=2)), {"n": iteration})
    finished = checkpointer.wait(60)
    assert [save.error for save in finished] == [None] * 3
    assert all(0 < save.local_s <= save.part_s <= save.durable_s for save in finished)
    assert newest(checkpointer) == 3
    checkpointer.close()
    assert files(tmp_path / "node") == []
    assert files(tmp_path / "steps" / "iter_0000003") == ["manifest.json", "rank_00000.safetensors"]


def test_a_slow_shared_storage_holds_the_next_save_up_only_when_two_are_behind(make_checkpointer, tmp_path):
    checkpointer = make_checkpointer(local=tmp_path / "node", storage=FAULTS, storage_options=SLOW)
    started = [checkpointer.save(i, shards(tensors(i, big=2))) for i in (1, 2, 3)]
    assert not started[0].done or started[0].durable_s > 0.5
    assert started[1].part_s is None, "it was staged while the one before was being copied"
    assert started[2].waited_s > 0
    assert [save.error for save in checkpointer.wait(60)] == [None] * 3
    assert newest(checkpointer) == 3


def test_a_broken_shared_storage_fails_the_save_and_nothing_else(make_checkpointer, tmp_path):
    arm = tmp_path / "armed"
    options = {"armed": str(arm), "action": "5", "call": "pwrite"}
    checkpointer = make_checkpointer(local=tmp_path / "node", storage=FAULTS, storage_options=options)
    checkpointer.save(1, shards(tensors(1, big=2)))
    checkpointer.wait(60)
    arm.touch()
    checkpointer.save(2, shards(tensors(2, big=2)))
    assert "Input/output error" in checkpointer.wait(60)[0].error
    assert newest(checkpointer) == 1
    assert len(partial_saves(tmp_path / "node")) == 1, "a restart could still complete it"
    checkpointer.save(3, shards(tensors(3, big=2)))
    assert [save.error for save in checkpointer.wait(60)] == [None]
    assert newest(checkpointer) == 3
    checkpointer.close()
    assert files(tmp_path / "node") == []


def test_ranks_of_one_node_copy_side_by_side_and_the_first_ones_part_takes_the_commit_along(tmp_path):
    arm, node = tmp_path / "armed", tmp_path / "node"
    options = {"armed": str(arm), "action": "5", "call": "pwrite"}  # both parts stay on the node
    for rank in (0, 1):
        arm.touch()
        checkpointer = Checkpointer(tmp_path / "steps", local=node, storage=FAULTS, storage_options=options)
        checkpointer.rank, checkpointer.world_size, checkpointer._session = rank, 2, "abcd"
        checkpointer.save(1, shards(tensors(1, big=2)))
        checkpointer.wait(60)
        checkpointer.close()
    local, shared = partial_dir(node, 1, "abcd-1"), partial_dir(tmp_path / "shared", 1, "abcd-1")
    everything = files(local)
    assert len(everything) == 5, "two files, two records, the commit"
    upload(local, 1, "abcd-1", shared, PosixStorage())
    assert files(local) == [name for name in everything if "00001" not in name]
    assert files(shared) == [name for name in everything if "00001" in name]
    upload(local, 0, "abcd-1", shared, PosixStorage())
    assert (files(local), files(shared)) == ([], everything)


def test_a_folder_that_another_rank_removes_while_it_is_empty_is_made_again(tmp_path):
    storage, folder, attempts = PosixStorage(), tmp_path / "node" / "save", []

    def make() -> Path:
        attempts.append(folder.exists())
        if len(attempts) < 3:
            folder.rmdir()
        storage.write_small(folder / "record", b"")
        return folder / "record"

    assert make_in(storage, folder, make).exists()
    assert attempts == [True] * 3
    with pytest.raises(FileNotFoundError):
        make_in(storage, folder, lambda: (folder / "missing" / "file").read_bytes())


def node_rank(root: str, rank: int, local: str, pids, ready) -> None:
    """One rank on a node of its own: saves step 1, then step 2, whose copy to the shared folder never ends."""
    os.setsid()
    checkpointer = Checkpointer(Path(root), local=Path(local), storage=FAULTS, storage_options=SLOW | {"slow_s": 0.0})
    checkpointer.rank, checkpointer.world_size, checkpointer._session = rank, 2, "abcd"
    for iteration in (1, 2):
        if iteration == 2:
            checkpointer.close()
            checkpointer._background.storage_options = SLOW | {"slow_s": 1000.0}
        state = tensors(iteration, big=2)
        held = [s.__class__(**{**s.__dict__, "replica_id": rank, "writers": 2}) for s in shards(state)]
        save = checkpointer.save(iteration, held, {"iteration": iteration})
        while not (save.done if iteration == 1 else save.local_s is not None):
            checkpointer.poll()
            assert save.error is None, save.error
            time.sleep(0.005)
    pids[2 * rank : 2 * rank + 2] = [os.getpid(), checkpointer._background.writer.process.pid]
    ready.wait()
    time.sleep(1000)


def crash(root: Path, nodes: list[Path]) -> None:
    """Two nodes save, and die with their writers before step 2 has left their own disks."""
    context = multiprocessing.get_context("forkserver")
    pids, ready = context.Array("i", [0] * 4), context.Barrier(3)
    processes = [
        context.Process(target=node_rank, args=(str(root), rank, str(node), pids, ready), daemon=True)
        for rank, node in enumerate(nodes)
    ]
    for process in processes:
        process.start()
    ready.wait(120)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for process in processes:
        process.join(30)


def restarted(root: str, nodes: list[str]) -> tuple:
    """A rank of the job that comes after: load whatever is newest, in a world of any size."""
    from launch.env import read_rank_env

    env = read_rank_env()
    torch.distributed.init_process_group("gloo", rank=env.rank, world_size=env.world_size)
    state = zeros(tensors(big=2))
    report = Checkpointer(Path(root), local=Path(nodes[env.rank])).load(shards(state))
    assert_equal(state, tensors(report.iteration, big=2))
    return report.iteration, report.common


@pytest.fixture
def crashed(tmp_path):
    root, nodes = tmp_path / "steps", [tmp_path / "node0", tmp_path / "node1"]
    crash(root, nodes)
    assert complete_iterations(root) == [1]
    assert [len(partial_saves(node)) for node in nodes] == [1, 1]
    return root, nodes


def test_a_step_that_only_the_nodes_have_is_completed_at_the_restart(crashed):
    root, nodes = crashed
    assert run_ranks(restarted, 2, str(root), [str(node) for node in nodes]) == [(2, {"iteration": 2})] * 2
    assert complete_iterations(root) == [1, 2]
    assert files(root / "iter_0000002") == ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]
    assert [files(node) for node in nodes] == [[], []]


def test_without_one_node_or_with_a_damaged_file_the_step_before_is_taken(crashed):
    root, nodes = crashed
    (path,) = nodes[1].glob("*/rank_00001.safetensors")
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    assert recover(root, nodes[0]) is None, "the other node is not there"
    assert run_ranks(restarted, 2, str(root), [str(node) for node in nodes]) == [(1, {"iteration": 1})] * 2
    checkpointer = Checkpointer(root)
    checkpointer.save(3, shards(tensors(3, big=2)))
    assert [save.error for save in checkpointer.wait(60)] == [None]
    checkpointer.close()
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000001", "iter_0000003", "latest"]


def test_what_can_be_completed():
    commit = {"ranks": [0, 1, 2]}

    def found(ranks, commit=None, shared=False, iteration=5, save_id="aa-5"):
        return Found(iteration, save_id, frozenset(ranks), commit, shared)

    assert rescues([[found({0, 1, 2})]], 4) == [], "nobody knows how to commit"
    assert rescues([[found({0, 1}, commit)], [found({1})]], 4) == [], "a part is nowhere"
    assert rescues([[found({0, 1, 2}, commit)]], 5) == [], "there is one as new"
    (rescue,) = rescues([[found({0}, shared=True), found({0, 1}, commit)], [found({1, 2})]], 4)
    assert rescue.uploads == {1: 1, 2: 1}, "what is on the shared storage is not copied again"
    older = found({0, 1, 2}, commit, iteration=4, save_id="aa-4")
    assert [r.iteration for r in rescues([[older, found({0, 1, 2}, commit)]], 3)] == [5, 4]


def test_records_that_the_crash_cut_off_do_not_count(tmp_path):
    folder = tmp_path / "iter_0000007.abcd-3.partial"
    folder.mkdir()
    (folder / "rank_00000.abcd-3.part.json").write_bytes(b'{"xxh3_128": "')
    (folder / "abcd-3.commit.json").write_bytes(b"")
    (found,) = found_under(tmp_path, shared=False)
    assert (found.iteration, found.save_id, found.ranks, found.commit) == (7, "abcd-3", frozenset(), None)
