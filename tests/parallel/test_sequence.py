"""Plans of context parallelism: what a rank holds, what goes where, and where documents start. No ranks needed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_zaya.parallel.sequence import (
    LocalSequence,
    chunks_of,
    halo_plan,
    local_spans,
    merge_zigzag,
    owner_of,
    split_zigzag,
)

SIZES = st.sampled_from([1, 2, 3, 4, 8])


class Group:
    """Stands for a process group where only its numbers are asked for."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@given(SIZES)
def test_every_chunk_has_one_owner_and_every_rank_equal_causal_work(size):
    held = [chunks_of(rank, size) for rank in range(size)]
    assert sorted(chunk for chunks in held for chunk in chunks) == list(range(max(1, 2 * size if size > 1 else 1)))
    assert all(owner_of(chunk, size) == rank for rank, chunks in enumerate(held) for chunk in chunks if size > 1)
    assert len({sum(chunk + 0.5 for chunk in chunks) for chunks in held}) == 1


@given(SIZES, st.integers(1, 5), st.integers(0, 1))
def test_split_and_merge_are_inverse_and_spans_say_what_is_held(size, rows, dim):
    length = rows * (2 * size if size > 1 else 1)
    x = torch.arange(length * 3).view(length, 3)
    x = x if dim == 0 else x.t()
    parts = [split_zigzag(x, dim, rank, size) for rank in range(size)]
    assert torch.equal(merge_zigzag(parts, dim), x)
    for rank, part in enumerate(parts):
        for span in local_spans(length, rank, size):
            held = part.narrow(dim, span.offset, span.stop - span.start)
            assert torch.equal(held, x.narrow(dim, span.start, span.stop - span.start))


@given(SIZES)
def test_the_halo_plan_feeds_every_chunk_but_the_first_from_the_one_before(size):
    moves = halo_plan(size)
    fed = [chunks_of(move.target, size)[move.target_slot] for move in moves]
    assert fed == list(range(1, 2 * size if size > 1 else 1))
    for move, chunk in zip(moves, fed, strict=True):
        assert chunks_of(move.source, size)[move.source_slot] == chunk - 1
        assert abs(move.source - move.target) <= 1, "neighbours only"
    # One message at most goes from one rank to another, so that nothing tells messages apart but their ends.
    across = [(move.source, move.target) for move in moves if move.source != move.target]
    assert len(set(across)) == len(across)


@st.composite
def packed(draw):
    size, rows, batch = draw(SIZES), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    length = rows * (2 * size if size > 1 else 1)
    starts = draw(st.sets(st.integers(1, batch * length - 1), max_size=6)) if batch * length > 1 else set()
    return length, batch, size, sorted({0, batch * length} | starts)


@given(packed())
def test_positions_count_from_the_start_of_each_document(case):
    length, batch, size, starts = case
    expected = torch.cat([torch.arange(stop - start) for start, stop in pairwise(starts)]).view(batch, length)
    for sample in range(batch):  # a document that runs on into the next sample starts anew there
        inside = [start for start in starts if sample * length < start < (sample + 1) * length]
        first = inside[0] - sample * length if inside else length
        expected[sample, :first] = torch.arange(first)
    for rank in range(size):
        group = Group(rank, size)
        sequence = LocalSequence.of(length, batch, group, torch.tensor(starts), torch.device("cpu"))
        assert torch.equal(sequence.position_SB, split_zigzag(expected.t(), 0, rank, size))
        whole = LocalSequence.of(length, batch, group, None, torch.device("cpu"))
        assert torch.equal(whole.position_SB, split_zigzag(torch.arange(length).unsqueeze(1), 0, rank, size))
        assert whole.is_plain == (size == 1) and not sequence.is_plain


@pytest.mark.parametrize("starts", [[0, 3, 3, 8], [1, 8], [0, 4], [0, 9], [0, 5, 2, 8]])
def test_boundaries_that_do_not_fit_are_refused(starts):
    with pytest.raises(ValueError, match="cu_seqlens must grow from 0 to 2 x 4 = 8"):
        LocalSequence.of(4, 2, Group(0, 1), torch.tensor(starts), torch.device("cpu"))
