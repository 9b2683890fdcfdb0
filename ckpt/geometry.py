"""Parts of global tensors and what two of them share. Pure arithmetic over integers; units are elements.

A region is a box of a tensor, cut down to a run of the box's elements in row-major order. Both a tensor-parallel part
(the whole box) and a distributed optimizer's part (a run that ignores rows) are regions; the overlap of any two is a
list of contiguous copies. This is all that resharding needs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckpt.region import Region, span

Indices = NDArray[np.int64]


class Copies(NamedTuple):
    """Contiguous copies between two regions: positions count from the first element of each region."""

    source: Indices
    target: Indices
    length: Indices


class _Runs(NamedTuple):
    """Contiguous pieces of a region, ascending: position in the flattened global tensor, in the region, length."""

    position: Indices
    local: Indices
    length: Indices


def _runs(region: Region, global_shape: tuple[int, ...]) -> _Runs:
    """Cut a region, which must not be empty, into pieces that are contiguous in the global tensor."""
    split = len(global_shape)
    while split > 0 and region.shape[split - 1] == global_shape[split - 1]:
        split -= 1
    outer = max(split - 1, 0)  # dimensions that separate the pieces
    inner = math.prod(region.shape[outer:])
    strides = [math.prod(global_shape[axis + 1 :]) for axis in range(len(global_shape))]
    base = sum(offset * stride for offset, stride in zip(region.offset, strides, strict=True))
    numbers = np.arange(region.start // inner, -(-region.stop // inner), dtype=np.int64)
    position = np.full(len(numbers), base, dtype=np.int64)
    if outer:
        for index, stride in zip(np.unravel_index(numbers, region.shape[:outer]), strides, strict=False):
            position += index * stride
    first = np.maximum(numbers * inner, region.start)
    last = np.minimum((numbers + 1) * inner, region.stop)
    return _Runs(position + first - numbers * inner, first - region.start, last - first)


def _join(source: Indices, target: Indices, length: Indices) -> Copies:
    """Join neighbours that are contiguous on both sides."""
    broken = (source[1:] != source[:-1] + length[:-1]) | (target[1:] != target[:-1] + length[:-1])
    heads = np.concatenate([[0], np.flatnonzero(broken) + 1])
    return Copies(source[heads], target[heads], np.add.reduceat(length, heads))


_NOTHING = Copies(*(np.empty(0, dtype=np.int64) for _ in range(3)))


def _boxes_meet(a: Region, b: Region) -> bool:
    sides = zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    return all(ao < bo + bs and bo < ao + size for ao, size, bo, bs in sides)


def single_overlap(source: Region, target: Region, global_shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Return (source, target, length) of the one copy between two regions; None if there may be several.

    Most overlaps are of this kind, and this is quick. The length is 0 if nothing is shared.
    """
    if source.offset == target.offset and source.shape == target.shape:
        a_start, a_stop, b_start, b_stop = source.start, source.stop, target.start, target.stop
    elif not source.numel or not target.numel or not _boxes_meet(source, target):
        return 0, 0, 0
    else:
        a, b = span(source, global_shape), span(target, global_shape)
        if a is None or b is None:
            return None
        a_start, a_stop, b_start, b_stop = *a, *b
    start, stop = max(a_start, b_start), min(a_stop, b_stop)
    return (start - a_start, start - b_start, stop - start) if start < stop else (0, 0, 0)


def overlap(source: Region, target: Region, global_shape: tuple[int, ...]) -> Copies:
    """Return the copies that bring every element of ``target`` that ``source`` holds, in ascending order."""
    single = single_overlap(source, target, global_shape)
    if single is not None:
        return Copies(*np.array(single, dtype=np.int64).reshape(3, 1)) if single[2] else _NOTHING
    a, b = _runs(source, global_shape), _runs(target, global_shape)
    low = np.searchsorted(b.position + b.length, a.position, side="right")
    high = np.searchsorted(b.position, a.position + a.length, side="left")
    counts = np.maximum(high - low, 0)
    total = int(counts.sum())
    if not total:
        return _NOTHING
    ia = np.repeat(np.arange(len(counts)), counts)
    ib = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    start = np.maximum(a.position[ia], b.position[ib])
    stop = np.minimum(a.position[ia] + a.length[ia], b.position[ib] + b.length[ib])
    return _join(a.local[ia] + start - a.position[ia], b.local[ib] + start - b.position[ib], stop - start)


def runs_overlap(regions: list[Region], global_shape: tuple[int, ...]) -> bool:
    """Return whether any two of the regions, none of them empty, share an element."""
    filled = [_runs(region, global_shape) for region in regions]
    position = np.concatenate([runs.position for runs in filled])
    length = np.concatenate([runs.length for runs in filled])
    order = np.argsort(position)
    position, length = position[order], length[order]
    return bool((position[1:] < position[:-1] + length[:-1]).any())
