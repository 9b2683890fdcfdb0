"""Operations on the meta device whose result depends on values: what they return when there are none.

Routing decides shapes, so the routing tensors are real: the router's argmax returns a real tensor on the host with the
routing that the caller asked for, and everything computed from it (maps, counts, sort orders) is real too, as are the
integer buffers that gather it from other ranks (which are taken to route alike). Where a real index meets a meta
tensor, its shape is enough. A number that is read from a meta tensor is 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass
class ForcedRouting:
    """Which class each token takes.

    Args:
        classes: router classes; the last one skips.
        local_experts: the experts of the rank under study.
        skip_share: share of the tokens without an expert.
        skew: load of the rank's experts over the mean load.
    """

    classes: int
    local_experts: range
    skip_share: float
    skew: float = 1.0
    _cache: dict[int, Tensor] = field(default_factory=dict)

    def counts(self, tokens: int) -> list[int]:
        """Return the tokens per class."""
        experts = self.classes - 1
        dispatched = tokens - round(tokens * self.skip_share)
        here = len(self.local_experts)
        mine = dispatched if here == experts else min(dispatched, round(dispatched * self.skew * here / experts))
        per_class = [0] * self.classes
        for group, total in ((self.local_experts, mine), (self._others(), dispatched - mine)):
            for position, expert in enumerate(group):
                per_class[expert] = total // len(group) + (position < total % len(group))
        per_class[-1] = tokens - dispatched
        return per_class

    def _others(self) -> list[int]:
        return [e for e in range(self.classes - 1) if e not in self.local_experts]

    def assign(self, tokens: int) -> Tensor:
        """Return the class of each token, int64 on the host."""
        if tokens not in self._cache:
            counts = torch.tensor(self.counts(tokens))
            self._cache[tokens] = torch.repeat_interleave(torch.arange(self.classes), counts)
        return self._cache[tokens].clone()


def _is_host(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta" and value.dim() > 0


def _on_meta(value: Any) -> bool:
    device = value.device if isinstance(value, Tensor) else value
    return isinstance(device, torch.device) and device.type == "meta"


def _to_shape(value: Any) -> Any:
    if _is_host(value):
        return torch.empty_like(value, device="meta")
    return type(value)(map(_to_shape, value)) if isinstance(value, list | tuple) else value


def _any(args: tuple, test: Any) -> bool:
    return any(test(a) or (isinstance(a, list | tuple) and _any(tuple(a), test)) for a in args)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """[T, I] x [E, I, O] -> [T, O], or, for the gradient of the weights, [O, T] x [T, I] -> [E, O, I]."""
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])


_REPLACED = {aten._grouped_mm.default: _grouped_mm}


def execute(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operation of which some arguments may be meta tensors."""
    inputs = (*args, *kwargs.values())
    if not _any(inputs, _on_meta):
        return function(*args, **kwargs)
    if function is aten.empty.memory_format and not kwargs.get("dtype", torch.float32).is_floating_point:
        return torch.zeros(args[0], dtype=kwargs["dtype"], device="cpu")
    if function is aten._local_scalar_dense.default:
        return 1.0 if args[0].dtype.is_floating_point else 1
    if function is aten._to_copy.default and kwargs.get("device") == torch.device("cpu") and _on_meta(args[0]):
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
    if function is aten.masked_select.default:
        return args[0].new_empty(int(args[1].sum()))
    if function is aten._to_copy.default or not _any(inputs, _is_host):
        return _REPLACED.get(function, function)(*args, **kwargs)
    args, kwargs = _to_shape(args), {name: _to_shape(value) for name, value in kwargs.items()}
    return _REPLACED.get(function, function)(*args, **kwargs)
