"""Saving and loading on one rank: every type, replacing, freshness, memory cap, what is missing, retention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ckpt.checkpointer import Checkpointer
from ckpt.descriptors import Descriptors
from ckpt.errors import CheckpointError
from ckpt.retention import Retention
from ckpt.shard import Shard, whole
from ckpt.steps import LATEST, check_step, step_dir
from ckpt.writer.arena import CHUNK_BYTES
from tests.ckpt.conftest import assert_equal, shards, tensors, zeros


def save(checkpointer: Checkpointer, iteration: int, state: dict, **options):
    started = checkpointer.save(iteration, shards(state), **options)
    checkpointer.wait(60)
    return started


def load(checkpointer: Checkpointer, like: dict, iteration=None, **options):
    state = zeros(like)
    report = checkpointer.load(shards(state), iteration, **options)
    return state, report


def test_every_type_comes_back_and_the_report_says_so(make_checkpointer, tmp_path):
    checkpointer, state = make_checkpointer(), tensors(big=3)
    assert checkpointer.iterations() == []
    started = save(checkpointer, 5, state, common={"note": [1, None, "x"]}, layout={"tp": 1}, score=0.5)
    assert not started.failed
    assert 0 < started.part_s <= started.durable_s
    assert 0 < started.stall_s < started.durable_s
    loaded, report = load(checkpointer, state)
    assert_equal(loaded, state)
    assert (report.iteration, report.common, report.layout) == (5, {"note": [1, None, "x"]}, {"tp": 1})
    assert (report.tensors, report.missing, report.unexpected) == (len(state), [], [])
    assert report.bytes_loaded == sum(t.numel() * t.element_size() for t in state.values())
    assert "9 tensors" in report.summary()
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["iter_0000005", LATEST]
    assert check_step(report.folder).score == 0.5


@pytest.mark.parametrize("copies", [2, 3])
def test_what_other_ranks_want_too_is_read_past_the_page_cache_or_through_it(
    make_checkpointer, tmp_path, monkeypatch, copies
):
    checkpointer, state = make_checkpointer(), tensors(big=2)
    save(checkpointer, 1, state)
    read, directly = Descriptors.read, set()

    def noted(self, name, direct, *arguments):
        directly.add(direct)
        return read(self, name, direct, *arguments)

    monkeypatch.setattr(Descriptors, "read", noted)
    loaded = zeros(state)
    checkpointer.load([whole(key, tensor, replica_id=0, writers=copies) for key, tensor in loaded.items()])
    assert_equal(loaded, state)
    assert directly == {copies == 2}


def test_the_files_are_safetensors_files(make_checkpointer, tmp_path):
    state = tensors(big=2)
    save(make_checkpointer(), 1, state)
    with safe_open(step_dir(tmp_path / "steps", 1) / "rank_00000.safetensors", "pt") as file:
        assert_equal({key: file.get_tensor(key) for key in file.keys()}, state)  # noqa: SIM118
        assert "iteration                1" in file.metadata()["step"]


def test_replacing_a_step_and_cleaning_up_after_others(make_checkpointer, tmp_path):
    checkpointer = make_checkpointer()
    for name in ("iter_0000009.deadbeef-7.partial", "iter_0000002.deleted.partial"):
        (tmp_path / "steps" / name).mkdir(parents=True)
    save(checkpointer, 3, tensors(1))
    save(checkpointer, 3, tensors(2))
    save(checkpointer, 7, tensors(3))
    assert checkpointer.iterations() == [3, 7]
    assert_equal(load(checkpointer, tensors(), 3)[0], tensors(2))
    assert_equal(load(checkpointer, tensors())[0], tensors(3))
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["iter_0000003", "iter_0000007", LATEST]
    assert (tmp_path / "steps" / LATEST).read_text() == "7\n"


def test_what_is_saved_is_what_was_there_at_the_call(make_checkpointer):
    checkpointer, state = make_checkpointer(), tensors(big=8)
    before = {key: tensor.clone() for key, tensor in state.items()}
    checkpointer.save(1, shards(state))
    for tensor in state.values():
        tensor.zero_()
    checkpointer.save(2, shards(state))
    checkpointer.wait(60)
    assert_equal(load(checkpointer, state, 1)[0], before)
    assert_equal(load(checkpointer, state, 2)[0], zeros(state))


def test_two_saves_around_an_update_differ_and_the_files_say_which_step_they_are(make_checkpointer, tmp_path):
    checkpointer, state = make_checkpointer(), tensors(big=1)
    save(checkpointer, 1, state)
    state["big.0"][500] += 1
    save(checkpointer, 2, state)
    save(checkpointer, 3, state)
    first, second, third = (check_step(step_dir(tmp_path / "steps", i)).files[0].chunks for i in (1, 2, 3))
    assert first != second
    assert second[0] != third[0], "the header is stamped"


def test_saves_queue_up_and_say_that_they_waited(make_checkpointer):
    checkpointer, state = make_checkpointer(), tensors(big=20)
    started = [checkpointer.save(i, shards(state)) for i in range(1, 4)]
    assert started[0].waited_s == 0
    finished = checkpointer.wait(60)
    assert [s.iteration for s in finished] == [1, 2, 3]
    assert not any(s.failed for s in finished)
    assert any(s.waited_s > 0 for s in started)
    assert checkpointer.progress() == (0, 0)


def test_a_cap_on_memory_makes_the_save_flow_through_less(make_checkpointer):
    state = tensors(big=12)
    checkpointer = make_checkpointer(max_host_bytes=2 * CHUNK_BYTES)
    started = save(checkpointer, 1, state)
    assert started.size > 4 * CHUNK_BYTES
    assert checkpointer._background.writer.arena.capacity == 2 * CHUNK_BYTES
    assert_equal(load(checkpointer, state)[0], state)


def test_the_arena_is_made_once_and_replaced_when_the_state_grows(make_checkpointer):
    checkpointer = make_checkpointer()
    save(checkpointer, 1, tensors(1, big=2))
    first = checkpointer._background.writer
    save(checkpointer, 2, tensors(2, big=2))
    assert checkpointer._background.writer is first
    grown = tensors(3, big=9)
    save(checkpointer, 3, grown)
    assert checkpointer._background.writer is not first
    assert_equal(load(checkpointer, grown)[0], grown)


def test_tensors_that_are_not_contiguous(make_checkpointer):
    checkpointer = make_checkpointer()
    base = torch.arange(60.0).view(6, 10)
    checkpointer.save(1, [whole("t", base.T), whole("s", base[:, ::2])])
    checkpointer.wait(60)
    target = torch.zeros(6, 10)
    strided = torch.zeros(6, 10)
    checkpointer.load([whole("t", target.T), whole("s", strided[:, ::2])])
    assert torch.equal(target, base)
    assert torch.equal(strided[:, ::2], base[:, ::2])


def test_any_part_of_a_tensor_can_be_loaded(make_checkpointer):
    checkpointer = make_checkpointer()
    data = torch.randn(64, 30, 7)
    parts = [
        Shard("w", data[:, i * 10 : (i + 1) * 10].contiguous(), (64, 30, 7), (0, i * 10, 0), (64, 10, 7))
        for i in range(3)
    ]
    checkpointer.save(1, parts)
    checkpointer.wait(60)
    random = np.random.default_rng(0)
    for _ in range(20):
        low = [int(random.integers(0, n)) for n in data.shape]
        size = [int(random.integers(1, n - o + 1)) for n, o in zip(data.shape, low, strict=True)]
        box = data[tuple(slice(o, o + n) for o, n in zip(low, size, strict=True))]
        start, stop = sorted(random.integers(0, box.numel() + 1, 2).tolist())
        out = torch.zeros(stop - start)
        checkpointer.load([Shard("w", out, (64, 30, 7), tuple(low), tuple(size), (start, stop))])
        assert torch.equal(out, box.reshape(-1)[start:stop])


def test_what_is_missing_left_over_or_different_is_an_error_unless_asked_for(make_checkpointer):
    checkpointer, state = make_checkpointer(), tensors()
    save(checkpointer, 1, state)
    without = {key: tensor for key, tensor in state.items() if key != "bias"}
    with pytest.raises(CheckpointError, match=r"lacks 'rng.x'"):
        load(checkpointer, state | {"rng.x": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"holds 'bias', which nobody asks for"):
        load(checkpointer, without)
    assert load(checkpointer, without, partial=True)[1].unexpected == ["bias"]
    assert load(checkpointer, without, optional="bi")[1].unexpected == ["bias"]
    assert load(checkpointer, state | {"rng.x": torch.zeros(3)}, optional="rng.")[1].missing == ["rng.x"]
    with pytest.raises(CheckpointError, match=r"'bias' is F32 \(7,\) there, F64 \(7,\) here"):
        load(checkpointer, state | {"bias": torch.zeros(7, dtype=torch.float64)})
    with pytest.raises(CheckpointError, match="no complete step 2; there are 1"):
        load(checkpointer, state, 2)


def test_descriptions_that_cannot_be_saved_are_the_callers_mistake(make_checkpointer):
    checkpointer = make_checkpointer()
    with pytest.raises(CheckpointError, match="names must be unique"):
        checkpointer.save(1, [whole("a", torch.zeros(3)), whole("a", torch.zeros(4))])
    with pytest.raises(CheckpointError, match="complex128"):
        checkpointer.save(1, [whole("a", torch.zeros(3, dtype=torch.complex128))])
    with pytest.raises(CheckpointError, match="JSON"):
        checkpointer.save(1, [whole("a", torch.zeros(3))], common={"x": object()})
    for bad, reason in (
        ([Shard("a", torch.zeros(3), (4,), (0,), (3,))], "3 elements, the tensor has 4"),
        ([Shard("a", torch.zeros(3), (4,), (o,), (3,), r) for o, r in ((0, None), (1, None))], "6 elements"),
        ([Shard("a", torch.zeros(2), (4,), (o,), (2,)) for o in (0, 1)], "overlap"),
    ):
        checkpointer.save(1, bad)
        (finished,) = checkpointer.wait(60)
        assert reason in finished.error
    assert checkpointer.iterations() == []


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        (Retention(keep_last=2), [6, 7]),
        (Retention(keep_every=3), [3, 6, 7]),
        (Retention(keep_last=1, keep_every=4), [4, 7]),
        (Retention(keep_best=2), [2, 5, 7]),
        (Retention(), [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_retention(make_checkpointer, policy, left):
    checkpointer = make_checkpointer(retention=policy)
    for iteration in range(1, 8):
        score = {2: 0.1, 5: 0.2}.get(iteration, 1.0) if iteration != 4 else None
        save(checkpointer, iteration, tensors(iteration), score=score)
    assert checkpointer.iterations() == left
    assert_equal(load(checkpointer, tensors())[0], tensors(7))


@pytest.mark.parametrize(
    ("policy", "read"),
    [(Retention(), []), (Retention(keep_last=2, keep_every=2), [7, 6, 5, 3]), (Retention(keep_every=1), [7])],
)
def test_retention_reads_no_more_manifests_than_it_must(make_checkpointer, tmp_path, monkeypatch, policy, read):
    from ckpt import retention

    checkpointer, seen = make_checkpointer(), []
    for iteration in (2, 3, 4, 5, 6, 7):
        save(checkpointer, iteration, tensors(iteration))
    check = retention.check_step
    monkeypatch.setattr(retention, "check_step", lambda folder: seen.append(check(folder).iteration) or check(folder))
    assert retention.prune(tmp_path / "steps", policy) == sorted(set(read) & {3, 5})
    assert seen == read


def test_retention_never_takes_the_last_good_step(make_checkpointer, tmp_path):
    from ckpt.retention import prune

    checkpointer = make_checkpointer()
    for iteration in (1, 2, 3):
        save(checkpointer, iteration, tensors(iteration))
    root = tmp_path / "steps"
    for iteration in (2, 3):
        (step_dir(root, iteration) / "rank_00000.safetensors").unlink()
    assert prune(root, Retention(keep_last=1)) == []
    assert_equal(load(checkpointer, tensors())[0], tensors(1))
