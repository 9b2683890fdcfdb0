"""Random small ZAYAs: ours and transformers', with the same weights."""

from __future__ import annotations

import torch

from megatron_zaya.config import RunConfig
from megatron_zaya.convert.hf import config_json
from megatron_zaya.convert.in_memory import from_hf
from megatron_zaya.model.specs import zaya_layer_spec
from megatron_zaya.model.transformer_config import zaya_transformer_config
from megatron_zaya.model.zaya_model import ZayaModel


def run_config(**model) -> RunConfig:
    """Return an fp32 run configuration; `model` overrides a tiny architecture."""
    tiny = dict(
        num_layers=3,
        hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        num_moe_experts=4,
        moe_ffn_hidden_size=24,
        router_hidden_size=20,
        vocab_size=101,
        max_position_embeddings=128,
        rotary_base=10_000.0,
    )
    return RunConfig.model_validate({"model": tiny | model, "run": {"precision": "fp32"}})


def our_model(config: RunConfig, pg_collection, dtype=torch.float32, **stage) -> ZayaModel:
    """Return an uninitialised ZayaModel in ``dtype``."""
    transformer = zaya_transformer_config(config)
    transformer.params_dtype = transformer.pipeline_dtype = dtype
    shared = config.model.share_embeddings_and_output_weights
    model = ZayaModel(
        transformer,
        zaya_layer_spec(),
        config.model.vocab_size,
        config.model.max_position_embeddings,
        pg_collection,
        share_embeddings_and_output_weights=shared,
        **stage,
    )
    return model.to(dtype)


def hf_config(config: RunConfig):
    """Return transformers' configuration of the same architecture."""
    from transformers import ZayaConfig

    values = config_json(config.model, "F32")
    return ZayaConfig(**{key: value for key, value in values.items() if key not in ("model_type", "dtype")})


def hf_model(config: RunConfig, dtype=torch.float32, seed: int = 0):
    """Return transformers' model with every parameter random, so that no term of a formula is switched off."""
    from transformers import ZayaForCausalLM

    model = ZayaForCausalLM(hf_config(config)).to(dtype).train()
    model.set_experts_implementation("eager")  # the plain loop over experts: any dtype, and the reference for ours
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(dtype)
            centred = any(part in name for part in ("norm.weight", "layernorm", "scale", "temp"))
            spread = 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            spread *= 3 if "router_mlp.out_proj" in name else 1  # tokens disagree about their expert
            parameter.copy_(noise * spread + (1.0 if centred else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("balancing_biases"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.05)
                buffer[-1] += 0.3  # some tokens skip, in every case
    return model


def copy_from_hf(ours: ZayaModel, theirs, config: RunConfig) -> None:
    """Copy transformers' weights and buffers in through the conversion table; every tensor must be given."""
    state = from_hf(theirs.state_dict(), config.model)
    targets = {ours.global_name(name): tensor for name, tensor in ours.state_dict(keep_vars=True).items()}
    targets = {name: tensor for name, tensor in targets.items() if tensor is not None}
    assert set(state) == set(targets)
    with torch.no_grad():
        for name, tensor in state.items():
            targets[name].copy_(tensor)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return max |ours - theirs| / max |theirs|."""
    scale = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / scale if scale else ours.abs().max().item()
