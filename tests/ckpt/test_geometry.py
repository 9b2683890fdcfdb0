"""Regions of tensors against numpy's own indexing, on random shapes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.geometry import overlap
from ckpt.region import Region, tiling_error


@st.composite
def regions(draw, shape):
    spans = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    box = tuple(b - a for a, b in spans)
    start, stop = sorted((draw(st.integers(0, math.prod(box))), draw(st.integers(0, math.prod(box)))))
    return Region(tuple(a for a, _ in spans), box, start, stop)


@st.composite
def two_regions(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    return shape, draw(regions(shape)), draw(regions(shape))


def elements(array: np.ndarray, region: Region) -> np.ndarray:
    box = array[tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))]
    return np.ravel(box)[region.start : region.stop]


@settings(max_examples=400, deadline=None)
@given(two_regions())
def test_copies_bring_exactly_what_both_hold(case):
    shape, source, target = case
    whole = np.arange(math.prod(shape)).reshape(shape)
    ours, wanted = elements(whole, source), elements(whole, target)
    out = np.full(len(wanted), -1)
    copies = overlap(source, target, shape)
    for s, t, n in zip(*copies, strict=True):
        assert (out[t : t + n] == -1).all()
        out[t : t + n] = ours[s : s + n]
    assert (out == np.where(np.isin(wanted, ours), wanted, -1)).all()
    assert int(copies.length.sum()) == len(np.intersect1d(ours, wanted))


def test_neighbouring_copies_are_joined():
    assert len(overlap(Region((0, 2), (100, 3), 0, 300), Region((0, 2), (100, 3), 7, 300), (100, 8)).length) == 1
    assert len(overlap(Region((0, 0), (100, 8), 0, 800), Region((10, 0), (20, 8), 0, 160), (100, 8)).length) == 1
    assert len(overlap(Region((0, 0), (100, 8), 0, 800), Region((10, 1), (20, 7), 0, 140), (100, 8)).length) == 20


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_grid_tiles_and_a_change_of_any_part_is_noticed(shape, cuts, random):
    shape = tuple(shape)
    numel = math.prod(shape)
    bounds = [0, *sorted(random.randint(0, numel) for _ in range(cuts)), numel]
    parts = [Region((0,) * len(shape), shape, a, b) for a, b in itertools.pairwise(bounds)]
    random.shuffle(parts)
    assert tiling_error(parts, shape) is None
    victim = next(i for i, part in enumerate(parts) if part.numel)
    assert "hold" in tiling_error(parts[:victim] + parts[victim + 1 :], shape)
    assert "hold" in tiling_error([*parts, parts[victim]], shape)


def test_overlapping_parts_of_the_right_size_are_noticed():
    assert "overlap" in tiling_error([Region((0,), (8,), 0, 4), Region((0,), (8,), 2, 6)], (8,))


@pytest.mark.parametrize("change", [{"global_offset": (3, 0)}, {"flattened_range": (0, 9)}, {"local_shape": (2,)}])
def test_a_shard_outside_its_tensor_is_an_error(change):
    import torch

    from ckpt.shard import Shard

    good = dict(key="w", data=torch.zeros(8), global_shape=(4, 4), global_offset=(2, 0), local_shape=(2, 4))
    assert Shard(**good).region == Region((2, 0), (2, 4), 0, 8)
    with pytest.raises(ValueError, match="w"):
        Shard(**good | change)
