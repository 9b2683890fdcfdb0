"""SIGKILL of ranks, writers or all of them, at 200 and more points: the newest committed step always loads and is
right, a torn one is never chosen, and what a crash left is gone after the next save.

Points: before every system call of a whole save and commit in the writer of either of two ranks, for a new step, one
that replaces another, one after which older ones go; before every call of the copy from a node's own disk; and random
moments, for the writer, the rank, or both together.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from ckpt.checkpointer import Checkpointer
from ckpt.errors import CheckpointError
from ckpt.retention import Retention
from ckpt.shard import whole
from ckpt.steps import complete_iterations, newest_valid
from tests.ckpt.test_failures import FAULTS

NUMEL = 1_100_000
"""Elements per tensor: a file of two chunks."""
RANDOM_WRITER, RANDOM_RANK, RANDOM_ALL = 40, 15, 15


def state(value: float) -> dict[str, torch.Tensor]:
    return {"big": torch.full((NUMEL,), value), "small": torch.full((3, 5), value)}


def described(value: float, rank: int = 0, writers: int = 1) -> list:
    return [whole(key, tensor, rank, writers) for key, tensor in state(value).items()]


def newest_value(root: Path) -> float:
    """Load the newest step on a fresh checkpointer; all of it must be of one save. Returns the value saved."""
    tensors = state(-1.0)
    report = Checkpointer(root).load([whole(key, tensor) for key, tensor in tensors.items()])
    assert not report.skipped, "no torn step may look like a step"
    value = float(report.common["value"])
    for key, tensor in tensors.items():
        assert (tensor == value).all(), f"{key} is not of the save of {value}"
    return value


class Job:
    """Two ranks' checkpointers on one folder, each with a fault that can be armed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.arms = [root.with_name(f"armed{rank}") for rank in (0, 1)]
        self.ranks = [Checkpointer(root, commit_timeout_s=20, storage=FAULTS) for _ in (0, 1)]
        for rank, checkpointer in enumerate(self.ranks):
            checkpointer.rank, checkpointer.world_size, checkpointer._session = rank, 2, "abcd"

    def set_fault(self, rank: int, number: int) -> None:
        """Kill the writer of ``rank`` before its system call ``number`` of the next save."""
        checkpointer = self.ranks[rank]
        checkpointer.close()
        options = {"armed": str(self.arms[rank]), "action": "kill", "number": number}
        checkpointer._background.storage_options = options
        self.arms[rank].touch()

    def save(self, iteration: int, value: float) -> list[str | None]:
        for rank, checkpointer in enumerate(self.ranks):
            behind = checkpointer._background
            behind.storage_options = behind.storage_options or {"armed": "/nonexistent", "action": "kill"}
            checkpointer.save(iteration, described(value, rank, 2), {"value": value})
        while any(c._background.saves for c in self.ranks):  # together: a failure on one must reach the other
            finished = {r: [s.error for s in c.poll()] for r, c in enumerate(self.ranks)}
            for rank, errors in finished.items():
                if errors:
                    self.outcome[rank] = errors[-1]
            time.sleep(0.001)
        return [self.outcome[0], self.outcome[1]]

    outcome: dict[int, str | None] = {}


@pytest.fixture
def job(tmp_path):
    made = Job(tmp_path / "steps")
    yield made
    for checkpointer in made.ranks:
        checkpointer.close()


WALKS = [(0, False, None, 30), (0, True, None, 36), (0, False, 1, 36), (1, False, None, 8), (1, True, None, 8)]
"""Rank, whether it replaces a step, retention, and the system calls that there are at least."""
UPLOAD = 24
"""System calls that there are at least when a step goes from a node's own disk to the shared storage."""


def test_the_points_are_200_and_more():
    assert sum(walk[-1] for walk in WALKS) + UPLOAD + RANDOM_WRITER + RANDOM_RANK + RANDOM_ALL >= 200


@pytest.mark.parametrize(("rank", "replacing", "keep_last", "least"), WALKS)
def test_a_writer_killed_before_any_system_call(job, rank, replacing, keep_last, least):
    """Walk through all calls until a save passes without reaching the fault; ``least`` of them there must be."""
    job.ranks[0].retention = Retention(keep_last=keep_last)
    value, iteration, points = 1.0, 1, 0
    assert job.save(iteration, value) == [None, None]
    for number in range(100):
        job.set_fault(rank, number)
        before, value = value, value + 1
        iteration += not replacing
        errors = job.save(iteration, value)
        if job.arms[rank].exists():
            job.arms[rank].unlink()
            assert errors == [None, None]
            break
        points += 1
        found = newest_value(job.root)
        assert found in (before, value)
        if errors[0] is None:
            assert found == value, "a save that was reported as done is there"
        value = found
        iteration = newest_valid(job.root).iteration
    assert points >= least, f"only {points} system calls"
    assert newest_value(job.root) == value
    left = {p.name for p in job.root.iterdir() if p.name.startswith("iter") and not p.name[5:].isdigit()}
    assert not left, "what the crashes left is gone"


def test_a_step_on_the_nodes_disk_survives_a_kill_before_any_system_call_of_its_copy(tmp_path):
    """Killed with its rank: the restart must have the newest step, not the one before."""
    root, local, arm = tmp_path / "steps", tmp_path / "node", tmp_path / "armed"
    for number in range(60):
        options = {"armed": str(arm), "action": "kill", "number": number}
        checkpointer = Checkpointer(root, local=local, storage=FAULTS, storage_options=options)
        arm.touch()
        checkpointer.save(number + 1, described(float(number)), {"value": float(number)})
        writer = checkpointer._background.writer.process
        deadline = time.monotonic() + 60
        while arm.exists() and number + 1 not in complete_iterations(root):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        reached = not arm.exists()
        if reached:
            writer.wait(60)  # the rank dies with it: nobody reports the failure
        else:
            checkpointer.close()
            arm.unlink(missing_ok=True)
        tensors = state(-1.0)
        report = Checkpointer(root, local=local).load([whole(key, tensor) for key, tensor in tensors.items()])
        assert report.common["value"] == number
        assert all((tensor == number).all() for tensor in tensors.values())
        if not reached:
            break
    assert number >= UPLOAD, f"only {number} system calls"
    assert not [path for path in (*root.iterdir(), *local.iterdir()) if path.name.endswith(".partial")]


def train(root: str, value: int, pids, committed) -> None:
    """A rank that saves for ever; each step holds its own number."""
    os.setsid()
    checkpointer = Checkpointer(Path(root))
    while True:
        value += 1
        checkpointer.save(value, described(float(value)), {"value": value})
        pids[1] = checkpointer._background.writer.process.pid
        pids[0] = os.getpid()
        for save in checkpointer.wait(30):
            if save.error is None:
                committed.value = save.iteration


def kill_at_random(root: Path, victims: str, seed: int, rounds: int) -> None:
    generator = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload(["megatron_zaya.train.loop", "tests.ranks"])
    value = 0
    for _ in range(rounds):
        pids, committed = context.Array("i", [0, 0]), context.Value("i", value)
        process = context.Process(target=train, args=(str(root), value, pids, committed), daemon=True)
        process.start()
        deadline = time.monotonic() + 60
        while not pids[0]:
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.002)
        time.sleep(generator.random() * 0.12)
        for pid in {"rank": [pids[0]], "all": generator.sample(list(pids), 2)}[victims]:
            os.kill(pid, signal.SIGKILL)
        process.join(30)
        _wait_until_gone(pids[1])
        try:
            found = newest_value(root)
        except CheckpointError as error:
            assert "holds no complete step" in str(error)
            assert committed.value == 0
            continue
        assert found >= committed.value, "a save that was reported as done is there"
        value = int(found)


def _wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "a writer without its rank must end"
        time.sleep(0.002)


def test_ranks_killed_at_random_moments_their_writers_finish_or_give_up(tmp_path):
    kill_at_random(tmp_path / "steps", "rank", seed=1, rounds=RANDOM_RANK)


def test_ranks_and_writers_killed_together_at_random_moments(tmp_path):
    kill_at_random(tmp_path / "steps", "all", seed=2, rounds=RANDOM_ALL)


def test_writers_killed_at_random_moments(tmp_path):
    generator = random.Random(3)
    checkpointer = Checkpointer(tmp_path / "steps")
    began = time.monotonic()
    checkpointer.save(1, described(1.0), {"value": 1})
    checkpointer.wait(30)
    whole_save_s = time.monotonic() - began  # the moments of the kills follow the speed of the machine
    value, failures = 1.0, 0
    for number in range(2, RANDOM_WRITER + 2):
        checkpointer.save(number, described(float(number)), {"value": number})
        time.sleep(generator.random() * whole_save_s)
        if checkpointer._background.writer is not None:
            checkpointer._background.writer.process.kill()
        (finished,) = checkpointer.wait(30)
        if finished.error is None:
            value = float(number)
        failures += finished.failed
        if value or checkpointer.iterations():
            found = newest_value(checkpointer.root)
            assert value <= found <= number
            value = found
    assert failures, "some kills must hit a save"
    checkpointer.save(number + 1, described(number + 1.0), {"value": number + 1})
    assert [s.error for s in checkpointer.wait(30)] == [None]
    # The step counts as saved before the writer tidies up behind it.
    deadline = time.monotonic() + 30
    while list(checkpointer.root.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.05)
    checkpointer.close()
    assert not list(checkpointer.root.glob("*.partial")), "what the crashes left is gone"
