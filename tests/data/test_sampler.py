"""The order of samples depends on the cursor alone: not on ranks, micro-batches, workers or interruptions."""

from __future__ import annotations

from itertools import chain, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zaya.data.errors import DataError
from megatron_zaya.data.sampler import ResumableSampler, build_dataloader, evaluation_batches


class Numbers(torch.utils.data.Dataset):
    """Item i is i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor([i])}


def global_batches(total: int, consumed: int, micro: int, ranks: int, global_batch: int) -> list[list[int]]:
    """What all ranks read per optimizer step, in Megatron's order: micro-step by micro-step, rank by rank."""
    samplers = [ResumableSampler(total, consumed, micro, rank, ranks) for rank in range(ranks)]
    assert len({len(sampler) for sampler in samplers}) == 1
    steps = [list(chain.from_iterable(parts)) for parts in zip(*samplers, strict=True)]
    per_batch = global_batch // (micro * ranks)
    return [list(chain(*steps[i : i + per_batch])) for i in range(0, len(steps) - per_batch + 1, per_batch)]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4), st.integers(1, 5))
def test_global_batches_do_not_depend_on_the_layout(
    micro: int, ranks: int, accumulation: int, done: int, ahead: int
) -> None:
    batch = micro * ranks * accumulation
    total, consumed = (done + ahead) * batch, done * batch
    expected = [list(range(i, i + batch)) for i in range(consumed, total, batch)]
    assert global_batches(total, consumed, micro, ranks, batch) == expected
    assert global_batches(total, consumed, batch, 1, batch) == expected
    assert global_batches(total, consumed, 1, batch, batch) == expected


def test_the_order_is_megatrons() -> None:
    assert list(ResumableSampler(12, 4, 2, 1, 2)) == [[6, 7], [10, 11]]


def test_a_partial_step_is_dropped_and_the_end_is_an_error() -> None:
    sampler = ResumableSampler(11, 0, 2, 0, 2)
    assert len(sampler) == 2 and len(list(sampler)) == 2
    batches = iter(build_dataloader(Numbers(11), sampler))
    assert [batch["tokens"].flatten().tolist() for batch in islice(batches, 2)] == [[0, 1], [4, 5]]
    with pytest.raises(DataError, match="the training samples are used up"):
        next(batches)
    with pytest.raises(DataError, match="used up"):
        ResumableSampler(8, 8, 2, 0, 2)


@pytest.mark.parametrize("sizes", [(0, 0, 1), (1, 1, 1), (1, -1, 1), (1, 0, 0)])
def test_impossible_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="cannot be"):
        ResumableSampler(8, 0, *sizes)


def test_loading_ahead_loses_nothing() -> None:
    sampler = ResumableSampler(6, 2, 2, 0, 1)
    for workers in (0, 2):
        batches = iter(build_dataloader(Numbers(6), sampler, num_workers=workers))
        assert [batch["tokens"].flatten().tolist() for batch in islice(batches, 2)] == [[2, 3], [4, 5]]
        with pytest.raises(DataError):
            next(batches)


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    next(iter(build_dataloader(Numbers(4), ResumableSampler(4, 0, 2, 0, 1))))
    next(evaluation_batches(Numbers(4), 2, 0, 1))
    assert torch.equal(before, torch.get_rng_state())


def test_evaluation_starts_over() -> None:
    batches = evaluation_batches(Numbers(5), 1, 1, 2)
    assert [batch["tokens"].item() for batch in islice(batches, 5)] == [1, 3, 1, 3, 1]
    with pytest.raises(DataError):
        evaluation_batches(Numbers(1), 1, 0, 2)
