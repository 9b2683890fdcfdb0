"""Loading Megatron-Core's unsharded optimizer when it runs torch's own Adam (no apex, no TransformerEngine).

torch's Adam keeps a step counter per parameter, which Megatron-Core 0.16 to 0.19 mishandle on the way back from a
checkpoint. With a fused Adam, which counts per group, and with our own sharded optimizer, nothing here has an effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def _unsharded_torch_adams(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Adam]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.Adam) and not isinstance(part, DistributedOptimizer):
            yield part.optimizer


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter the state that its first step would: it is described before it is read."""
    for adam in _unsharded_torch_adams(optimizer):
        for parameter in (p for group in adam.param_groups for p in group["params"] if not adam.state[p]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.zeros(()), **moments}


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Call ``optimizer.load_state_dict`` so that torch's step counters survive it."""
    optimizer.load_state_dict(state)
    for adam in _unsharded_torch_adams(optimizer):
        # One tensor was loaded into every parameter; Adam would advance it once per parameter and step.
        for parameter_state in adam.state.values():
            parameter_state["step"] = parameter_state["step"].clone()
