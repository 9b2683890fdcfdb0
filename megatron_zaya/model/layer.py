"""One ZAYA layer: CCA and mixture of experts, each behind an RMSNorm and merged by residual scaling.

Two streams go through the layers: the fp32 residual x_SBH and the router state r_SBR.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megatron_zaya.model.recompute import recomputed_when_saved, run_again_later
from megatron_zaya.model.residual import ResidualScaling
from megatron_zaya.model.transformer_config import ZayaTransformerConfig
from megatron_zaya.parallel.sequence import LocalSequence


@dataclass
class ZayaLayerSubmodules:
    """The replaceable parts of :class:`ZayaLayer`."""

    norm: ModuleSpec | type
    self_attention: ModuleSpec | type
    mlp: ModuleSpec | type


class ZayaLayer(MegatronModule):
    """Layer ``layer_number`` (1-based, counted over all pipeline stages)."""

    def __init__(
        self,
        config: ZayaTransformerConfig,
        submodules: ZayaLayerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        norm = dict(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        parts = dict(config=config, layer_number=layer_number, pg_collection=pg_collection)
        self.input_layernorm = build_module(submodules.norm, **norm)
        self.self_attention = build_module(submodules.self_attention, **parts)
        self.attention_residual = ResidualScaling(config)
        self.pre_mlp_layernorm = build_module(submodules.norm, **norm)
        self.mlp = build_module(submodules.mlp, **parts)
        self.mlp_residual = ResidualScaling(config)

    def forward(
        self,
        x_SBH: Tensor,
        router_state_SBR: Tensor | None,
        rotary_pos_emb: Tensor,
        sequence: LocalSequence | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream and the router state after this layer.

        ``sequence`` says which tokens these are; None: whole sequences of one document.
        """
        with self._normed(self.input_layernorm, x_SBH) as normed_SBH:
            attended = self.self_attention(normed_SBH, rotary_pos_emb, sequence)
        x_SBH = self.attention_residual(attended, x_SBH)
        if self.config.recompute.reruns("moe"):
            mixed, router_state_SBR = run_again_later(self._mix, x_SBH, router_state_SBR)
        else:
            mixed, router_state_SBR = self._mix(x_SBH, router_state_SBR)
        return self.mlp_residual(mixed, x_SBH), router_state_SBR

    def _mix(self, x_SBH: Tensor, router_state_SBR: Tensor | None) -> tuple[Tensor, Tensor]:
        with self._normed(self.pre_mlp_layernorm, x_SBH) as normed_SBH:
            return self.mlp(normed_SBH, router_state_SBR)

    def _normed(self, norm: nn.Module, x_SBH: Tensor) -> contextlib.AbstractContextManager[Tensor]:
        """Enter with the normed stream, which is kept for the backward pass or computed again."""
        if self.config.recompute.reruns("layernorm"):
            return recomputed_when_saved(norm, x_SBH)
        return contextlib.nullcontext(norm(x_SBH))
