"""Zyphra's original layout: attention and mixture as alternating stages, one tensor per expert, and its config.json.

Stage 2l is the attention of our layer l, stage 2l+1 its mixture. A stage scales the streams that enter it: what scales
them behind a block here lies in the next stage there, and behind the last block in `model.res_scale`.
"""

from __future__ import annotations

from typing import Any

from megatron_zaya.config.sections import ModelConfig
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.convert.hf import ATTENTION, CONVOLUTIONS, RESIDUAL_PARTS, ROUTER
from megatron_zaya.convert.table import Layout, Line, line

QKV = "model.layers.{2l}.self_attn.qkv."
GATE = "model.layers.{2l+1}.zaya_block.router."
EXPERT = "model.layers.{2l+1}.zaya_block.experts.local_experts.{e}."


def _residual(block: str, theirs: str) -> tuple[Line, ...]:
    return tuple(
        line(f"layers.{{l}}.{block}_residual.{ours} [H]", f"{theirs}res_scale.{part}") for ours, part in RESIDUAL_PARTS
    )


ORIGINAL = Layout(
    "original",
    once=(
        line("embedding.word_embeddings.weight [V, H]", "model.embed_tokens.weight"),
        line("input_scaling.scale [H]", "model.layers.0.res_scale.hidden_states_scale"),
        line("input_scaling.bias [H]", "model.layers.0.res_scale.hidden_states_bias"),
        line("final_layernorm.weight [H]", "model.final_norm.weight"),
    ),
    untied=(line("output_layer.weight [V, H]", "lm_head.weight"),),
    every_layer=(
        line("layers.{l}.input_layernorm.weight [H]", "model.layers.{2l}.input_norm.weight"),
        line("layers.{l}.pre_mlp_layernorm.weight [H]", "model.layers.{2l+1}.input_norm.weight"),
        line(ATTENTION + "linear_q [Q, H]", QKV + "linear_q.weight"),
        line(ATTENTION + "linear_k [K, H]", QKV + "linear_k.weight"),
        line(ATTENTION + "linear_v [K, H]", QKV + "val_proj1.weight [K/2, H]", QKV + "val_proj2.weight [K/2, H]"),
        *(
            line(
                (f"{ATTENTION}conv_q.{kind}_{part} [Q{rest}]", f"{ATTENTION}conv_k.{kind}_{part} [K{rest}]"),
                f"{QKV}conv_qk.{0 if kind == 'depthwise' else 1}.{part} [Q+K{rest}]",
            )
            for kind, part, rest in CONVOLUTIONS
        ),
        line(ATTENTION + "temperature [G]", QKV + "temp"),
        line(ATTENTION + "linear_proj.weight [H, Q]", "model.layers.{2l}.self_attn.o_proj.weight"),
        *_residual("attention", "model.layers.{2l+1}."),
        line(ROUTER + "linear_down.weight [R, H]", GATE + "down_proj.weight"),
        line(ROUTER + "linear_down.bias [R]", GATE + "down_proj.bias"),
        line(ROUTER + "norm.weight [R]", GATE + "rmsnorm_eda.weight"),
        line(ROUTER + "linear_1.weight [R, R]", GATE + "router_mlp.0.weight"),
        line(ROUTER + "linear_1.bias [R]", GATE + "router_mlp.0.bias"),
        line(ROUTER + "linear_2.weight [R, R]", GATE + "router_mlp.2.weight"),
        line(ROUTER + "linear_2.bias [R]", GATE + "router_mlp.2.bias"),
        line(ROUTER + "linear_out.weight [E+1, R]", GATE + "router_mlp.4.weight"),
        line(ROUTER + "balancing_bias [E+1]", GATE + "balancing_biases"),
        line("layers.{l}.mlp.experts.linear_fc1 [E, 2, F, H]", EXPERT + "linear_fc1.weight [2F, H]"),
        line("layers.{l}.mlp.experts.linear_fc2 [E, H, F]", EXPERT + "linear_fc2.weight [H, F]"),
    ),
    all_but_first=(line(ROUTER + "previous_scale [R]", GATE + "router_states_scale"),),
    all_but_last=_residual("mlp", "model.layers.{2l+2}."),
    last=_residual("mlp", "model."),
)


def config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the content of the original config.json; a window there does not count the current token."""
    if model.skip_expert != "zero":
        raise ConvertError(
            f"model.skip_expert={model.skip_expert!r}: the config.json of the original layout cannot say so, and its "
            "current readers give a skipped token nothing; set model.skip_expert=zero if that is what you want"
        )
    window = (model.sliding_window or 1) - 1
    kinds = model.layer_types or ["full"] * model.num_layers
    return {
        "architectures": ["ZayaForCausalLM"],
        "model_type": "zaya",
        "torch_dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype],
        "cca": True,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": 2 * model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "num_key_value_heads": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "head_dim": model.kv_channels,
        "num_experts": model.num_moe_experts,
        "moe_router_topk": 1,
        "ffn_hidden_size": 2 * model.moe_ffn_hidden_size,
        "zaya_mlp_expansion": model.router_hidden_size,
        "norm_epsilon": model.layernorm_epsilon,
        "max_position_embeddings": model.max_position_embeddings,
        "cca_time0": model.cca_time0,
        "cca_time1": model.cca_time1,
        "partial_rotary_factor": model.rotary_percent,
        "rope_theta": model.rotary_base,
        "swa_rotary_base": model.sliding_rotary_base,
        "swa_layers": [window if kind == "sliding" else 0 for kind in kinds for _ in range(2)],
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "zaya_use_mod": True,
        "zaya_use_eda": True,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": "swiglu",
        "normalization": "RMSNorm",
        "scale_residual_merge": True,
        "lm_head_bias": False,
        "attention_bias": False,
        "clamp_temp": False,
    }


_ALWAYS = ("num_hidden_layers", "hidden_size", "vocab_size")
_FREE = {"torch_dtype", "architectures", "max_position_embeddings"}


def config_differences(found: dict[str, Any], model: ModelConfig) -> list[str]:
    """Return what of a config.json does not fit ``model``.

    Releases differ in the keys that they write, so only those that are there are compared, but for the sizes that all
    of them have. A list with an entry per stage stands for its one value other than 0.
    """
    wanted = config_json(model, "BF16")
    if "sliding" not in (model.layer_types or []):
        wanted |= {"swa_layers": None}
        found = {key: value for key, value in found.items() if key != "swa_rotary_base"}
    differing = []
    for key, value in wanted.items():
        there = found.get(key)
        if key == "swa_layers":
            there = _per_stage(there, wanted["num_hidden_layers"])
        elif isinstance(there, list) and len(set(there) - {0}) == 1:
            there = next(item for item in there if item)
        if key not in _FREE and there != value and (there is not None or key in _ALWAYS):
            differing.append(f"{key}: {there!r} there, {value!r} by the run file")
    if "swa_layers" in found and wanted["swa_layers"] is None and any(found["swa_layers"] or []):
        differing.append(f"swa_layers: {found['swa_layers']!r} there, no sliding layer by the run file")
    return differing


def _per_stage(windows: Any, stages: int) -> Any:
    """Return windows with one entry per stage, whether given by stage or by layer; None if there are none."""
    if not windows or not any(windows):
        return None
    if len(windows) == stages // 2:
        windows = [window for window in windows for _ in range(2)]
    return [windows[i - i % 2] for i in range(len(windows))]
