"""The mixture of experts of one layer: router, Megatron-Core's token dispatcher, experts, and the skip class.

A skipped token has no expert: it is never dispatched. The stock all-to-all dispatcher counts on one expert per
token; the subclass here counts what the routing map holds.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)
from megatron.core.utils import divide
from torch import Tensor

from megatron_zaya.model.experts import GroupedExperts
from megatron_zaya.model.router import ZayaRouter
from megatron_zaya.model.transformer_config import ZayaTransformerConfig


class SkippingAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron-Core's all-to-all dispatcher for routing maps with empty rows."""

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Count what goes where; the number of dispatched rows is what the map says, not one per token."""
        tokens_per_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        """Bring the split sizes to the host; on a CPU they are there, but not yet as the integers gloo wants."""
        tokens_per_expert = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        for name in ("input_splits", "output_splits"):
            splits: Any = getattr(self, name)
            if isinstance(splits, Tensor) and splits.device.type == "cpu":
                setattr(self, name, splits.numpy())
        return tokens_per_expert


DISPATCHERS = {"alltoall": SkippingAlltoAllTokenDispatcher, "allgather": MoEAllGatherTokenDispatcher}


class ZayaMoE(MegatronModule):
    """Top-1 mixture of experts with a skip class."""

    def __init__(self, config: ZayaTransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.router = ZayaRouter(config, layer_number)
        self.experts = GroupedExperts(config, pg_collection)
        local = divide(config.num_moe_experts, pg_collection.ep.size())
        first = pg_collection.ep.rank() * local
        self.token_dispatcher = DISPATCHERS[config.moe_token_dispatcher_type](
            local, list(range(first, first + local)), config=config, pg_collection=pg_collection
        )

    def forward(self, x_SBH: Tensor, router_state_SBR: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mixed expert output [S, B, H] and this layer's router state [S, B, R]."""
        routing, router_state_SBR = self.router(x_SBH, router_state_SBR)
        probs_TE, map_TE = routing.dispatch_maps()
        dispatcher = self.token_dispatcher
        tokens, probs = dispatcher.dispatch_preprocess(x_SBH, map_TE, probs_TE)
        tokens, probs = dispatcher.token_dispatch(tokens, probs)
        tokens, tokens_per_expert, probs = dispatcher.dispatch_postprocess(tokens, probs)
        out = self.experts(tokens, tokens_per_expert, probs)
        out = dispatcher.token_combine(dispatcher.combine_preprocess(out))
        out_SBH = dispatcher.combine_postprocess(out)
        if self.config.skip_expert == "scaled_identity":
            kept_T = torch.where(routing.skipped_T, routing.prob_T, 0.0)
            out_SBH = out_SBH + kept_T.view(*x_SBH.shape[:2], 1).to(x_SBH.dtype) * x_SBH
        return out_SBH, router_state_SBR
