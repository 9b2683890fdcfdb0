"""The optimizer that training sees: Megatron-Core's chain that leaves a step out when its gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_zaya.optim.distributed import ShardedOptimizer

GROUPS = {
    "embedding": ("embedding.", "output_layer."),
    "experts": (".experts.",),
    "router": (".router.",),
    "attention": (".self_attention.",),
    "other": ("",),
}


def group_of(name: str) -> str:
    """Return the group of a parameter (by its name in the whole model) for norms by group."""
    return next(group for group, parts in GROUPS.items() if any(part in name for part in parts))


def _stepped(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (model parameter, what the optimizer steps for it) of one part on this rank."""
    if isinstance(part, ShardedOptimizer):
        yield from part.model_and_main()
        return
    masters = {}
    if hasattr(part, "fp32_from_float16_groups"):
        pairs = zip(chain(*part.float16_groups), chain(*part.fp32_from_float16_groups), strict=True)
        masters = {main: parameter for parameter, main in pairs}
    for main in part.get_parameters():
        yield masters.get(main, main), main


class GuardedOptimizer(ChainedOptimizer):
    """`step` returns (False, norm, None), on all ranks alike, and changes nothing when the norm is not finite."""

    def __init__(self, parts: list[Any], names: Mapping[Tensor, str]) -> None:
        """Chain ``parts``; ``names`` gives the model's parameters their names in the whole model."""
        super().__init__(parts)
        self.names = names
        self.norm_groups_wanted = False
        """Set before a step to have :attr:`norm_by_group` filled by it; costs one small reduction."""
        self.norm_by_group: dict[str, float] = {}
        self._norm = math.nan

    def get_grad_norm(self) -> float:
        """Return the norm over the whole model, before clipping."""
        self._norm = super().get_grad_norm()
        self.norm_by_group = self._norms() if self.norm_groups_wanted else {}
        self.norm_groups_wanted = False
        return self._norm

    def step_with_ready_grads(self) -> bool:
        """Step if the norm of this step was finite; return whether."""
        return math.isfinite(self._norm) and super().step_with_ready_grads()

    def _gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, what is stepped, its gradient) on this rank."""
        for part in self.chained_optimizers:
            for parameter, main in _stepped(part):
                if main.grad is not None:
                    yield self.names[parameter], main, main.grad

    def _norms(self) -> dict[str, float]:
        sums = torch.zeros(len(GROUPS), dtype=torch.float64, device=self.get_loss_scale().device)
        for name, main, gradient in self._gradients():
            if param_is_not_shared(main) and param_is_not_tensor_parallel_duplicate(main):
                sums[list(GROUPS).index(group_of(name))] += gradient.double().square().sum()
        torch.distributed.all_reduce(sums, group=self.chained_optimizers[0].get_grad_stats_parallel_group())
        return dict(zip(GROUPS, sums.sqrt().tolist(), strict=True))

    def parameters_without_finite_gradient(self) -> list[str]:
        """Return the names of this rank's parameters whose gradient (or owned part of it) is not finite."""
        return sorted({name for name, _, gradient in self._gradients() if not torch.isfinite(gradient).all()})
