"""Which collectives one rank takes part in during a step: operation, bytes of one call, group, number of calls.

For this project's own model the list equals, call by call and to the byte, what the dry run records
(tests/plan/test_collectives.py holds them together), but for the loss, norms and loads that are summed once a step, a
few kibibytes; what Muon adds is in `muon`.
Bytes follow the convention of `topology.cost`. Kinds are Megatron-Core's group names.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

from megatron_zaya.plan.activations import Tokens, boundary_bytes
from megatron_zaya.plan.buckets import bucket_elements, rank_buckets
from megatron_zaya.plan.parameters import Parameters, rank_parameters
from megatron_zaya.plan.shape import Batch, Layout, ModelShape, Precision
from megatron_zaya.plan.tensors import chunk_tensors

Where = Literal["layer", "head", "embedding", "stage", "gradients", "parameters", "end", "optimizer"]
Part = Literal["", "projections", "core_attn", "moe"]


class Flow(NamedTuple):
    """Equal calls of one rank: in a layer per micro-batch, otherwise per step."""

    where: Where
    kind: str
    op: str
    size_bytes: float
    ranks: tuple[int, int]
    """Stride and size of the group."""
    forward: float
    """Calls in forward passes."""
    backward: float
    """Calls in backward passes, without those that recomputation repeats."""
    part: Part = ""
    """Part of the layer; where it is run again, the backward pass repeats the forward calls."""
    behind_attention: bool = False
    """Travels while attention works on what came before."""

    @property
    def calls(self) -> float:
        """All calls."""
        return self.forward + self.backward


def group(layout: Layout, kind: str) -> tuple[int, int]:
    """Return (stride, size) of a kind of group in Megatron-Core's rank order tp-cp-ep-dp-pp."""
    match kind:
        case "tp":
            return 1, layout.tp
        case "cp":
            return layout.tp, layout.cp
        case "dp_cp":
            return layout.tp, layout.dp * layout.cp
        case "ep":
            return layout.etp, layout.ep
        case "ep_tp":
            return 1, layout.etp
        case "ep_dp":
            return layout.etp * layout.ep, layout.edp
        case "pp":  # from one stage to the next
            return layout.world_size // layout.pp, min(2, layout.pp)
        case "embd":
            return max(1, layout.world_size // layout.pp * (layout.pp - 1)), min(2, layout.pp)
    raise KeyError(kind)


def rerun_share(layout: Layout, part: Part, num_layers: int) -> float:
    """Return the share of the layers whose ``part`` the backward pass runs again."""
    if layout.recompute == "none":
        return 0.0
    if layout.recompute == "selective":
        return float(part in layout.recompute_modules)
    if layout.recompute_method == "block":
        return min(1.0, layout.recompute_num_layers * layout.stages / num_layers)
    return 1.0


def layer_flows(m: ModelShape, layout: Layout, t: Tokens, is_moe: bool) -> list[Flow]:
    """Return the collectives of one layer for one micro-batch, without recomputation."""
    flows = _tensor_flows(m, layout, t, is_moe) if layout.tp > 1 else []
    if layout.cp > 1:
        flows += context_flows(m, layout, t)
    if is_moe and layout.ep * layout.etp > 1:
        flows += _dispatch_flows(m, layout, t)
    return flows


def _tensor_flows(m: ModelShape, layout: Layout, t: Tokens, is_moe: bool) -> list[Flow]:
    """Rows around the products that are split over tensor-parallel ranks."""
    rows, ranks = 2 * t.attention * m.hidden_size, group(layout, "tp")
    if m.is_zaya:
        flows = [
            Flow("layer", "tp", "all_gather", rows, ranks, 1, 2, "projections"),
            Flow("layer", "tp", "reduce_scatter", rows, ranks, 1, 1, "projections"),
        ]
        holders = layout.tp // m.num_query_groups
        if holders > 1:  # the mean over all queries of a key-value head that several ranks hold
            means = 4 * t.attention * m.kv_channels
            flows.append(Flow("layer", "kv_replica", "all_reduce", means, (1, holders), 1, 1, "core_attn"))
        return flows
    blocks = 1 if is_moe and not m.moe_shared_expert_intermediate_size else 2  # attention, MLP
    if not layout.sequence_parallel:
        return [Flow("layer", "tp", "all_reduce", rows, ranks, blocks, blocks, "projections")]
    return [
        Flow("layer", "tp", "all_gather", rows, ranks, blocks, 2 * blocks, "projections"),
        Flow("layer", "tp", "reduce_scatter", rows, ranks, blocks, blocks, "projections"),
    ]


def context_flows(m: ModelShape, layout: Layout, t: Tokens) -> list[Flow]:
    """Keys and values of the other context-parallel ranks, and the rows before each chunk that convolutions need."""
    ranks, tp = group(layout, "cp"), layout.tp
    k = m.kv_width / min(tp, m.num_query_groups)
    kv = 2 * t.attention * (k + (m.v_width / tp if m.attention == "mla" else k))
    grads = 2 * kv if m.is_zaya else kv  # summed in fp32
    flows = []
    if m.is_zaya:
        rows = max(m.cca_time0 + m.cca_time1 - 2, 1) * t.batch
        sends = min(layout.cp - 1, 2)  # two neighbours, but for the first and the last rank
        halo = 2 * rows * (m.q_width / tp + 2 * k)
        flows.append(Flow("layer", "cp", "send_recv", halo, ranks, sends, sends, "core_attn"))
    if layout.cp_comm_type == "all_gather":
        flows.append(Flow("layer", "cp", "all_gather", kv * layout.cp, ranks, 1, 1, "core_attn"))
        flows.append(Flow("layer", "cp", "reduce_scatter", grads * layout.cp, ranks, 0, 1, "core_attn"))
        return flows
    around = layout.cp - 1
    return [
        *flows,
        Flow("layer", "cp", "send_recv", kv, ranks, around, around, "core_attn", behind_attention=True),
        Flow("layer", "cp", "send_recv", grads, ranks, 0, around, "core_attn", behind_attention=True),
        Flow("layer", "cp", "send_recv", grads, ranks, 0, 1, "core_attn"),  # the way home
    ]


def _dispatch_flows(m: ModelShape, layout: Layout, t: Tokens) -> list[Flow]:
    """Rows to their experts and back, and their gradients; probabilities and theirs."""
    if layout.dispatcher == "allgather":
        return _gathered_dispatch_flows(m, layout, t)
    d = t.local * (1 - m.skip_share) * m.moe_router_topk
    everyone = layout.ep * layout.etp
    counts = 8.0 * everyone * m.num_moe_experts
    flows = [Flow("layer", "ep", "all_gather", counts, (1, everyone), 1, 0, "moe")]
    if layout.ep > 1:
        ranks = group(layout, "ep")
        flows.append(Flow("layer", "ep", "all_to_all", 2 * d * m.hidden_size, ranks, 2, 2, "moe"))
        flows.append(Flow("layer", "ep", "all_to_all", 4 * d, ranks, 1, 1, "moe"))
    if layout.etp > 1:
        ranks, whole = group(layout, "ep_tp"), d * layout.etp * m.hidden_size
        # Forward: gather bf16 rows and fp32 probabilities, sum fp32 results; backward: the mirror.
        for op, mirror, size in (
            ("all_gather", "reduce_scatter", 2 * whole),
            ("reduce_scatter", "all_gather", 4 * whole),
            ("all_gather", "reduce_scatter", 4 * d * layout.etp),
        ):
            flows.append(Flow("layer", "ep_tp", op, size, ranks, 1, 0, "moe"))
            flows.append(Flow("layer", "ep_tp", mirror, size, ranks, 0, 1, "moe"))
    return flows


def _gathered_dispatch_flows(m: ModelShape, layout: Layout, t: Tokens) -> list[Flow]:
    """All rows, probabilities and routing maps to all ranks, fp32 sums back; the gradients mirror, maps have none."""
    size = layout.ep * layout.etp
    rows, routing = t.local * size * m.hidden_size, t.local * size * m.num_moe_experts
    return [
        Flow("layer", "ep", "all_gather", 2 * rows, (1, size), 1, 0, "moe"),
        Flow("layer", "ep", "reduce_scatter", 2 * rows, (1, size), 0, 1, "moe"),
        Flow("layer", "ep", "reduce_scatter", 4 * rows, (1, size), 1, 0, "moe"),
        Flow("layer", "ep", "all_gather", 4 * rows, (1, size), 0, 1, "moe"),
        Flow("layer", "ep", "all_gather", 4 * routing, (1, size), 1, 0, "moe"),
        Flow("layer", "ep", "reduce_scatter", 4 * routing, (1, size), 0, 1, "moe"),
        Flow("layer", "ep", "all_gather", routing, (1, size), 1, 0, "moe"),
    ]


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
    layers = [index for stage in stages for index in range(sum(sizes[:stage]), sum(sizes[: stage + 1]))]
    moe = sum(m.is_moe_layer(index) for index in layers)
    flows: list[Flow] = []
    for is_moe, count in ((True, moe), (False, len(layers) - moe)):
        for flow in layer_flows(m, layout, t, is_moe) if count else ():
            again = flow.forward * rerun_share(layout, flow.part, m.num_layers)
            times = count * micro
            flows.append(flow._replace(forward=flow.forward * times, backward=(flow.backward + again) * times))
    flows += _end_flows(m, layout, t, micro, pp_rank)
    flows += hop_flows(m, layout, t, precision, micro, pp_rank)
    return flows + data_parallel_flows(m, layout, precision, pp_rank)


def hop_flows(
    m: ModelShape, layout: Layout, t: Tokens, precision: Precision, micro: int, pp_rank: int = 0
) -> list[Flow]:
    """Return what a pipeline rank sends to the next stages (forward) and to those before (backward)."""
    if layout.pp == 1:
        return []
    on, back = (layout.vp - (pp_rank == end) for end in (layout.pp - 1, 0))
    crossing = boundary_bytes(m, t, precision)
    return [Flow("stage", "pp", "send_recv", crossing, group(layout, "pp"), micro * on, micro * back)]


def _end_flows(m: ModelShape, layout: Layout, t: Tokens, micro: int, pp_rank: int) -> list[Flow]:
    """Embedding, head and loss under tensor parallelism."""
    if layout.tp == 1:
        return []
    rows, ranks = 2 * t.attention * m.hidden_size, group(layout, "tp")
    flows = []
    if pp_rank == 0:
        flows += [Flow("embedding", "tp", "reduce_scatter", rows, ranks, micro, 0)]
        flows += [Flow("embedding", "tp", "all_gather", rows, ranks, 0, micro)]
    if pp_rank == layout.pp - 1:
        flows += [Flow("head", "tp", "all_gather", rows, ranks, micro, 0)]
        flows += [Flow("head", "tp", "reduce_scatter", rows, ranks, 0, micro)]
        flows += [Flow("head", "tp", "all_reduce", 4 * t.attention, ranks, micro, 0)]
        flows += [Flow("head", "tp", "all_reduce", 8 * t.attention, ranks, micro, 0)]
    return flows


def data_parallel_flows(m: ModelShape, layout: Layout, precision: Precision, pp_rank: int) -> list[Flow]:
    """Return what gradients and parameters need once a step, bucket by bucket, and the gradients that ranks share."""
    parameters = rank_parameters(m, layout, pp_rank)
    flows = []
    # Without overlap each of the two chained optimizers gathers the parameters of both.
    chained = parameters.dense > 0 and parameters.expert > 0
    gathers = 1 if layout.overlap_param_gather or not chained else 2
    for kind, is_expert in (("dp_cp", False), ("ep_dp", True)):
        ranks = group(layout, kind)
        for elements, count in _bucket_sizes(m, layout, parameters, pp_rank, is_expert) if ranks[1] > 1 else ():
            gradients, weights = elements * precision.gradient, elements * precision.parameter
            if layout.use_distributed_optimizer:
                flows.append(Flow("gradients", kind, "reduce_scatter", gradients, ranks, 0, count))
                flows.append(Flow("parameters", kind, "all_gather", weights, ranks, gathers * count, 0))
            else:
                flows.append(Flow("gradients", kind, "all_reduce", gradients, ranks, 0, count))
    return flows + _shared_gradient_flows(m, layout, precision, pp_rank)


def _bucket_sizes(
    m: ModelShape, layout: Layout, parameters: Parameters, pp_rank: int, is_expert: bool
) -> list[tuple[float, int]]:
    """Return the elements of buckets and how many such there are: exact for ZAYA, by size of the tensors otherwise."""
    if m.is_zaya:
        return list(Counter(float(bucket.numel) for bucket in rank_buckets(m, layout, pp_rank, is_expert)).items())
    if is_expert:
        return _expert_buckets(layout, parameters.expert, parameters.largest_expert)
    return _dense_buckets(layout, parameters.dense, parameters.largest_dense)


def _dense_buckets(layout: Layout, elements: int, largest: int) -> list[tuple[float, int]]:
    """Buckets of all that is no expert: one holds the largest tensor, the others are closed when full."""
    if not elements:
        return []
    others = (elements - largest) // bucket_elements(layout) if layout.overlap_grad_reduce else 0
    if not others:
        return [(elements, 1)]
    first = max(largest, elements / (others + 1))
    return [(first, 1), ((elements - first) / others, others)]


def _expert_buckets(layout: Layout, elements: int, largest: int) -> list[tuple[float, int]]:
    """Buckets of the experts; the tensors of a layer's experts are two, often larger than a bucket."""
    if not elements:
        return []
    count = int(elements // max(bucket_elements(layout), 0.75 * largest)) if layout.overlap_grad_reduce else 1
    return [(elements / max(1, count), max(1, count))]


def _shared_gradient_flows(m: ModelShape, layout: Layout, precision: Precision, pp_rank: int) -> list[Flow]:
    """Gradients of tensors that several ranks hold: the tied table, what tensor parallelism replicates."""
    flows = []
    if layout.pp > 1 and m.share_embeddings_and_output_weights and pp_rank in (0, layout.pp - 1):
        table = m.vocab_size * m.hidden_size / layout.tp
        flows.append(Flow("end", "embd", "all_reduce", table * precision.gradient, group(layout, "embd"), 0, 1))
    if layout.tp == 1 or not m.is_zaya:
        return flows
    split = Layout(tp=layout.tp, pp=layout.pp, vp=layout.vp, stage_layers=layout.stage_layers)
    of_heads, replicated = _copied_elements(m, split, pp_rank)
    if layout.sequence_parallel:
        size = replicated * precision.gradient
        flows.append(Flow("end", "tp", "all_reduce", size, group(layout, "tp"), 0, 1))
    if of_heads:
        size = of_heads * precision.gradient
        flows.append(Flow("end", "kv_replica", "all_reduce", size, (1, layout.tp // m.num_query_groups), 0, 1))
    return flows


@lru_cache(maxsize=4096)
def _copied_elements(m: ModelShape, split: Layout, pp_rank: int) -> tuple[int, int]:
    """Return what a rank holds of shared key-value heads, and of what every tensor-parallel rank holds."""
    of_heads = replicated = 0
    for stage in range(pp_rank, split.stages, split.pp):
        for tensor in chunk_tensors(m, split, stage):
            if tensor.copies > 1 and tensor.is_attention:
                of_heads += tensor.numel
            elif tensor.copies > 1:
                replicated += tensor.numel
    return of_heads, replicated
