"""A state of a few tensors of several types, and a checkpointer whose writer ends with the test."""

from __future__ import annotations

import pytest
import torch

from ckpt.checkpointer import Checkpointer
from ckpt.shard import Shard, whole


def tensors(seed: int = 0, big: int = 0) -> dict[str, torch.Tensor]:
    """Small tensors of every kind, and ``big`` ones of 3 MB so that a file has several chunks."""
    random = torch.Generator().manual_seed(seed)
    state = {
        "scalar": torch.randn((), generator=random),
        "empty": torch.empty(0, 3),
        "bias": torch.randn(7, generator=random),
        "half": torch.randn(33, 5, generator=random).bfloat16(),
        "counts": torch.randint(0, 1000, (3, 4, 5), generator=random),
        "flags": torch.rand(11, generator=random) > 0.5,
    }
    return state | {f"big.{i}": torch.randn(1000, 768, generator=random) for i in range(big)}


def shards(state: dict[str, torch.Tensor]) -> list[Shard]:
    return [whole(key, tensor) for key, tensor in state.items()]


def zeros(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros_like(tensor) for key, tensor in state.items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.fixture
def make_checkpointer(tmp_path):
    """Return Checkpointers under tmp_path/steps; all are closed in the end."""
    made = []

    def make(root=None, **options) -> Checkpointer:
        made.append(Checkpointer(root or tmp_path / "steps", **options))
        return made[-1]

    yield make
    for checkpointer in made:
        checkpointer.close(timeout_s=10)
