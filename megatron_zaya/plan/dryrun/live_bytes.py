"""Bytes of live tensors over time: every storage that an operation makes, until Python and autograd let go of it.

Invariant: `live` is the sum of `bytes` over the storages that exist; storages that existed before tracking began and
host tensors handed in by the caller are not counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@dataclass
class Peak:
    """The moment with the most live bytes of one phase."""

    total_bytes: int = 0
    by_category: dict[str, int] = field(default_factory=dict)
    moment: str = ""
    """What was running: phase, module, operation."""


@dataclass
class _Allocation:
    bytes: int
    category: str
    reference: weakref.ref


class LiveBytes:
    """Counts storages. `category` labels what is allocated from now on, `moment` says what is running."""

    def __init__(self) -> None:
        self.live = 0
        self.category, self.moment = "activations", ""
        self.peak = Peak()
        self._by_category: Counter[str] = Counter()
        self._allocations: dict[int, _Allocation] = {}

    def see(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._allocations:
            return
        reference = weakref.ref(storage, lambda _, key=key: self._forget(key))
        self._allocations[key] = _Allocation(storage.nbytes(), self.category, reference)
        self._add(self.category, storage.nbytes())

    def relabel(self, tensor: Tensor, category: str) -> None:
        """Move the storage of ``tensor``, if it is counted, to another category."""
        allocation = self._allocations.get(tensor.untyped_storage()._cdata)
        if allocation is not None:
            self._by_category[allocation.category] -= allocation.bytes
            self._by_category[category] += allocation.bytes
            allocation.category = category

    def restart_peak(self) -> None:
        """Begin a new phase: its peak starts at what is live now."""
        self.peak = Peak()
        self._note_peak()

    def _add(self, category: str, count: int) -> None:
        self.live += count
        self._by_category[category] += count
        if self.live > self.peak.total_bytes:
            self._note_peak()

    def _note_peak(self) -> None:
        categories = {name: count for name, count in self._by_category.items() if count}
        self.peak = Peak(self.live, categories, self.moment)

    def _forget(self, key: int) -> None:
        allocation = self._allocations.pop(key)
        self.live -= allocation.bytes
        self._by_category[allocation.category] -= allocation.bytes

    def _resized(self, storage: Any) -> None:
        allocation = self._allocations.get(storage._cdata)
        if allocation is not None:
            change, allocation.bytes = storage.nbytes() - allocation.bytes, storage.nbytes()
            self._add(allocation.category, change)

    @contextlib.contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Notice `UntypedStorage.resize_`, by which activation recomputation frees memory; it is no operation."""
        original = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            result = original(storage, size)
            self._resized(storage)
            return result

        with patch.object(torch.UntypedStorage, "resize_", resize):
            yield
