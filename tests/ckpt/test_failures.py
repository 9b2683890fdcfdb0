"""A disk that is full, broken, slow or gone; a writer that dies or hangs: the save is reported as failed, training
goes on, the step before stays loadable, the next save works."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from ckpt.errors import CheckpointError
from ckpt.shard import whole
from tests.ckpt.conftest import assert_equal, shards, tensors, zeros

FAULTS = "tests.ckpt.faults:Faulty"


@pytest.fixture
def faulty(make_checkpointer, tmp_path):
    """Return a checkpointer with one good step (1), and the function that arms its fault."""

    def make(**options):
        arm = tmp_path / "armed"
        checkpointer = make_checkpointer(storage=FAULTS, storage_options={"armed": str(arm)} | options)
        checkpointer.save(1, shards(tensors(1, big=2)))
        assert not checkpointer.wait(60)[0].failed
        return checkpointer, arm.touch

    return make


def newest(checkpointer) -> int:
    state = zeros(tensors(big=2))
    iteration = checkpointer.load(shards(state)).iteration
    assert_equal(state, tensors(iteration, big=2))
    return iteration


def check_isolated(checkpointer, reason: str, stall_timeout_s: float | None = None) -> None:
    """Save step 2, which must fail for ``reason`` (within a short time limit, if given); then 3, which must not."""
    behind = checkpointer._background
    patience_s = behind.stall_timeout_s
    behind.stall_timeout_s = stall_timeout_s or patience_s
    checkpointer.save(2, shards(tensors(2, big=2)))
    finished = checkpointer.wait(60)
    assert [s.iteration for s in finished] == [2]
    assert reason in finished[0].error
    assert newest(checkpointer) == 1
    behind.stall_timeout_s = patience_s
    Path(behind.storage_options["armed"]).unlink(missing_ok=True)  # given up before it came to the fault
    checkpointer.save(3, shards(tensors(3, big=2)))
    assert [(s.iteration, s.error) for s in checkpointer.wait(60)] == [(3, None)]
    assert newest(checkpointer) == 3
    left = {p.name for p in checkpointer.root.iterdir()}
    assert left == {"iter_0000001", "iter_0000003", "latest"}, "what the failed save left is gone"


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("mkdir", 0),
        ("create", 0),
        ("fallocate", 0),
        ("pwrite", 0),
        ("pwrite", 1),
        ("ftruncate", 0),
        *(("fsync", i) for i in range(5)),
        ("create", 1),
        ("write", 0),
        ("rename", 0),
        ("create", 2),
        ("write", 1),
        ("rename", 1),
        ("rename", 2),
    ],
)
def test_an_input_output_error_at_any_call_fails_this_save_only(faulty, call, number):
    checkpointer, arm = faulty(action=str(errno.EIO), call=call, number=number)
    arm()
    if (call, number) == ("fsync", 4):  # the root, after the rename: the step may be there, or not
        checkpointer.save(2, shards(tensors(2, big=2)))
        assert "Input/output error" in checkpointer.wait(60)[0].error
        assert newest(checkpointer) in (1, 2)
        return
    check_isolated(checkpointer, "Input/output error (errno 5)")


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
def test_a_writer_that_dies(faulty, call):
    checkpointer, arm = faulty(action="kill", call=call)
    arm()
    check_isolated(checkpointer, "writer process died (status -9)")


@pytest.mark.parametrize("call", ["create", "pwrite"])
def test_a_writer_that_hangs(faulty, call):
    checkpointer, arm = faulty(action="hang", call=call)
    arm()
    check_isolated(checkpointer, "no progress for 0.7 s", stall_timeout_s=0.7)


def test_a_writer_that_was_stopped_from_outside(faulty):
    checkpointer, _ = faulty(action="kill")
    os.kill(checkpointer._background.writer.process.pid, signal.SIGSTOP)
    check_isolated(checkpointer, "no progress for 0.7 s", stall_timeout_s=0.7)


def test_a_writer_that_dies_between_saves_costs_nothing(faulty):
    checkpointer, _ = faulty(action="kill")
    checkpointer._background.writer.process.kill()
    checkpointer._background.writer.process.wait()
    checkpointer.save(2, shards(tensors(2, big=2)))
    assert [s.error for s in checkpointer.wait(60)] == [None]
    assert newest(checkpointer) == 2


def test_a_slow_disk_holds_nobody_up(make_checkpointer, tmp_path):
    options = {"armed": str(tmp_path / "no"), "action": "kill", "slow_s": 0.3}
    checkpointer = make_checkpointer(storage=FAULTS, storage_options=options)
    state = tensors(1, big=6)
    checkpointer.save(0, shards(state))
    checkpointer.wait(30)
    save = checkpointer.save(1, shards(state))
    assert not save.done, "training goes on"
    written, size = checkpointer.progress()
    assert 0 <= written < size == save.size
    assert checkpointer.poll() == []
    checkpointer.wait(30)
    assert save.durable_s > 0.6


def test_waiting_has_a_limit(make_checkpointer, tmp_path):
    options = {"armed": str(tmp_path / "no"), "action": "kill", "slow_s": 2.0}
    checkpointer = make_checkpointer(storage=FAULTS, storage_options=options)
    checkpointer.save(1, shards(tensors(1)))
    with pytest.raises(CheckpointError, match=r"still under way after 0.2 s"):
        checkpointer.wait(0.2)
    assert [s.error for s in checkpointer.wait(60)] == [None]


def test_a_folder_that_is_removed_during_a_save(faulty):
    checkpointer, _ = faulty(action="kill", slow_s=0.3)
    checkpointer.save(2, shards(tensors(2, big=2)))
    time.sleep(0.1)
    shutil.rmtree(checkpointer.root)
    assert "No such file or directory" in checkpointer.wait(60)[0].error
    checkpointer.save(3, shards(tensors(3, big=2)))
    assert [s.error for s in checkpointer.wait(60)] == [None]
    assert newest(checkpointer) == 3


def test_no_memory_for_the_arena_fails_the_save(make_checkpointer):
    checkpointer = make_checkpointer()
    checkpointer.save(1, shards(tensors(1, big=2)))
    checkpointer.wait(60)
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 25, limits[1]))  # also bounds memory files
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        save = checkpointer.save(2, [whole("large", torch.zeros(1 << 24))])
        assert "no room for a staging arena" in save.error
        assert [s.iteration for s in checkpointer.wait(60)] == [2]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest(checkpointer) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 17 MB, mounted for the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=17m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_noticed_before_a_byte_is_written_and_is_no_end(make_checkpointer, small_disk):
    checkpointer = make_checkpointer(root=small_disk / "steps")
    for iteration in (1, 2):
        checkpointer.save(iteration, shards(tensors(iteration, big=2)))
        assert [s.error for s in checkpointer.wait(60)] == [None]
    checkpointer.save(3, shards(tensors(3, big=2)))
    assert "No space left on device (errno 28)" in checkpointer.wait(60)[0].error
    assert newest(checkpointer) == 2
    shutil.rmtree(small_disk / "steps" / "iter_0000001")
    checkpointer.save(4, shards(tensors(4, big=2)))
    assert [s.error for s in checkpointer.wait(60)] == [None]
    assert newest(checkpointer) == 4


class TwoRanks:
    """Two ranks' checkpointers in one process: what they share is the disk, as in a job."""

    def __init__(self, make_checkpointer, options=({}, {})) -> None:
        self.ranks = [make_checkpointer(commit_timeout_s=20.0, **o) for o in options]
        for rank, checkpointer in enumerate(self.ranks):
            checkpointer.rank, checkpointer.world_size, checkpointer._session = rank, 2, "abcd"

    def save(self, iteration: int, which=(0, 1)) -> list:
        state = tensors(iteration, big=2)
        for rank in which:
            held = [whole(k, t, replica_id=rank, writers=2) for k, t in state.items()]
            self.ranks[rank].save(iteration, held)
        return [finished for rank in which for finished in self.ranks[rank].wait(60)]


def test_the_first_rank_hears_of_a_failure_elsewhere_at_once(make_checkpointer, tmp_path):
    arm = tmp_path / "armed"
    bad = {"storage": FAULTS, "storage_options": {"armed": str(arm), "action": "5", "call": "pwrite"}}
    ranks = TwoRanks(make_checkpointer, ({}, bad))
    assert not any(s.failed for s in ranks.save(1))
    arm.touch()
    start = time.monotonic()
    committing, other = ranks.save(2)
    assert "rank 1 could not write its part" in committing.error
    assert "Input/output error" in other.error
    assert time.monotonic() - start < ranks.ranks[0].commit_timeout_s, "it does not wait for what will never come"
    assert newest(ranks.ranks[0]) == 1
    assert not any(s.failed for s in ranks.save(3))
    assert newest(ranks.ranks[0]) == 3


def test_a_rank_that_never_comes_is_a_failed_save_after_the_time_limit(make_checkpointer):
    ranks = TwoRanks(make_checkpointer)
    assert not any(s.failed for s in ranks.save(1))
    ranks.ranks[0].commit_timeout_s = 3.0
    (alone,) = ranks.save(2, which=(0,))
    assert "1 of 2 ranks did not finish within 3 s, the first of them is rank 1" in alone.error
    assert newest(ranks.ranks[0]) == 1


def test_copies_are_written_once_and_the_work_is_even(make_checkpointer):
    ranks = TwoRanks(make_checkpointer)
    first, second = ranks.save(1)
    content = sum(t.numel() * t.element_size() for t in tensors(big=2).values())
    assert abs(first.size - second.size) < 0.1 * content
    assert first.size + second.size < content + 20_000
    assert newest(ranks.ranks[0]) == 1
