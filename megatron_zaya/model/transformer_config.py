"""ZayaTransformerConfig: Megatron-Core's TransformerConfig plus what only ZAYA has, built from a run file."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_zaya.config import RunConfig
from megatron_zaya.config.sections import ParallelConfig
from megatron_zaya.model.precision import at_least_fp32
from megatron_zaya.model.recompute import RecomputePlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class ZayaTransformerConfig(TransformerConfig):
    """Field meanings are those of :class:`megatron_zaya.config.sections.ModelConfig`."""

    cca_time0: int = 2
    cca_time1: int = 2
    router_hidden_size: int = 256
    skip_expert: str = "zero"
    skip_expert_bias: float = -1.0
    attention_temperature_init: float = 1.0
    rotary_percent: float = 0.5
    rotary_base: float = 5_000_000.0
    sliding_rotary_base: float = 10_000.0
    sliding_window: int | None = None
    fp32_islands: tuple[str, ...] = ()
    """As :class:`megatron_zaya.config.sections.RunSection`'s."""
    recompute: RecomputePlan = field(default_factory=RecomputePlan)
    layer_types: tuple[str, ...] = ()
    """One entry per layer, "full" or "sliding"."""
    loss_workspace_bytes: int = 256 * 2**20

    def widened(self, island: str, x: Tensor) -> Tensor:
        """Return ``x`` in fp32 or wider if ``island`` is one of the fp32 islands, else unchanged."""
        return at_least_fp32(x) if island in self.fp32_islands else x

    @property
    def num_router_classes(self) -> int:
        """Experts plus the skip class, which comes last."""
        return self.num_moe_experts + 1

    def is_sliding(self, layer_number: int) -> bool:
        """Return whether layer ``layer_number`` (1-based) sees only a window."""
        return self.layer_types[layer_number - 1] == "sliding"


def recompute_plan(parallel: ParallelConfig) -> RecomputePlan:
    """Return what the backward pass computes again."""
    return RecomputePlan(
        granularity=parallel.recompute_granularity,
        method=parallel.recompute_method,
        num_layers=parallel.recompute_num_layers,
        modules=frozenset(parallel.recompute_modules),
    )


def zaya_transformer_config(config: RunConfig) -> ZayaTransformerConfig:
    """Translate a run configuration into Megatron-Core's terms."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.run.precision]
    return ZayaTransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.moe_ffn_hidden_size,
        num_moe_experts=model.num_moe_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type=parallel.moe_token_dispatcher_type,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_dropout_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        fp32_residual_connection="residual" in config.run.fp32_islands,
        perform_initialization=False,  # model/init.py does it, the same for every layout
        init_method_std=model.init_method_std,
        gradient_accumulation_fusion=False,
        bf16=config.run.precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=torch.float32 if "residual" in config.run.fp32_islands else dtype,
        batch_p2p_comm=torch.cuda.is_available(),  # gloo sends and receives one by one
        autocast_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        cca_time0=model.cca_time0,
        cca_time1=model.cca_time1,
        router_hidden_size=model.router_hidden_size,
        skip_expert=model.skip_expert,
        skip_expert_bias=model.skip_expert_bias,
        attention_temperature_init=model.attention_temperature_init,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        sliding_rotary_base=model.sliding_rotary_base,
        sliding_window=model.sliding_window,
        fp32_islands=tuple(config.run.fp32_islands),
        recompute=recompute_plan(parallel),
        layer_types=tuple(model.layer_types or ["full"] * model.num_layers),
        loss_workspace_bytes=config.run.loss_workspace_mib * 2**20,
    )
