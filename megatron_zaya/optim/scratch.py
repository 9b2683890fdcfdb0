"""Working space of an optimizer step, taken from memory that is free at that moment.

After ZeRO-1's reduce-scatter only this rank's chunk of each gradient bucket means anything; the rest holds partial sums
until the next step zeroes it. While the optimizer steps that rest is working space at no cost.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

ALIGNMENT_BYTES = 256


class Scratch:
    """Hands out buffers from one region, and from torch's allocator when it is used up."""

    def __init__(self, region: Tensor | None, device: torch.device) -> None:
        """Take a contiguous region that nobody reads between :meth:`empty` and the next step; None for none."""
        self.bytes = None if region is None else region.view(-1).view(torch.uint8)
        self.device = device
        self.used_bytes = 0
        self.allocated_bytes = 0
        """Bytes that did not fit and came from torch's allocator since the last reset."""

    def reset(self) -> None:
        """Give every buffer back."""
        self.used_bytes = self.allocated_bytes = 0

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised buffer [numel] that is valid until :meth:`reset`."""
        size = numel * dtype.itemsize
        if self.bytes is not None:
            # The region may start anywhere; what is handed out starts on an aligned address.
            start = self.used_bytes + -(self.bytes.data_ptr() + self.used_bytes) % ALIGNMENT_BYTES
            if start + size <= self.bytes.numel():
                self.used_bytes = start + size
                return self.bytes[start : start + size].view(dtype)
        self.allocated_bytes += size
        return torch.empty(numel, dtype=dtype, device=self.device)


def largest_free_region(buckets: Iterable[Tensor], rank: int, size: int) -> Tensor | None:
    """Return the largest contiguous part of the gradient buckets that no chunk of ``rank`` covers, or None.

    Args:
        buckets: flat gradient buckets, each cut into ``size`` equal chunks of which rank owns the ``rank``-th.
    """
    regions = []
    for bucket in buckets:
        chunk = bucket.numel() // size
        regions += [bucket[: rank * chunk], bucket[(rank + 1) * chunk :]]
    largest = max(regions, key=lambda region: region.numel(), default=None)
    return largest if largest is not None and largest.numel() else None
