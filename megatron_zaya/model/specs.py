"""Which implementation each replaceable part of a ZAYA layer uses on this machine."""

from __future__ import annotations

from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_zaya.model.attention import CausalAttention
from megatron_zaya.model.cca import CCASubmodules, CompressedConvolutionalAttention
from megatron_zaya.model.layer import ZayaLayer, ZayaLayerSubmodules
from megatron_zaya.model.linear import ColumnParallelLinear, RowParallelLinear
from megatron_zaya.model.moe import ZayaMoE
from megatron_zaya.model.residual import RMSNorm


def zaya_layer_spec() -> ModuleSpec:
    """Return the layer built from torch and Megatron-Core parts only."""
    attention = CCASubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=CausalAttention, linear_proj=RowParallelLinear
    )
    return ModuleSpec(
        module=ZayaLayer,
        submodules=ZayaLayerSubmodules(
            norm=RMSNorm,
            self_attention=ModuleSpec(module=CompressedConvolutionalAttention, submodules=attention),
            mlp=ZayaMoE,
        ),
    )
