"""The parameters of a ZAYA on one rank, tensor by tensor, in the order in which the model makes them.

Where a tensor lies in a gradient bucket follows from those made after it, and so does what ZeRO-1 cuts and Muon
exchanges. Tests hold the list against the model (tests/plan/test_collectives.py).
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

from megatron_zaya.plan.shape import Layout, ModelShape

LAYER = "layers.*."
ATTENTION = LAYER + "self_attention."


class Tensor(NamedTuple):
    """One parameter of a rank."""

    name: str
    """Of the whole model, without the number of the layer."""
    shape: tuple[int, ...]
    """On a tensor-parallel rank."""
    is_expert: bool = False
    split_axis: int = 0
    """Which axis of its matrices tensor parallelism splits: 0 rows, 1 columns."""
    copies: int = 1
    """Neighbouring tensor-parallel ranks that hold the same part."""
    is_tied: bool = False
    """Held by the first and the last stage: it gets a bucket of its own."""

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def is_attention(self) -> bool:
        """Copies of it see the gradients of different query heads."""
        return self.name.startswith(ATTENTION)


def chunk_tensors(m: ModelShape, layout: Layout, stage: int) -> list[Tensor]:
    """Return what virtual stage ``stage`` puts on a rank.

    Raises:
        ValueError: the model is no ZAYA.
    """
    if not m.is_zaya:
        raise ValueError("only ZAYA's parameters are known tensor by tensor; other models have no Muon here")
    sizes, h = layout.layers_of_stages(m.num_layers), m.hidden_size
    first, last = sum(sizes[:stage]), sum(sizes[: stage + 1])
    tied = m.share_embeddings_and_output_weights and layout.pp > 1
    table, found = (m.vocab_size // layout.tp, h), []
    if stage == 0:
        found = [Tensor("embedding.word_embeddings.weight", table, is_tied=tied)]
        found += [Tensor(f"input_scaling.{name}", (h,), copies=layout.tp) for name in ("scale", "bias")]
    for index in range(first, last):
        found += _layer(m, layout.tp, layout.ep, layout.etp, index == 0)
    if stage == layout.stages - 1:
        found.append(Tensor("final_layernorm.weight", (h,), copies=layout.tp))
        if stage > 0 or not m.share_embeddings_and_output_weights:
            found.append(Tensor("output_layer.weight", table, is_tied=tied))
    return found


@lru_cache(maxsize=256)
def _layer(m: ModelShape, tp: int, ep: int, etp: int, is_first: bool) -> tuple[Tensor, ...]:
    h, residual = m.hidden_size, ("hidden_scale", "hidden_bias", "residual_scale", "residual_bias")

    def replicated(name: str, *shape: int) -> Tensor:
        return Tensor(LAYER + name, shape, copies=tp)

    return (
        replicated("input_layernorm.weight", h),
        *_attention(m, tp),
        *(replicated(f"attention_residual.{name}", h) for name in residual),
        replicated("pre_mlp_layernorm.weight", h),
        *(replicated(f"mlp.router.{name}", *shape) for name, shape in _router(m, is_first)),
        *_experts(m, ep, etp),
        *(replicated(f"mlp_residual.{name}", h) for name in residual),
    )


def _attention(m: ModelShape, tp: int) -> list[Tensor]:
    prefix, h, holders = ATTENTION, m.hidden_size, min(tp, m.num_query_groups)
    query, key, copies = m.q_width // tp, m.kv_width // holders, tp // holders
    shared = (("linear_k", (key, h)), ("linear_v", (key, h)), ("temperature", (m.num_query_groups // holders,)))
    return [
        Tensor(prefix + "linear_q", (query, h)),
        *(Tensor(prefix + name, shape, copies=copies) for name, shape in shared),
        *(
            Tensor(f"{prefix}{stream}.{name}", shape, copies=count)
            for stream, width, count in (("conv_q", query, 1), ("conv_k", key, copies))
            for name, shape in (
                ("depthwise_weight", (width, 1, m.cca_time0)),
                ("depthwise_bias", (width,)),
                ("grouped_weight", (width, m.kv_channels, m.cca_time1)),
                ("grouped_bias", (width,)),
            )
        ),
        Tensor(prefix + "linear_proj.weight", (h, query), split_axis=1),
    ]


def _router(m: ModelShape, is_first: bool) -> list[tuple[str, tuple[int, ...]]]:
    r = m.router_hidden_size
    state = [] if is_first else [("previous_scale", (r,))]
    inner: list[tuple[str, tuple[int, ...]]] = [
        (f"{name}.{part}", shape)
        for name in ("linear_1", "linear_2")
        for part, shape in (("weight", (r, r)), ("bias", (r,)))
    ]
    down = [("linear_down.weight", (r, m.hidden_size)), ("linear_down.bias", (r,)), ("norm.weight", (r,))]
    return [*state, *down, *inner, ("linear_out.weight", (m.num_moe_experts + 1, r))]


def _experts(m: ModelShape, ep: int, etp: int) -> list[Tensor]:
    local, f, h = m.num_moe_experts // ep, m.moe_ffn_hidden_size // etp, m.hidden_size
    return [
        Tensor(LAYER + "mlp.experts.linear_fc1", (local, 2, f, h), is_expert=True),
        Tensor(LAYER + "mlp.experts.linear_fc2", (local, h, f), is_expert=True, split_axis=1),
    ]
