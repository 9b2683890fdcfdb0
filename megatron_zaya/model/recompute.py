"""Activation recompute: what the forward pass does not keep, the backward pass computes again, with equal results.

    granularity    what is run again
    selective      named parts of each layer: layernorm (cheapest), core_attn, experts, moe (all of the mixture)
    full           whole layers: "uniform" keeps the input of every group of layers, "block" reruns the first ones only

A second run must route each token as the first one did, even if a balancing bias moved in between or a kernel rounds
differently; so the choices of the experts are recorded, and replayed. Nothing is counted twice either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


@dataclass(frozen=True)
class RecomputePlan:
    """Field meanings are those of :class:`megatron_zaya.config.sections.ParallelConfig`."""

    granularity: str | None = None
    method: str = "uniform"
    num_layers: int = 1
    modules: frozenset[str] = frozenset()

    def reruns(self, module: str) -> bool:
        """Return whether the part ``module`` of each layer is run again by itself."""
        return self.granularity == "selective" and module in self.modules

    def layer_groups(self, count: int) -> list[tuple[range, bool]]:
        """Cut the ``count`` layers of a stage into runs, each with whether it is run again as a whole."""
        if self.granularity != "full":
            return [(range(count), False)]
        if self.method == "uniform":
            starts = range(0, count, self.num_layers)
            return [(range(start, min(start + self.num_layers, count)), True) for start in starts]
        rerun = min(self.num_layers, count)
        return [*((range(layer, layer + 1), True) for layer in range(rerun)), (range(rerun, count), False)]


class ChoiceTape:
    """Expert choices of the routers inside one recomputed stretch, in the order they were made."""

    def __init__(self) -> None:
        self._choices: list[Tensor] = []
        self._position: int | None = None

    @contextlib.contextmanager
    def used(self, replay: bool) -> Iterator[None]:
        """Let the routers inside this context record their choices, or replay the recorded ones."""
        self._position = 0 if replay else None
        token = _tape.set(self)
        try:
            yield
        finally:
            _tape.reset(token)
            self._position = None

    def choose(self, choose: Callable[[], Tensor]) -> Tensor:
        """Return the next choice [T] int64: what ``choose`` says the first time, and that again the second time."""
        if self._position is None:
            self._choices.append(choose())
            return self._choices[-1]
        self._position += 1
        return self._choices[self._position - 1]


_tape: ContextVar[ChoiceTape | None] = ContextVar("tape of the stretch that runs", default=None)


def chosen_once(choose: Callable[[], Tensor]) -> Tensor:
    """Return ``choose()`` [T] int64, or what it returned when this recomputed stretch ran the first time."""
    tape = _tape.get()
    return choose() if tape is None else tape.choose(choose)


def run_again_later(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call ``function`` and keep only its arguments and result; its backward pass calls it again."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    tape = ChoiceTape()
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # there is no dropout
        context_fn=lambda: (tape.used(replay=False), tape.used(replay=True)),
    )


@contextlib.contextmanager
def recomputed_when_saved(function: Callable[[Tensor], Tensor], x: Tensor) -> Iterator[Tensor]:
    """Yield ``function(x)``; where code inside the context saves it for its backward pass, only ``x`` is kept.

    For cheap functions whose input lives anyway, as a norm's does.
    """
    result = function(x)
    identity = result.untyped_storage()._cdata

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], int]:
        if saved.untyped_storage()._cdata != identity:
            return saved
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return function(x).as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield result
