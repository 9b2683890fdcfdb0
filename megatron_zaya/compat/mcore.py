"""Optimizer state before its first step, and step counters: torch's optimizers and fused ones keep them differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_zaya.optim.muon import MuonAdamW


def _counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def allocate_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter the state that its first step would, for what has none: it is described before it is read.

    torch's Adam keeps a step counter per parameter; fused Adams (apex, TransformerEngine) count per group.
    """
    for part in _parts(optimizer):
        inner = part.optimizer
        for main in (p for group in inner.param_groups for p in group["params"] if not inner.state[p]):
            inner.state[main] = {name: torch.zeros_like(main) for name in ("exp_avg", "exp_avg_sq")}
            if _counts_per_parameter(inner):
                inner.state[main]["step"] = torch.zeros(())


def steps_done(parts: Sequence[Any]) -> int:
    """Return how many steps Adam's bias correction counts; equal for all parameters."""
    counts: set[int] = set()
    for part in parts:
        inner = part.optimizer
        counts |= {inner.steps_done} if isinstance(inner, MuonAdamW) else _counters(inner)
    assert len(counts) == 1, f"parameters have taken different numbers of steps: {sorted(counts)}"
    return counts.pop()


def _counters(inner: torch.optim.Optimizer) -> set[int]:
    in_state = {int(state["step"]) for state in inner.state.values() if "step" in state}
    return in_state or {int(group["step"]) for group in inner.param_groups if "step" in group}


def set_steps_done(parts: Sequence[Any], steps: int) -> None:
    """Set the number of steps that Adam's bias correction counts."""
    for part in parts:
        inner = part.optimizer
        if isinstance(inner, MuonAdamW):
            inner.set_steps_done(steps)
        elif _counts_per_parameter(inner):
            for state in inner.state.values():
                state["step"].fill_(steps)
        else:
            for group in inner.param_groups:
                group["step"] = steps
