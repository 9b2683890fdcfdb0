"""Bias-only balancing of the experts (arXiv 2605.05365, eq. 5): no auxiliary loss touches the gradient.

The balancing bias b of a layer follows an Adam step on the pseudo-gradient p_e - t_e, where p_e is the share of the
global batch that went to class e and t_e its target: a class that got too much becomes less attractive. Step size
and betas of the original training are not published; the defaults are those of AMD's public port.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_zaya.model.router import ZayaRouter

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


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

    @torch.no_grad()
    def step(self, counts_LN: Tensor, iteration: int) -> None:
        """Update every bias.

        Args:
            counts_LN: tokens per layer and class of the whole global batch, equal on all ranks that hold the layer.
            iteration: 1-based number of this optimizer step, for Adam's bias correction.
        """
        if not self.update_rate:
            return
        share_LN = counts_LN / counts_LN.sum(dim=1, keepdim=True)
        gradient_LN = share_LN.float() - self.target_N
        self.exp_avg_LN.lerp_(gradient_LN, 1 - BETA1)
        self.exp_avg_sq_LN.lerp_(gradient_LN.square(), 1 - BETA2)
        mean_LN = self.exp_avg_LN / (1 - BETA1**iteration)
        spread_LN = (self.exp_avg_sq_LN / (1 - BETA2**iteration)).sqrt() + EPS
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

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what a checkpoint read into :meth:`sharded_state_dict`."""
        for name, moments in (("exp_avg", self.exp_avg_LN), ("exp_avg_sq", self.exp_avg_sq_LN)):
            for layer, row in zip(self.layers, moments, strict=True):
                row.copy_(state[f"{name}.{layer}"])
