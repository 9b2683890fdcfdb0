"""Loading the distributed optimizer when it runs torch's own Adam (no apex, no TransformerEngine).

torch's Adam keeps a step counter per parameter, which Megatron-Core 0.16 to 0.19 mishandle in three places on the way
back from a checkpoint. With a fused Adam, which counts per group, every function here changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def _parts_with_torch_adam(optimizer: MegatronOptimizer) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            yield part


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter the state that its first step would.

    The distributed optimizer describes its state before reading it, and cannot while there is none.
    """
    for part in _parts_with_torch_adam(optimizer):
        adam = part.optimizer
        for parameter in (p for group in adam.param_groups for p in group["params"] if not adam.state[p]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.zeros(()), **moments}


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Call ``optimizer.load_state_dict`` so that torch's step counters survive it."""
    for part in _parts_with_torch_adam(optimizer):
        if isinstance(part, DistributedOptimizer):
            _keep_step_while_loading(part)
    optimizer.load_state_dict(state)
    for part in _parts_with_torch_adam(optimizer):
        vars(part).pop("_set_main_param_and_optimizer_states", None)
        # One tensor was loaded into every parameter; Adam would advance it once per parameter and step.
        for parameter_state in part.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()


def _keep_step_while_loading(part: DistributedOptimizer) -> None:
    """Hand the setter the counter that it looks for and that the loaded tensors do not hold."""
    stock = part._set_main_param_and_optimizer_states

    def with_step(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        main_param = part.optimizer.param_groups[group]["params"][order]
        stock(model_param, {"step": part.optimizer.state[main_param]["step"], **tensors})

    part._set_main_param_and_optimizer_states = with_step
