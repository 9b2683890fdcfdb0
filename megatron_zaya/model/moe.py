"""The mixture of experts of one layer: router, token dispatch, experts, and the skip class.

A skipped token has no expert: it is never dispatched. Where the experts are spread over ranks, Megatron-Core's token
dispatchers move the tokens; the stock all-to-all dispatcher counts on one expert per token, the subclass here counts
what the routing map holds. Where every expert is here and whole, sorting the tokens is all there is to do.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.utils import divide
from torch import Tensor

from megatron_zaya.model.derivatives import spread_rows, take_rows
from megatron_zaya.model.experts import GroupedExperts
from megatron_zaya.model.router import Routing, ZayaRouter
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


def build_dispatcher(config: ZayaTransformerConfig, pg_collection: ProcessGroupCollection) -> MoETokenDispatcher:
    """Return the configured token dispatcher of Megatron-Core for the experts of this rank."""
    local = divide(config.num_moe_experts, pg_collection.ep.size())
    first = pg_collection.ep.rank() * local
    return DISPATCHERS[config.moe_token_dispatcher_type](
        local, list(range(first, first + local)), config=config, pg_collection=pg_collection
    )


def mix_dispatched(x_SBH: Tensor, routing: Routing, experts: GroupedExperts, dispatcher: MoETokenDispatcher) -> Tensor:
    """Return the experts' outputs [S, B, H], zero for skipped tokens, through Megatron-Core's dispatcher."""
    probs_TE, map_TE = routing.dispatch_maps()
    tokens, probs = dispatcher.dispatch_preprocess(x_SBH, map_TE, probs_TE)
    tokens, probs = dispatcher.token_dispatch(tokens, probs)
    tokens, tokens_per_expert, probs = dispatcher.dispatch_postprocess(tokens, probs)
    _keep_no_graph(dispatcher)
    out = experts(tokens, tokens_per_expert, probs)
    out = dispatcher.token_combine(dispatcher.combine_preprocess(out))
    return dispatcher.combine_postprocess(out)


def _keep_no_graph(dispatcher: MoETokenDispatcher) -> None:
    """Detach the tensors that the dispatcher keeps until its next call.

    Where the layer is run again in the backward pass, they would keep all of the second run alive between steps.
    """
    for name, value in vars(dispatcher).items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            setattr(dispatcher, name, value.detach())


def mix_locally(x_TH: Tensor, routing: Routing, experts: GroupedExperts) -> Tensor:
    """Return the experts' outputs [T, H], zero for skipped tokens, where all experts are on this rank."""
    order_T = routing.class_T.argsort(stable=True)  # the skip class is the last: its tokens end up behind the others
    inverse_T = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(len(order_T), device=order_T.device))
    counts_N = torch.bincount(routing.class_T, minlength=routing.num_experts + 1)
    moves = (order_T, inverse_T, len(order_T) - int(counts_N[-1]))
    prob_C = take_rows(routing.prob_T.unsqueeze(1), *moves).squeeze(1)
    out_CH = experts(take_rows(x_TH, *moves), counts_N[:-1], prob_C)
    return spread_rows(out_CH, *moves)


class ZayaMoE(MegatronModule):
    """Top-1 mixture of experts with a skip class."""

    def __init__(self, config: ZayaTransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.router = ZayaRouter(config, layer_number)
        self.experts = GroupedExperts(config, pg_collection)
        alone = pg_collection.ep.size() == pg_collection.expt_tp.size() == 1
        self.token_dispatcher = None if alone else build_dispatcher(config, pg_collection)

    def forward(self, x_SBH: Tensor, router_state_SBR: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mixed expert output [S, B, H] and this layer's router state [S, B, R]."""
        routing, router_state_SBR = self.router(x_SBH, router_state_SBR)
        if self.token_dispatcher is None:
            out_SBH = mix_locally(x_SBH.flatten(0, 1), routing, self.experts).view(x_SBH.shape)
        else:
            out_SBH = mix_dispatched(x_SBH, routing, self.experts, self.token_dispatcher)
        if self.config.skip_expert == "scaled_identity":
            kept_T = torch.where(routing.skipped_T, routing.prob_T, 0.0)
            out_SBH = out_SBH + kept_T.view(*x_SBH.shape[:2], 1).to(x_SBH.dtype) * x_SBH
        return out_SBH, router_state_SBR
