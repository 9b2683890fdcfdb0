"""Bytes that forward passes leave for the backward pass, tensor by tensor, per module, micro-batch and rank.

Letters as in `megatron_zaya/model`: T tokens of a rank, H hidden, X query and key width, F expert width, R router
width, V vocabulary; D is the number of rows that reach the rank's experts. Two implementations are described: this
project's own ZAYA layers, and Megatron-Core's layers with TransformerEngine for dense GPT and other mixtures of
experts. The first is held to the dry run (tests/plan/test_memory.py), the second to published measurements.
Sources for the second: Korthikanti et al., arXiv 2205.05198, section 4, re-derived per tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_zaya.plan.shape import Batch, Layout, ModelShape, Precision


@dataclass(frozen=True)
class Options:
    """What the implementation does; defaults are those of today's Megatron-Core with fused kernels."""

    flash_attention: bool = True
    fused_loss: bool = False
    """A cross-entropy that keeps one copy of the logits in the precision of the model."""
    loss_workspace_bytes: int | None = 256 * 2**20
    """fp32 logits that exist at a time in this project's head; None is Megatron-Core's loss over all of them."""
    expert_load: float = 1.0
    """Rows at this rank's experts over the mean."""


@dataclass
class Footprint:
    """What one module needs: tensors kept until its backward pass, and the most it holds beyond them at once."""

    kept: dict[str, float] = field(default_factory=dict)
    transient: float = 0.0

    @property
    def kept_bytes(self) -> float:
        """Sum over the kept tensors."""
        return sum(self.kept.values())


@dataclass(frozen=True)
class Tokens:
    """Row counts of one micro-batch on one rank."""

    local: float
    """Outside attention: under sequence parallelism a part of the rows."""
    attention: float
    """Inside attention: all rows of the context-parallel rank."""
    experts: float
    """At the rank's experts, after dispatch."""
    batch: int

    @classmethod
    def of(cls, m: ModelShape, layout: Layout, batch: Batch, load: float) -> Tokens:
        """Return the counts; `load` multiplies what reaches the experts."""
        attention = batch.seq_length * batch.micro_batch_size / layout.cp
        local = attention / layout.tp if layout.sequence_parallel else attention
        dispatched = local * (1 - m.skip_share) * m.moe_router_topk
        # Each expert-parallel rank receives what its experts get from all of them; expert-tensor ranks see it all.
        experts = dispatched * layout.etp * (load if layout.ep > 1 else 1.0)
        return cls(local, attention, experts, batch.micro_batch_size)


def zaya_layer(m: ModelShape, layout: Layout, t: Tokens) -> dict[str, Footprint]:
    """Return the footprints of one layer of this project, in the order of the forward pass."""
    h, tp = m.hidden_size, layout.tp
    q, k = m.q_width / tp, m.kv_width / min(tp, m.num_query_groups)
    x, heads = q + k, (q + k) / m.kv_channels
    wide = 4 if m.fp32_residual_connection else 2
    taps = m.cca_time0 + m.cca_time1 - 1
    attention = {
        "joined q, k, v weights": 2 * h * (q + 2 * k),
        "padded input of the convolutions": 2 * (t.attention + (taps - 1) * t.batch) * x,
        "fp32 sum of convolved and mean": 4 * t.attention * x,
        "inverse norms": 4 * t.attention * heads,
        "rotated q and k": 2 * t.attention * x,
        "value with delayed half": 2 * t.attention * k,
        "attention output": 2 * t.attention * q,
        "log-sum-exp": 4 * t.attention * m.num_attention_heads / tp,
        "merged and fp32 taps": x * m.kv_channels * (2 * taps + 4 * m.cca_time1 + 2 * m.cca_time1 + 2),
    }
    router = {
        "state": 2 * t.local * m.router_hidden_size,
        "normed state": 2 * t.local * m.router_hidden_size,
        "two layers, before and after GELU": 8 * t.local * m.router_hidden_size,
        "probabilities and routing": t.local * (4 * (m.num_moe_experts + 1) + 4 * 8),
    }
    return {
        "norms": Footprint({"cast input, output": 2 * 4 * t.local * h, "inverse norms": 8 * t.local}),
        "attention": Footprint(attention),
        "router": Footprint(router),
        "experts": zaya_experts(m, layout, t),
        "residual scaling": Footprint({"cast branch, stream": 2 * (4 + wide) * t.local * h}),
    }


def zaya_experts(m: ModelShape, layout: Layout, t: Tokens) -> Footprint:
    """Return the footprint of dispatch, experts and combine."""
    h, f, d = m.hidden_size, m.moe_ffn_hidden_size / layout.etp, t.experts
    local = m.num_moe_experts // layout.ep
    rows = t.local if layout.ep == layout.etp == 1 else d
    kept = {"sorted rows": 2 * rows * h, "gate and up": 4 * d * f, "activation": 2 * d * f}
    if layout.ep * layout.etp > 1:
        kept["routing maps, probabilities"] = t.local * (m.num_moe_experts * 10 + 8) + 16 * d
    # Backward of the first product: the gradient of its weights, of gate and up, of its input and of the stream,
    # while what lies behind it (branch, stream, gate and up, activation) is gone.
    gone = 8 * t.local * h + 6 * d * f
    weights = 2 * local * 2 * f * h
    return Footprint(kept, transient=max(0.0, weights + 4 * d * f + 2 * d * h + 4 * t.local * h - gone))


def megatron_layer(m: ModelShape, layout: Layout, t: Tokens, options: Options, index: int) -> dict[str, Footprint]:
    """Return the footprints of one layer of Megatron-Core with TransformerEngine."""
    h, tp = m.hidden_size, layout.tp
    # Without sequence parallelism norms and dropouts work on all rows.
    norms = {"inputs and outputs of two norms": 2 * 4 * t.local * h}
    if m.dropout:
        norms["two dropout masks"] = 2 * t.local * h
    mlp = (
        megatron_moe(m, layout, t)
        if m.is_moe_layer(index)
        else Footprint(_mlp_tensors(m, t.attention, m.ffn_hidden_size / tp))
    )
    return {
        "norms": Footprint(norms),
        "attention": Footprint(_attention_tensors(m, tp, t, options)),
        "mlp": mlp,
    }


def _attention_tensors(m: ModelShape, tp: int, t: Tokens, options: Options) -> dict[str, float]:
    q, k, v = m.q_width / tp, m.kv_width / min(tp, m.num_query_groups), m.v_width / tp
    rows = t.attention
    values = k if m.attention == "gqa" else v
    kept = {"q, k, v": 2 * rows * (q + k + values), "attention output": 2 * rows * v}
    if m.attention == "mla":
        latent = m.q_lora_rank + m.kv_lora_rank + m.qk_pos_emb_head_dim
        kept["latents, before and after their norms"] = 2 * 2 * rows * latent
        # The rotary part is concatenated to what the up-projections wrote, and values are padded to the key width.
        kept["padded values, joined heads"] = 2 * rows * (q - v + m.num_attention_heads / tp * m.qk_head_dim)
    heads = m.num_attention_heads / tp
    if options.flash_attention:
        kept["log-sum-exp"] = 4 * rows * heads
    else:  # scores after softmax, dropout mask, scores after dropout
        kept["attention matrices"] = rows * rows / t.batch * heads * (5 if m.dropout else 2)
    return kept


def _mlp_tensors(m: ModelShape, rows: float, ffn: float) -> dict[str, float]:
    first = 2 if m.gated_linear_unit else 1
    return {"before the activation": 2 * first * rows * ffn, "after the activation": 2 * rows * ffn}


def megatron_moe(m: ModelShape, layout: Layout, t: Tokens) -> Footprint:
    """Return the footprint of a mixture of experts of Megatron-Core: dispatch, experts, combine, shared expert."""
    h, d = m.hidden_size, t.experts
    kept = {f"experts, {name}": size for name, size in _mlp_tensors(m, d, m.moe_ffn_hidden_size / layout.etp).items()}
    kept["rows at the experts"] = 2 * d * h
    kept["outputs to combine"] = 2 * t.local * m.moe_router_topk * h
    kept["router logits, probabilities, maps"] = t.local * m.num_moe_experts * (4 + 4 + 1)
    if m.moe_shared_expert_intermediate_size:
        shared = _mlp_tensors(m, t.attention, m.moe_shared_expert_intermediate_size / layout.tp)
        kept |= {f"shared expert, {name}": size for name, size in shared.items()}
    return Footprint(kept, transient=2 * d * h)


def layer_footprints(m: ModelShape, layout: Layout, t: Tokens, options: Options, index: int) -> dict[str, Footprint]:
    """Return the footprints of layer ``index``, module by module, without recomputation."""
    return zaya_layer(m, layout, t) if m.is_zaya else megatron_layer(m, layout, t, options, index)


def without_recomputed_parts(
    footprints: dict[str, Footprint], m: ModelShape, layout: Layout, t: Tokens
) -> dict[str, Footprint]:
    """Return the footprints under selective recomputation: what `recompute_modules` names is run again."""
    parts, h = layout.recompute_modules, m.hidden_size
    kept = {name: Footprint(dict(f.kept), f.transient) for name, f in footprints.items()}
    q, k = m.q_width / layout.tp, m.kv_width / min(layout.tp, m.num_query_groups)
    if "layernorm" in parts:
        kept["norms"].kept = {"inputs": 4 * t.local * h}
    if "core_attn" in parts and not m.is_zaya:
        gone = ("attention matrices", "log-sum-exp")
        kept["attention"].transient += sum(kept["attention"].kept.pop(name, 0.0) for name in gone)
    elif "core_attn" in parts:
        attention = kept["attention"]
        between = attention.kept_bytes
        attention.kept = {
            "joined q, k, v weights": attention.kept["joined q, k, v weights"],
            "q, k, v": 2 * t.attention * (q + 2 * k),
            "attention output": 2 * t.attention * q,
        }
        attention.transient += between
    if "experts" in parts or "moe_act" in parts:
        name = "experts" if m.is_zaya else "mlp"
        for tensor in [n for n in kept[name].kept if "activation" in n or "gate and up" in n]:
            kept[name].transient += kept[name].kept.pop(tensor)
    if "moe" in parts and m.is_zaya:
        rerun = ("router", "experts")
        again = sum(kept[name].kept_bytes for name in rerun) + 4 * t.local * h
        kept["experts"] = Footprint({"choices, state": (8 + 2 * m.router_hidden_size) * t.local},
                                    kept["experts"].transient + again)  # fmt: skip
        kept["router"] = Footprint()
        kept["norms"].kept = {"one norm": kept["norms"].kept_bytes / 2}
    return kept


def embedding_footprint(m: ModelShape, t: Tokens) -> Footprint:
    """Return what the embedding leaves behind."""
    if m.is_zaya:
        return Footprint({"embedded tokens, scaled": 8 * t.local * m.hidden_size})
    return Footprint({"dropout mask": t.local * m.hidden_size} if m.dropout else {})


def head_footprint(m: ModelShape, layout: Layout, t: Tokens, options: Options) -> Footprint:
    """Return what norm, output layer and loss need; the logits live only from the loss to its backward pass."""
    h, rows, vocabulary = m.hidden_size, t.attention, m.vocab_size / layout.tp
    kept = {"inputs and output of the norm": 4 * t.local * h}
    if not m.is_zaya or options.loss_workspace_bytes is None:
        return Footprint(kept, transient=rows * vocabulary * (2 + (2 if options.fused_loss else 4)))
    if layout.tp > 1:
        kept["gathered input of the head"] = 2 * rows * h
    width = min(max(1.0, options.loss_workspace_bytes // (4 * rows)), vocabulary)
    whole = 4 * rows * vocabulary if width == vocabulary else 0.0  # one block is kept for the backward pass
    kept["sums per token"] = 12 * rows
    # Backward: the gradient of the weights in bf16, of x in fp32, and a block of logits in fp32 and bf16 beside the
    # gradient of the block before; the stream behind the last layer is gone.
    block = rows * width * (8 if not whole else 2)
    stream = 4 * t.local * h
    return Footprint(kept, transient=whole + 2 * vocabulary * h + 4 * rows * h + block - stream)


def boundary_bytes(m: ModelShape, t: Tokens, precision: Precision) -> float:
    """Return the size of what crosses a pipeline stage, one way, for one micro-batch."""
    width = m.hidden_size + (m.router_hidden_size if m.is_zaya else 0)
    return t.local * width * (4 if m.fp32_residual_connection else precision.parameter)
