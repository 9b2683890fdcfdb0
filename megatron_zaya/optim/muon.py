"""MuonAdamW: torch's AdamW whose "muon" groups take orthogonalised steps instead (arXiv 2511.17127, section V).

    m <- mu m + g                      momentum in fp32, on the shard that this rank owns
    O  = NewtonSchulz(g + mu m)        of the whole logical matrix (Nesterov; without it NewtonSchulz(m))
    w <- (1 - lr wd) w - lr 0.2 sqrt(max(rows, columns)) O

The decay uses the base learning rate that AdamW has, the factor gives O the root mean square of AdamW's updates
(Liu et al. 2025). It is an AdamW so that Megatron-Core's distributed optimizer, which owns shards, norm, clipping and
the gathering of parameters, takes it as its inner optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Orthogonalize = Callable[[dict[Tensor, Tensor]], None]


class MuonAdamW(torch.optim.AdamW):
    """One optimizer for both kinds of parameters.

    A group with ``algorithm="muon"`` also has ``momentum`` and ``nesterov``. State exists from :meth:`allocate` on:
    "momentum_buffer" for Muon; "exp_avg", "exp_avg_sq" and torch's "step" for AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self.orthogonalize: Orthogonalize | None = None
        """Replaces, in place, what is to be orthogonalised; collective. By shard of a parameter."""
        self.update_scales: dict[Tensor, float] = {}
        """By shard: 0.2 sqrt(max(rows, columns)) of its matrices."""
        self.steps_done = 0

    def _groups(self, algorithm: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group.get("algorithm", "adamw") == algorithm]

    def allocate(self) -> None:
        """Create the state that the first step would, for what has none."""
        for group in self._groups("adamw"):
            for shard in group["params"]:
                if not self.state[shard]:
                    step = torch.zeros((), device=shard.device if group["fused"] else None)
                    moments = {name: torch.zeros_like(shard) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[shard] = {"step": step, **moments}
        for group in self._groups("muon"):
            for shard in group["params"]:
                if not self.state[shard]:
                    self.state[shard] = {"momentum_buffer": torch.zeros_like(shard)}

    def set_steps_done(self, steps: int) -> None:
        """Set the number of steps that AdamW's bias correction counts."""
        self.steps_done = steps
        for group in self._groups("adamw"):
            for shard in group["params"]:
                self.state[shard]["step"].fill_(steps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step. Collective over the ranks that share matrices. The gradients of Muon's shards are consumed."""
        assert closure is None, "the gradients are there already"
        everything = self.param_groups
        self.param_groups = self._groups("adamw")
        try:
            super().step()
        finally:
            self.param_groups = everything
        self._step_muon()
        self.steps_done += 1

    def _step_muon(self) -> None:
        groups = [group for group in self._groups("muon") if group["params"]]
        for group in groups:
            gradients = [shard.grad for shard in group["params"]]
            momenta = [self.state[shard]["momentum_buffer"] for shard in group["params"]]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            if group["nesterov"]:
                torch._foreach_add_(gradients, momenta, alpha=group["momentum"])
            else:
                torch._foreach_copy_(gradients, momenta)
        if self.orthogonalize is not None:
            self.orthogonalize({shard: shard.grad for group in groups for shard in group["params"]})
        for group in groups:
            shards, rate = group["params"], group["lr"]
            directions = [shard.grad for shard in shards]
            torch._foreach_mul_(shards, 1 - rate * group["weight_decay"])
            torch._foreach_mul_(directions, [-rate * self.update_scales[shard] for shard in shards])
            torch._foreach_add_(shards, directions)
