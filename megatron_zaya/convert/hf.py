"""Names and shapes of transformers' `zaya` model (5.23), as one table that is read in both directions.

A line maps one tensor of ours to one of theirs, or a part of either. `{l}` is the layer. Where q and k (or the two
value halves) are one tensor on one side and two on the other, they are joined along the first dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_zaya.config.sections import ModelConfig


@dataclass(frozen=True)
class Line:
    """Our tensors joined along dimension 0 are their tensors joined along dimension 0, up to a reshape."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]


def _line(ours: str | tuple[str, ...], theirs: str | tuple[str, ...]) -> Line:
    return Line((ours,) if isinstance(ours, str) else ours, (theirs,) if isinstance(theirs, str) else theirs)


ATTENTION = "layers.{l}.self_attention."
HF_ATTENTION = "model.layers.{l}.self_attn."
ROUTER = "layers.{l}.mlp.router."
HF_ROUTER = "model.layers.{l}.mlp.gate."

MODEL_LINES = (
    _line("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    _line("input_scaling.scale", "model.input_hidden_states_scale"),
    _line("input_scaling.bias", "model.input_hidden_states_bias"),
    _line("final_layernorm.weight", "model.norm.weight"),
)
UNTIED_LINES = (_line("output_layer.weight", "lm_head.weight"),)

LAYER_LINES = (
    _line("layers.{l}.input_layernorm.weight", "model.layers.{l}.input_layernorm.weight"),
    _line("layers.{l}.pre_mlp_layernorm.weight", "model.layers.{l}.post_attention_layernorm.weight"),
    _line(ATTENTION + "linear_q", HF_ATTENTION + "qkv_proj.q_proj.weight"),
    _line(ATTENTION + "linear_k", HF_ATTENTION + "qkv_proj.k_proj.weight"),
    _line(
        ATTENTION + "linear_v",
        (HF_ATTENTION + "qkv_proj.v_proj_current.weight", HF_ATTENTION + "qkv_proj.v_proj_delayed.weight"),
    ),
    *(
        _line(
            (f"{ATTENTION}conv_q.{kind}_{part}", f"{ATTENTION}conv_k.{kind}_{part}"),
            f"{HF_ATTENTION}qkv_proj.conv_qk_{kind}.{part}",
        )
        for kind in ("depthwise", "grouped")
        for part in ("weight", "bias")
    ),
    _line(ATTENTION + "temperature", HF_ATTENTION + "qk_norm.temp"),
    _line(ATTENTION + "linear_proj.weight", HF_ATTENTION + "o_proj.weight"),
    *(
        _line(f"layers.{{l}}.{ours}_residual.{ours_part}", f"model.layers.{{l}}.{theirs}_residual_scale.{theirs_part}")
        for ours, theirs in (("attention", "post_attention"), ("mlp", "post_mlp"))
        for ours_part, theirs_part in (
            ("hidden_scale", "hidden_states_scale"),
            ("hidden_bias", "hidden_states_bias"),
            ("residual_scale", "residual_scale"),
            ("residual_bias", "residual_bias"),
        )
    ),
    _line(ROUTER + "linear_down.weight", HF_ROUTER + "down_proj.weight"),
    _line(ROUTER + "linear_down.bias", HF_ROUTER + "down_proj.bias"),
    _line(ROUTER + "norm.weight", HF_ROUTER + "router_mlp.norm.weight"),
    _line(ROUTER + "linear_1.weight", HF_ROUTER + "router_mlp.fc1.weight"),
    _line(ROUTER + "linear_1.bias", HF_ROUTER + "router_mlp.fc1.bias"),
    _line(ROUTER + "linear_2.weight", HF_ROUTER + "router_mlp.fc2.weight"),
    _line(ROUTER + "linear_2.bias", HF_ROUTER + "router_mlp.fc2.bias"),
    _line(ROUTER + "linear_out.weight", HF_ROUTER + "router_mlp.out_proj.weight"),
    _line("layers.{l}.mlp.experts.linear_fc1", "model.layers.{l}.mlp.experts.gate_up_proj"),
    _line("layers.{l}.mlp.experts.linear_fc2", "model.layers.{l}.mlp.experts.down_proj"),
)
# Not in the first layer (no layer before it), and not a parameter, respectively.
PREVIOUS_STATE_LINE = _line(ROUTER + "previous_scale", HF_ROUTER + "router_states_scale")
BUFFER_LINE = _line(ROUTER + "balancing_bias", HF_ROUTER + "balancing_biases")


def _lines(config: ModelConfig) -> Iterator[Line]:
    yield from MODEL_LINES
    if not config.share_embeddings_and_output_weights:
        yield from UNTIED_LINES
    for layer in range(config.num_layers):
        per_layer = (*LAYER_LINES, BUFFER_LINE, *((PREVIOUS_STATE_LINE,) if layer > 0 else ()))
        for line in per_layer:
            ours, theirs = (tuple(n.replace("{l}", str(layer)) for n in names) for names in (line.ours, line.theirs))
            yield Line(ours, theirs)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes that differ between the two sides: by the end of our name, and of theirs."""
    q, kv = config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels
    experts, ffn, hidden = config.num_moe_experts, config.moe_ffn_hidden_size, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "linear_fc1": (experts, 2, ffn, hidden),
        "gate_up_proj": (experts, 2 * ffn, hidden),
        "v_proj_current.weight": (kv // 2, hidden),
        "v_proj_delayed.weight": (kv // 2, hidden),
    }
    for stream, rows in (("q", q), ("k", kv)):
        shapes |= {
            f"conv_{stream}.depthwise_weight": (rows, 1, config.cca_time0),
            f"conv_{stream}.depthwise_bias": (rows,),
            f"conv_{stream}.grouped_weight": (rows, config.kv_channels, config.cca_time1),
            f"conv_{stream}.grouped_bias": (rows,),
        }
    return shapes


def _move(
    source: Mapping[str, Tensor], names_in: tuple[str, ...], names_out: tuple[str, ...], shapes: dict
) -> Iterator[tuple[str, Tensor]]:
    """Join the sources, then cut and reshape them into the targets."""
    joined = torch.cat([source[name] for name in names_in]) if len(names_in) > 1 else source[names_in[0]]
    targets = [next((shape for end, shape in shapes.items() if name.endswith(end)), None) for name in names_out]
    if len(names_out) == 1:
        yield names_out[0], joined if targets[0] is None else joined.reshape(targets[0])
        return
    for name, piece, shape in zip(names_out, joined.split([s[0] for s in targets]), targets, strict=True):
        yield name, piece.reshape(shape)


def from_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return our global state of a transformers state dict (tensors share memory where they can).

    Raises:
        KeyError: a tensor that the configuration asks for is missing.
    """
    shapes = _shapes(config)
    return {n: t for line in _lines(config) for n, t in _move(state, line.theirs, line.ours, shapes)}


def to_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the transformers state dict of our global state; the tied head is not repeated."""
    shapes = _shapes(config)
    return {n: t for line in _lines(config) for n, t in _move(state, line.ours, line.theirs, shapes)}
