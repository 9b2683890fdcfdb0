"""A part of a global tensor. Units are elements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """Elements [start, stop) of the box at ``offset`` with ``shape``, counted in row-major order of the box."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start
