"""Parts of a global tensor, and whether several make all of it. Units are elements. Without numpy where that can be."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple


class Region(NamedTuple):
    """Elements [start, stop) of the box at ``offset`` with ``shape``, counted in row-major order of the box."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def span(region: Region, global_shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return [start, stop) of a region in the flattened global tensor if it is contiguous there, else None."""
    position, inner, contiguous = 0, 1, True
    for offset, size, whole in zip(
        reversed(region.offset), reversed(region.shape), reversed(global_shape), strict=True
    ):
        if size != 1 and not contiguous:
            return None
        position += offset * inner
        contiguous = contiguous and size == whole
        inner *= whole
    return position + region.start, position + region.stop


def overlapping(regions: list[Region], global_shape: tuple[int, ...]) -> bool:
    """Return whether any two of the regions share an element."""
    regions = [region for region in regions if region.stop > region.start]
    if len(regions) < 2:
        return False
    spans = [span(region, global_shape) for region in regions]
    if None not in spans:  # each contiguous, as most are
        ordered = sorted(one for one in spans if one is not None)
        return any(start < stop for (_, stop), (start, _) in itertools.pairwise(ordered))
    from ckpt.geometry import runs_overlap  # numpy: a writer starts faster without it

    return runs_overlap(regions, global_shape)


def tiling_error(regions: list[Region], global_shape: tuple[int, ...]) -> str | None:
    """Return None if the regions hold every element of the tensor exactly once, else what is wrong."""
    numel = math.prod(global_shape)
    held = sum(region.numel for region in regions)
    if held != numel:
        return f"its parts hold {held} elements, the tensor has {numel}"
    return "some of its parts overlap" if overlapping(regions, global_shape) else None
