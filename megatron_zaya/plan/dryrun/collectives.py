"""The collectives of a step: operation, bytes, group. The convention for bytes is that of `topology.cost`.

| operation | bytes of one call |
|---|---|
| all_reduce, broadcast | the buffer |
| reduce_scatter | the whole input of one rank |
| all_gather | the whole gathered output |
| all_to_all | what one rank sends in all, its own share included |
| send_recv | the message, counted at the sender |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# c10d operation -> (our name, index of the argument whose bytes count)
_OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "send": ("send_recv", 0),
}
_SILENT = ("recv_", "barrier", "recv_any_source_")


@dataclass(frozen=True)
class Collective:
    """``calls`` times the same call."""

    op: str
    size_bytes: int
    ranks: tuple[int, ...]
    """Members of the group, global ranks; for send_recv the sender and the receiver."""
    phase: str
    calls: int = 1


def _tensors(argument: Any) -> Iterable[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _tensors(item)


class CollectiveLog:
    """Counts equal calls. Groups of one rank move nothing and are left out."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, int, tuple[int, ...], str]] = Counter()

    def see(self, name: str, args: tuple, phase: str) -> None:
        """Take note of the c10d operation ``name``."""
        if name in _SILENT:
            return
        op, index = _OPERATIONS[name]
        group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
        group = torch.distributed.ProcessGroup.unbox(group)
        ranks = tuple(torch.distributed.get_process_group_ranks(group))
        if op == "send_recv":
            ranks = (ranks[group.rank()], ranks[args[2]])
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(args[index]))
        if len(ranks) > 1:
            self._calls[op, size, ranks, phase] += 1

    def clear(self) -> None:
        """Forget what was seen."""
        self._calls.clear()

    def summary(self) -> list[Collective]:
        """Return what happened, largest traffic first."""
        found = [Collective(*key, calls=calls) for key, calls in self._calls.items()]
        return sorted(found, key=lambda c: -c.size_bytes * c.calls)
