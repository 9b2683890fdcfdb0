"""Saving and loading steps through Megatron-Core, at one rank."""

from __future__ import annotations

import pytest
import torch

from ckpt.mcore import Checkpointer
from ckpt.steps import CheckpointError


def state(value: float, names=("a", "b")):
    from megatron.core.dist_checkpointing import ShardedTensor

    tensors = {n: ShardedTensor.from_rank_offsets(n, torch.full((4, 3), value), replica_id=0) for n in names}
    return tensors | {"note": {"value": value}}


def test_round_trip_and_replacing_a_step(pg_collection, tmp_path):
    checkpointer = Checkpointer(tmp_path / "steps")
    assert checkpointer.iterations() == []
    checkpointer.save(3, state(1.0))
    checkpointer.save(3, state(2.0))
    checkpointer.save(7, state(3.0))
    assert checkpointer.iterations() == [3, 7]
    assert not list(tmp_path.rglob("*.partial"))
    loaded = checkpointer.load(3, state(0.0))
    assert torch.equal(loaded["a"], torch.full((4, 3), 2.0))
    assert loaded["note"] == {"value": 2.0} == checkpointer.load_common(3)["note"]


def test_a_failed_save_leaves_the_old_step(pg_collection, tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, state(1.0))
    with pytest.raises(Exception, match=r"pickle|local"):
        checkpointer.save(3, state(2.0) | {"bad": lambda: None})
    assert checkpointer.iterations() == [3]
    assert torch.equal(checkpointer.load(3, state(0.0))["a"], torch.full((4, 3), 1.0))
    checkpointer.save(3, state(5.0))
    assert torch.equal(checkpointer.load(3, state(0.0))["a"], torch.full((4, 3), 5.0))


def test_what_is_missing_or_left_over_is_an_error_unless_asked_for(pg_collection, tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state(1.0))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        checkpointer.load(1, state(0.0, names=("a", "b", "c")))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        checkpointer.load(1, state(0.0, names=("a",)))
    assert torch.equal(checkpointer.load(1, state(0.0, names=("a",)), partial=True)["a"], torch.full((4, 3), 1.0))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        checkpointer.load(1, state(0.0, names=("c",)), partial=True)
