"""Which collectives one rank takes part in during a step: operation, bytes of one call, group, number of calls.

For this project's own model the list equals what the dry run records (tests/plan/test_step_time.py holds them
together), padding of buckets and messages below a kibibyte aside. Bytes follow the convention of `topology.cost`.
Kinds are Megatron-Core's group names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_zaya.plan.activations import Tokens, boundary_bytes
from megatron_zaya.plan.parameters import layer_parameters, rank_parameters
from megatron_zaya.plan.shape import Batch, Layout, ModelShape, Precision

Where = Literal["layer", "head", "embedding", "stage", "gradients", "parameters", "end"]


@dataclass(frozen=True)
class Flow:
    """``calls`` equal calls per step of one rank."""

    where: Where
    kind: str
    op: str
    size_bytes: float
    calls: float
    backward: float = 0.5
    """Share of the calls in backward passes."""


def group(layout: Layout, kind: str) -> tuple[int, int]:
    """Return (stride, size) of a kind of group in Megatron-Core's rank order tp-cp-ep-dp-pp."""
    stage = layout.world_size // layout.pp
    return {
        "tp": (1, layout.tp),
        "kv_replica": (1, max(1, layout.tp // 2)),  # ranks of a node that share a key-value head
        "cp": (layout.tp, layout.cp),
        "dp_cp": (layout.tp, layout.dp * layout.cp),
        "ep": (layout.etp, layout.ep),
        "ep_tp": (1, layout.etp),
        "ep_dp": (layout.etp * layout.ep, layout.edp),
        "pp": (stage, layout.pp),
        "embd": (stage * (layout.pp - 1) if layout.pp > 1 else 1, 2 if layout.pp > 1 else 1),
        "world": (1, layout.world_size),
    }[kind]


def layer_flows(m: ModelShape, layout: Layout, t: Tokens, is_moe: bool) -> list[Flow]:
    """Return the collectives of one layer for one micro-batch, forward and backward."""
    rows = 2 * t.attention * m.hidden_size
    flows = []
    again = 1.0 if layout.recompute == "full" else 0.0
    if layout.tp > 1 and m.is_zaya:
        flows.append(Flow("layer", "tp", "all_gather", rows, 3 + again, (2 + again) / (3 + again)))
        flows.append(Flow("layer", "tp", "reduce_scatter", rows, 2 + again, (1 + again) / (2 + again)))
        if layout.tp > m.num_query_groups:
            flows.append(Flow("layer", "kv_replica", "all_reduce", 4 * t.attention * m.kv_channels, 2 + again))
    elif layout.tp > 1 and layout.sequence_parallel:
        flows.append(Flow("layer", "tp", "all_gather", rows, 6 + 2 * again, 4 / 6))
        flows.append(Flow("layer", "tp", "reduce_scatter", rows, 4 + 2 * again))
    elif layout.tp > 1:
        flows.append(Flow("layer", "tp", "all_reduce", rows, 4 + 2 * again))
    if layout.cp > 1:
        kv = 4 * t.attention * layout.cp * m.kv_width / min(layout.tp, m.num_query_groups)
        flows.append(Flow("layer", "cp", "all_gather", kv, 2 + again))
        flows.append(Flow("layer", "cp", "reduce_scatter", 2 * kv, 1, 1.0))
    if is_moe and layout.ep * layout.etp > 1:
        flows += _dispatch_flows(m, layout, t, again or float("moe" in layout.recompute_modules) * _selective(layout))
    return flows


def _selective(layout: Layout) -> float:
    return float(layout.recompute == "selective")


def _dispatch_flows(m: ModelShape, layout: Layout, t: Tokens, again: float) -> list[Flow]:
    """Rows to their experts and back, and their gradients; probabilities and theirs."""
    d = t.local * (1 - m.skip_share) * m.moe_router_topk
    flows = []
    if layout.ep > 1:
        flows.append(
            Flow("layer", "ep", "all_to_all", 2 * d * m.hidden_size, 4 + 2 * again, (2 + 2 * again) / (4 + 2 * again))
        )
        flows.append(Flow("layer", "ep", "all_to_all", 4 * d, 2 + again))
    if layout.etp > 1:
        whole = d * layout.etp * m.hidden_size
        for op in ("all_gather", "reduce_scatter"):
            flows.append(Flow("layer", "ep_tp", op, 2 * whole, 1 + again * (op == "all_gather")))
            flows.append(Flow("layer", "ep_tp", op, 4 * whole, 1 + again * (op == "reduce_scatter")))
            flows.append(Flow("layer", "ep_tp", op, 4 * d * layout.etp, 1))
    return flows


def step_flows(
    m: ModelShape,
    layout: Layout,
    batch: Batch,
    precision: Precision,
    pp_rank: int = 0,
    skip_share: float | None = None,
) -> list[Flow]:
    """Return all collectives of one step of the ranks of a pipeline rank; `skip_share` replaces the model's."""
    m = m if skip_share is None else replace(m, skip_share=skip_share)
    t = Tokens.of(m, layout, batch, 1.0)
    micro = batch.microbatches(layout)
    sizes = layout.layers_of_stages(m.num_layers)
    stages = range(pp_rank, layout.stages, layout.pp)
    flows: list[Flow] = []
    layers = [index for stage in stages for index in range(sum(sizes[:stage]), sum(sizes[: stage + 1]))]
    moe = sum(m.is_moe_layer(index) for index in layers)
    for is_moe, count in ((True, moe), (False, len(layers) - moe)):
        flows += [
            Flow(f.where, f.kind, f.op, f.size_bytes, f.calls * count * micro, f.backward)
            for f in (layer_flows(m, layout, t, is_moe) if count else ())
        ]
    flows += _end_flows(m, layout, t, micro, pp_rank)
    if layout.pp > 1:
        sent = (0 not in stages) + 0, (layout.stages - 1 not in stages) + 0
        crossing = boundary_bytes(m, t, precision)
        flows.append(Flow("stage", "pp", "send_recv", crossing, micro * (2 * layout.vp - 2 + sent[0] + sent[1])))
    flows += _data_parallel_flows(m, layout, precision, pp_rank)
    return flows


def _end_flows(m: ModelShape, layout: Layout, t: Tokens, micro: int, pp_rank: int) -> list[Flow]:
    """Embedding, head and loss under tensor parallelism."""
    if layout.tp == 1:
        return []
    rows = 2 * t.attention * m.hidden_size
    flows = []
    if pp_rank == 0:
        flows += [Flow("embedding", "tp", "reduce_scatter", rows, micro, 0.0)]
        flows += [Flow("embedding", "tp", "all_gather", rows, micro, 1.0)]
    if pp_rank == layout.pp - 1:
        flows += [Flow("head", "tp", "all_gather", rows, micro, 0.0)]
        flows += [Flow("head", "tp", "reduce_scatter", rows, micro, 1.0)]
        flows += [Flow("head", "tp", "all_reduce", 4 * t.attention, micro, 0.0)]
        flows += [Flow("head", "tp", "all_reduce", 8 * t.attention, micro, 0.0)]
    return flows


def _data_parallel_flows(m: ModelShape, layout: Layout, precision: Precision, pp_rank: int) -> list[Flow]:
    parameters = rank_parameters(m, layout, pp_rank)
    flows = []
    # Without overlap each of the two chained optimizers gathers the parameters of both.
    chained = parameters.dense > 0 and parameters.expert > 0
    gathers = 1 if layout.overlap_param_gather or not chained else 2
    for kind, elements in (("dp_cp", parameters.dense), ("ep_dp", parameters.expert)):
        if group(layout, kind)[1] == 1 or not elements:
            continue
        if layout.use_distributed_optimizer:
            flows.append(Flow("gradients", kind, "reduce_scatter", elements * precision.gradient, 1, 1.0))
            flows.append(Flow("parameters", kind, "all_gather", elements * precision.parameter, gathers, 0.0))
        else:
            flows.append(Flow("gradients", kind, "all_reduce", elements * precision.gradient, 1, 1.0))
    if layout.pp > 1 and m.share_embeddings_and_output_weights and pp_rank in (0, layout.pp - 1):
        table = m.vocab_size * m.hidden_size / layout.tp
        flows.append(Flow("end", "embd", "all_reduce", table * precision.gradient, 1, 1.0))
    if layout.tp > 1 and layout.sequence_parallel and m.is_zaya:
        flows.append(Flow("end", "tp", "all_reduce", _replicated(m, layout, pp_rank) * precision.gradient, 1, 1.0))
    if m.is_zaya and layout.tp > m.num_query_groups:
        width = m.kv_width // m.num_query_groups
        shared = 2 * width * m.hidden_size + width * (m.cca_time0 + m.kv_channels * m.cca_time1 + 2) + 1
        layers = sum(layout.layers_of_stages(m.num_layers)[pp_rank :: layout.pp])
        flows.append(Flow("end", "kv_replica", "all_reduce", shared * layers * precision.gradient, 1, 1.0))
    return flows


def _replicated(m: ModelShape, layout: Layout, pp_rank: int) -> int:
    """Return the elements that every tensor-parallel rank holds: norms, residual scaling, routers."""
    alone = Layout(tp=1)
    split = Layout(world_size=2, tp=2)
    total = 0
    sizes = layout.layers_of_stages(m.num_layers)
    for stage in range(pp_rank, layout.stages, layout.pp):
        for count, index in ((sizes[stage] - (stage == 0), m.num_layers), (int(stage == 0), 0)):
            # What halves with two ranks is split; the rest is replicated.
            whole, part = layer_parameters(m, alone, index).dense, layer_parameters(m, split, index).dense
            total += (2 * part - whole) * count
        total += 2 * m.hidden_size * (stage == 0) + m.hidden_size * (stage == layout.stages - 1)
    return total
