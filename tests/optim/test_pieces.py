"""The plan of distributed Muon: every element of every matrix exactly once, one owner each, bounded waves."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zaya.optim.pieces import Slot, make_plan, workspaces


@st.composite
def grids(draw):
    """(slots of one bucket, tensor-parallel size, data-parallel size)."""
    dp_size = draw(st.integers(1, 9))
    tp_size = draw(st.sampled_from([1, 2, 4]))
    slots, position = [], 0
    for number in range(draw(st.integers(1, 5))):
        position += draw(st.integers(0, 70))
        stack = draw(st.sampled_from([(), (3,), (2, 2)]))
        shape = (*stack, draw(st.integers(1, 6)) * 2, draw(st.integers(1, 9)))
        copies = draw(st.sampled_from([size for size in (1, 2, 4) if tp_size % size == 0]))
        place = dict(tp_axis=draw(st.sampled_from([0, 1])), copies=copies, row_parts=draw(st.sampled_from([1, 2])))
        slots.append((f"p{number}", shape, position, place))
        position += prod(shape)
    numel = -(-position // dp_size) * dp_size
    return [Slot(name, shape, start, numel, **place) for name, shape, start, place in slots], tp_size, dp_size


@settings(max_examples=200, deadline=None)
@given(grids())
def test_every_element_is_in_one_piece_and_every_piece_where_its_rank_owns_it(grid):
    slots, tp_size, dp_size = grid
    plan = make_plan(slots, tp_size, dp_size)
    seen: dict[tuple[int, int], set[int]] = {}
    for matrix in plan.matrices:
        assert sum(piece.numel for piece in matrix.pieces) == matrix.rows * matrix.cols
        assert sum(rows * cols for rows, cols in matrix.slabs) == matrix.rows * matrix.cols
        for piece in matrix.pieces:
            t, d = divmod(piece.rank, dp_size)
            start, end = slots[matrix.slot].owned(d, dp_size)
            assert start <= piece.start < piece.start + piece.numel <= end
            elements = seen.setdefault((matrix.slot, t), set())
            new = set(range(piece.start, piece.start + piece.numel))
            assert not elements & new
            elements |= new
    assert all(len(seen[index, t]) == slot.numel for index, slot in enumerate(slots) for t in range(tp_size))


@settings(max_examples=100, deadline=None)
@given(grids())
def test_each_matrix_is_done_once_by_a_rank_that_holds_some_of_it(grid):
    slots, tp_size, dp_size = grid
    plan = make_plan(slots, tp_size, dp_size)
    done = [index for indices in plan.local.values() for index in indices]
    done += [index for wave in plan.waves for index in wave.values()]
    assert sorted(done) == list(range(len(plan.matrices)))
    for index, owner in enumerate(plan.owners):
        assert owner in {piece.rank for piece in plan.matrices[index].pieces}
    for rank, indices in plan.local.items():
        assert all(len(plan.matrices[i].pieces) == 1 and plan.owners[i] == rank for i in indices)


def test_value_halves_follow_tensor_parallelism():
    """Two matrices stored one below the other: with two ranks each holds one, with one rank both."""
    together = make_plan([Slot("v", (8, 5), 0, 40, row_parts=2)], 1, 1)
    apart = make_plan([Slot("v", (4, 5), 0, 20, tp_axis=0, row_parts=2)], 2, 1)
    assert [(m.rows, m.cols, len(m.pieces)) for m in together.matrices] == [(4, 5, 1)] * 2
    assert [(m.rows, m.cols, [p.rank for p in m.pieces]) for m in apart.matrices] == [(4, 5, [0]), (4, 5, [1])]


def test_stacked_experts_are_matrices_of_their_own():
    plan = make_plan([Slot("fc1", (3, 2, 4, 5), 0, 120)], 1, 1)
    assert len(plan.matrices) == 6 and {(m.rows, m.cols) for m in plan.matrices} == {(4, 5)}


def test_rows_that_do_not_hold_the_matrices_are_refused():
    with pytest.raises(ValueError, match="v: 5 rows do not hold 2"):
        make_plan([Slot("v", (5, 4), 0, 20, row_parts=2)], 1, 1)


def test_work_is_spread_and_the_working_space_does_not_grow_with_the_model():
    """A stack of equal matrices over ranks that each hold 1.3 of them."""
    sizes = []
    for matrices in (16, 64, 256):
        dp_size = matrices * 3 // 4
        plan = make_plan([Slot("fc", (matrices, 12, 12), 0, matrices * 144)], 1, dp_size)
        assert max(plan.owners.count(rank) for rank in range(dp_size)) <= 2
        sizes.append(max(needed.numel for needed in workspaces(plan, dp_size)))
        assert len(plan.waves) <= 2
    assert sizes[0] == sizes[-1]
