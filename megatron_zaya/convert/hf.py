"""transformers' `zaya` model (5.23): its names and shapes as one table for both directions, and its config.json."""

from __future__ import annotations

from typing import Any

from megatron_zaya.config.sections import LayerType, ModelConfig
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.convert.table import Layout, line

ATTENTION = "layers.{l}.self_attention."
HF_ATTENTION = "model.layers.{l}.self_attn."
ROUTER = "layers.{l}.mlp.router."
HF_ROUTER = "model.layers.{l}.mlp.gate."

CONVOLUTIONS = (
    ("depthwise", "weight", ", 1, T0"),
    ("depthwise", "bias", ""),
    ("grouped", "weight", ", D, T1"),
    ("grouped", "bias", ""),
)
"""Kind, part and the shape behind the channels; q's channels come before k's."""

RESIDUAL_PARTS = (
    ("hidden_scale", "hidden_states_scale"),
    ("hidden_bias", "hidden_states_bias"),
    ("residual_scale", "residual_scale"),
    ("residual_bias", "residual_bias"),
)

HF = Layout(
    "transformers",
    once=(
        line("embedding.word_embeddings.weight [V, H]", "model.embed_tokens.weight"),
        line("input_scaling.scale [H]", "model.input_hidden_states_scale"),
        line("input_scaling.bias [H]", "model.input_hidden_states_bias"),
        line("final_layernorm.weight [H]", "model.norm.weight"),
    ),
    untied=(line("output_layer.weight [V, H]", "lm_head.weight"),),
    every_layer=(
        line("layers.{l}.input_layernorm.weight [H]", "model.layers.{l}.input_layernorm.weight"),
        line("layers.{l}.pre_mlp_layernorm.weight [H]", "model.layers.{l}.post_attention_layernorm.weight"),
        line(ATTENTION + "linear_q [Q, H]", HF_ATTENTION + "qkv_proj.q_proj.weight"),
        line(ATTENTION + "linear_k [K, H]", HF_ATTENTION + "qkv_proj.k_proj.weight"),
        line(
            ATTENTION + "linear_v [K, H]",
            HF_ATTENTION + "qkv_proj.v_proj_current.weight [K/2, H]",
            HF_ATTENTION + "qkv_proj.v_proj_delayed.weight [K/2, H]",
        ),
        *(
            line(
                (f"{ATTENTION}conv_q.{kind}_{part} [Q{rest}]", f"{ATTENTION}conv_k.{kind}_{part} [K{rest}]"),
                f"{HF_ATTENTION}qkv_proj.conv_qk_{kind}.{part} [Q+K{rest}]",
            )
            for kind, part, rest in CONVOLUTIONS
        ),
        line(ATTENTION + "temperature [G]", HF_ATTENTION + "qk_norm.temp"),
        line(ATTENTION + "linear_proj.weight [H, Q]", HF_ATTENTION + "o_proj.weight"),
        *(
            line(
                f"layers.{{l}}.{block}_residual.{ours} [H]", f"model.layers.{{l}}.post_{block}_residual_scale.{theirs}"
            )
            for block in ("attention", "mlp")
            for ours, theirs in RESIDUAL_PARTS
        ),
        line(ROUTER + "linear_down.weight [R, H]", HF_ROUTER + "down_proj.weight"),
        line(ROUTER + "linear_down.bias [R]", HF_ROUTER + "down_proj.bias"),
        line(ROUTER + "norm.weight [R]", HF_ROUTER + "router_mlp.norm.weight"),
        line(ROUTER + "linear_1.weight [R, R]", HF_ROUTER + "router_mlp.fc1.weight"),
        line(ROUTER + "linear_1.bias [R]", HF_ROUTER + "router_mlp.fc1.bias"),
        line(ROUTER + "linear_2.weight [R, R]", HF_ROUTER + "router_mlp.fc2.weight"),
        line(ROUTER + "linear_2.bias [R]", HF_ROUTER + "router_mlp.fc2.bias"),
        line(ROUTER + "linear_out.weight [E+1, R]", HF_ROUTER + "router_mlp.out_proj.weight"),
        line(ROUTER + "balancing_bias [E+1]", HF_ROUTER + "balancing_biases"),
        line("layers.{l}.mlp.experts.linear_fc1 [E, 2, F, H]", "model.layers.{l}.mlp.experts.gate_up_proj [E, 2F, H]"),
        line("layers.{l}.mlp.experts.linear_fc2 [E, H, F]", "model.layers.{l}.mlp.experts.down_proj"),
    ),
    # The first layer has no layer before it.
    all_but_first=(line(ROUTER + "previous_scale [R]", HF_ROUTER + "router_states_scale"),),
)

LAYER_TYPES: dict[LayerType, str] = {"full": "hybrid", "sliding": "hybrid_sliding"}
_TYPES = {"BF16": "bfloat16", "F32": "float32"}


def config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the content of config.json for parameters of ``dtype`` (safetensors' name).

    Raises:
        ConvertError: transformers' model cannot compute what this one computes.
    """
    if model.skip_expert != "zero":
        raise ConvertError(
            f"model.skip_expert={model.skip_expert!r}: in transformers a skipped token gets nothing from the mixture; "
            'only a model trained with model.skip_expert="zero" means the same there'
        )
    rope = {"rope_type": "default", "partial_rotary_factor": model.rotary_percent}
    return {
        "architectures": ["ZayaForCausalLM"],
        "model_type": "zaya",
        "dtype": _TYPES[dtype],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "num_experts": model.num_moe_experts,
        "num_experts_per_tok": 1,
        "router_hidden_size": model.router_hidden_size,
        "rms_norm_eps": model.layernorm_epsilon,
        "max_position_embeddings": model.max_position_embeddings,
        "cca_time0": model.cca_time0,
        "cca_time1": model.cca_time1,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "sliding_window": model.sliding_window,
        "layer_types": [LAYER_TYPES[kind] for kind in model.layer_types or ["full"] * model.num_layers],
        "rope_parameters": {
            "hybrid": rope | {"rope_theta": model.rotary_base},
            "hybrid_sliding": rope | {"rope_theta": model.sliding_rotary_base},
        },
        "attention_bias": False,
        "lm_head_bias": False,
        "hidden_act": "silu",
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


FREE = {"dtype", "architectures", "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings"}
"""Keys of config.json that do not decide what the weights compute."""


def config_differences(found: dict[str, Any], model: ModelConfig) -> list[str]:
    """Return what of a config.json does not fit ``model``; a key that it leaves out has transformers' default."""
    defaults = config_json(ModelConfig(num_layers=found.get("num_hidden_layers", 40)), "BF16")
    wanted = config_json(model, "BF16")
    sliding = "hybrid_sliding" in wanted["layer_types"]
    differing = []
    for key, value in wanted.items():
        if key in FREE or (key == "sliding_window" and not sliding):
            continue
        there = found.get(key)
        there = defaults[key] if there is None else there
        if key == "rope_parameters":
            kinds = ["hybrid", "hybrid_sliding"] if sliding else ["hybrid"]
            value = {kind: value[kind] for kind in kinds}
            there = {kind: {k: v for k, v in there.get(kind, {}).items() if k in value[kind]} for kind in kinds}
        if there != value:
            differing.append(f"{key}: {there!r} there, {value!r} by the run file")
    return differing


def model_config(found: dict[str, Any], where: object) -> ModelConfig:
    """Return the model that a config.json describes.

    Raises:
        ConvertError: it is not one that this program has.
    """
    layers = found.get("num_hidden_layers", 40)
    values = config_json(ModelConfig(num_layers=layers), "BF16")
    values |= {key: value for key, value in found.items() if key in values and value is not None}
    kinds = {theirs: ours for ours, theirs in LAYER_TYPES.items()}
    try:
        full, sliding = (values["rope_parameters"].get(kind) or {} for kind in ("hybrid", "hybrid_sliding"))
        model = ModelConfig(
            num_layers=layers,
            hidden_size=values["hidden_size"],
            num_attention_heads=values["num_attention_heads"],
            num_query_groups=values["num_key_value_heads"],
            kv_channels=values["head_dim"],
            num_moe_experts=values["num_experts"],
            moe_ffn_hidden_size=values["moe_intermediate_size"],
            router_hidden_size=values["router_hidden_size"],
            vocab_size=values["vocab_size"],
            share_embeddings_and_output_weights=values["tie_word_embeddings"],
            max_position_embeddings=values["max_position_embeddings"],
            layernorm_epsilon=float(values["rms_norm_eps"]),
            cca_time0=values["cca_time0"],
            cca_time1=values["cca_time1"],
            rotary_percent=float((full or sliding)["partial_rotary_factor"]),
            rotary_base=float((full or {"rope_theta": 5e6})["rope_theta"]),
            sliding_rotary_base=float((sliding or {"rope_theta": 1e4})["rope_theta"]),
            sliding_window=values["sliding_window"],
            layer_types=[kinds[kind] for kind in values["layer_types"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConvertError(f"{where}: its config.json describes no model of this program: {error!r}") from None
    differing = config_differences(found, model)
    if differing:
        raise ConvertError(f"{where}: its config.json describes no model of this program: {'; '.join(differing)}")
    return model
