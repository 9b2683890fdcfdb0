"""Peak bytes of the tensors that a piece of code makes, on any device: every storage until Python lets go of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_zaya.plan.dryrun.live_bytes import LiveBytes


class _Watch(TorchDispatchMode):
    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.live.see(leaf)
        return out


@contextlib.contextmanager
def peak_bytes(existing: Iterable[Tensor]) -> Iterator[LiveBytes]:
    """Watch a block; afterwards `peak.total_bytes` of what is yielded is the most that it had allocated.

    Args:
        existing: tensors from before, which are not counted.
    """
    live = LiveBytes()
    for tensor in existing:
        live.see(tensor)
    before = live.live
    live.restart_peak()
    with _Watch(live):
        yield live
    live.peak.total_bytes -= before
