"""Bias-only balancing of the experts (arXiv 2605.05365, eq. 5): no auxiliary loss touches the gradient.

The balancing bias b of a layer follows an AdamW-like step on the pseudo-gradient p_e - t_e, where p_e is the share of
the tokens that went to class e and t_e its target: a class that got too much becomes less attractive. The share is
that of the global batch (eq. 5), or of each micro-batch in turn (arXiv 2511.17127 says "micro-batch"). Either way the
biases change between optimizer steps only: a bias that moves inside a step would route the recomputed and the original
forward pass, or two pipeline stages, differently. Step size and betas of the original training are not published; the
defaults are those of AMD's public port.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_zaya.model.router import ZayaRouter

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class LoadReport:
    """How the tokens of a global batch spread over the experts of L layers; lists go by layer."""

    expert_loads: list[list[float]]
    """[L][E] in multiples of an even share of the layer's dispatched tokens."""
    load_violation: list[float]
    """(Busiest expert / even share) - 1."""
    load_entropy: list[float]
    """Entropy of the experts' load, in multiples of its maximum; 1 is even."""
    dead_experts: list[int]
    """Experts without a token."""
    skip_rate: list[float]
    """Share of the tokens that went to the skip class."""

    @property
    def max_expert_load(self) -> float:
        """Busiest expert of any layer, in multiples of an even share."""
        return max(self.load_violation) + 1


def load_report(counts_LN: np.ndarray) -> LoadReport:
    """Return the report of tokens per layer and class (the skip class is the last), summed over the global batch."""
    experts_LE = counts_LN[:, :-1]
    experts = experts_LE.shape[1]
    share_LE = experts_LE / np.maximum(experts_LE.sum(axis=1, keepdims=True), 1)
    entropy_L = -(share_LE * np.log(np.maximum(share_LE, 1e-300))).sum(axis=1) / math.log(max(experts, 2))
    load_LE = share_LE * experts
    skip_L = counts_LN[:, -1] / np.maximum(counts_LN.sum(axis=1), 1)
    return LoadReport(
        expert_loads=load_LE.tolist(),
        load_violation=(load_LE.max(axis=1) - 1).tolist(),
        load_entropy=entropy_L.tolist(),
        dead_experts=(experts_LE == 0).sum(axis=1).tolist(),
        skip_rate=skip_L.tolist(),
    )


class BiasBalancer:
    """Moves the balancing biases of this rank's routers once per optimizer step."""

    def __init__(self, routers: Mapping[int, ZayaRouter], update_rate: float, skip_target: float | None) -> None:
        """Take the routers of this rank.

        Args:
            routers: by layer (0-based, over all stages); the layer names the state in checkpoints.
            update_rate: Adam's step size; 0 leaves the biases where they are.
            skip_target: share of the tokens that should skip; None means as much as each expert gets.
        """
        self.layers, self.routers, self.update_rate = list(routers), list(routers.values()), update_rate
        bias = self.routers[0].balancing_bias
        experts = len(bias) - 1
        skip = 1 / (experts + 1) if skip_target is None else skip_target
        self.target_N = torch.full_like(bias, (1 - skip) / experts)
        self.target_N[-1] = skip
        self.exp_avg_LN = torch.zeros(len(self.routers), len(bias), dtype=torch.float32, device=bias.device)
        self.exp_avg_sq_LN = torch.zeros_like(self.exp_avg_LN)

    def step(self, counts_MLN: Tensor, updates_done: int) -> int:
        """Update every bias once per entry of the first axis.

        Args:
            counts_MLN: tokens per layer and class of each micro-batch, or of the global batch (M = 1), summed over all
                ranks that see different tokens; equal on all ranks that hold the layer.
            updates_done: updates before these, for Adam's bias correction.

        Returns:
            Updates done now.
        """
        for counts_LN in counts_MLN:
            updates_done += 1
            self._update(counts_LN, updates_done)
        return updates_done

    @torch.no_grad()
    def _update(self, counts_LN: Tensor, number: int) -> None:
        if not self.update_rate:
            return
        share_LN = counts_LN / counts_LN.sum(dim=1, keepdim=True)
        gradient_LN = share_LN.float() - self.target_N
        self.exp_avg_LN.lerp_(gradient_LN, 1 - BETA1)
        self.exp_avg_sq_LN.lerp_(gradient_LN.square(), 1 - BETA2)
        mean_LN = self.exp_avg_LN / (1 - BETA1**number)
        spread_LN = (self.exp_avg_sq_LN / (1 - BETA2**number)).sqrt() + EPS
        for router, update_N in zip(self.routers, self.update_rate * mean_LN / spread_LN, strict=True):
            router.balancing_bias -= update_N

    def sharded_state_dict(self, pg_collection: ProcessGroupCollection) -> dict[str, ShardedTensor]:
        """Describe the moments to checkpoints, one tensor per layer, so that any pipeline split can read them."""
        replica = (0, pg_collection.tp.rank(), pg_collection.dp_cp.rank())
        return {
            f"{name}.{layer}": ShardedTensor.from_rank_offsets(f"balancing.{name}.{layer}", row, replica_id=replica)
            for name, moments in (("exp_avg", self.exp_avg_LN), ("exp_avg_sq", self.exp_avg_sq_LN))
            for layer, row in zip(self.layers, moments, strict=True)
        }
