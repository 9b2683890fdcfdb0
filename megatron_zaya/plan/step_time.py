"""How long a step takes and where the time goes: products, attention, memory passes, collectives, bubbles.

Per virtual stage the passes of one micro-batch are priced piece by piece; the pipeline is then simulated event by event
in the order of `schedule.passes`. Gradient reduction hides behind the last backward pass and parameter gathering behind
the first forward pass as far as these reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_zaya.plan.activations import Options, Tokens, layer_footprints
from megatron_zaya.plan.collectives import Flow, group, layer_flows, step_flows
from megatron_zaya.plan.hardware import Accelerator, Network
from megatron_zaya.plan.parameters import active_parameters, layer_parameters, rank_parameters
from megatron_zaya.plan.schedule import passes
from megatron_zaya.plan.shape import Batch, Layout, ModelShape, Precision

OVERLAP = 0.85
"""Share of a pass behind which reductions can hide: the first bucket must be full before anything is sent."""

HOST_S = 6e-6
"""Time the host needs to start one kernel from PyTorch."""
KERNELS = {"zaya": (140, 240), "dense": (60, 100), "moe": (800, 1500)}
"""Kernels of a layer, forward and backward: this project's counted by the dry run (views at a third), Megatron-Core's
dense layer with fused kernels estimated, its mixture of experts, one by one, fitted."""


@dataclass(frozen=True)
class Assumptions:
    """What the hardware and the data decide."""

    skew: float = 1.0
    """Load of the busiest expert rank over the mean."""
    fused_optimizer: bool = True
    passes_per_tensor: float = 2.0
    """Times each kept tensor crosses memory in the forward pass beyond the products; backward twice that."""


@dataclass
class StageTime:
    """One micro-batch through one virtual stage. Seconds, by what is done."""

    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)

    @property
    def forward_s(self) -> float:
        """Whole forward pass."""
        return sum(self.forward.values())

    @property
    def backward_s(self) -> float:
        """Whole backward pass."""
        return sum(self.backward.values())


@dataclass(frozen=True)
class StepTime:
    """One optimizer step of the slowest pipeline rank."""

    step_s: float
    parts: Mapping[str, float]
    """Seconds by cause; they add up to the step."""
    tokens_per_s: float
    flops_per_token: float
    """Of the model: six per active weight, and attention; recomputation does not count."""
    world_size: int
    peak_tflops: float

    @property
    def tokens_per_gpu_s(self) -> float:
        """Tokens per second and accelerator."""
        return self.tokens_per_s / self.world_size

    @property
    def tflops(self) -> float:
        """Model TFLOP/s per accelerator."""
        return self.tokens_per_gpu_s * self.flops_per_token / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the vendor's peak."""
        return self.tflops / self.peak_tflops


def model_flops_per_token(m: ModelShape, seq_length: int) -> float:
    """Return forward and backward operations per token: 6 per active weight, 12 x width x length / 2 of attention.

    Source: Kaplan et al., arXiv 2001.08361, with the attention term of Narayanan et al., arXiv 2104.04473, halved
    for the causal mask.
    """
    full = m.num_layers - m.num_sliding_layers
    window = min(m.sliding_window or seq_length, seq_length)
    attention = 6.0 * (m.q_width + m.v_width) / 2 * (full * seq_length + m.num_sliding_layers * 2 * window)
    return 6.0 * active_parameters(m) + attention


def _products(
    m: ModelShape, layout: Layout, t: Tokens, is_moe: bool, skew: float
) -> dict[str, list[tuple[float, ...]]]:
    """Return the matrix products of one layer's forward pass as (m, n, k, count)."""
    h, tp = m.hidden_size, layout.tp
    q, k, v = m.q_width / tp, m.kv_width / min(tp, m.num_query_groups), m.v_width / tp
    values = k if m.attention != "mla" else v
    rows = t.attention
    products: dict[str, list[tuple[float, ...]]] = {"attention": [(rows, q + k + values, h, 1), (rows, h, v, 1)]}
    if m.attention == "mla":
        down = m.kv_lora_rank + m.qk_pos_emb_head_dim + m.q_lora_rank
        up = m.num_attention_heads / tp * (m.qk_head_dim + m.v_head_dim)
        query = (rows, q, m.q_lora_rank or h, 1)
        products["attention"] = [(rows, down, h, 1), query, (rows, up, m.kv_lora_rank, 1), (rows, h, v, 1)]
    if m.is_zaya:
        taps = m.cca_time0 + m.cca_time1 - 1
        heads = (q + k) / m.kv_channels
        products["convolutions"] = [(rows * heads, m.kv_channels, m.kv_channels, taps)]
    first = 2 if m.gated_linear_unit else 1
    if not is_moe:
        f = m.ffn_hidden_size / tp
        products["mlp"] = [(rows, first * f, h, 1), (rows, h, f, 1)]
        return products
    r = m.router_hidden_size
    products["router"] = [(t.local, m.num_moe_experts, h, 1)]
    if r:
        products["router"] = [(t.local, r, h, 1), (t.local, r, r, 2), (t.local, m.num_moe_experts + 1, r, 1)]
    local, f = m.num_moe_experts / layout.ep, m.moe_ffn_hidden_size / layout.etp
    d = t.local * (1 - m.skip_share) * m.moe_router_topk * layout.etp * skew / local
    products["experts"] = [(d, first * f, h, local), (d, h, f, local)]
    if m.moe_shared_expert_intermediate_size:
        f = m.moe_shared_expert_intermediate_size / tp
        products["shared expert"] = [(rows, first * f, h, 1), (rows, h, f, 1)]
    return products


def layer_time(
    m: ModelShape, layout: Layout, batch: Batch, device: Accelerator, network: Network, assume: Assumptions,
    options: Options, is_moe: bool,
) -> StageTime:  # fmt: skip
    """Return the times of one layer for one micro-batch."""
    t = Tokens.of(m, layout, batch, 1.0)
    result = StageTime()
    for name, products in _products(m, layout, t, is_moe, assume.skew if layout.ep > 1 else 1.0).items():
        result.forward[name] = sum(device.product_s(*product) for product in products)
        # The gradients of the input and of the weights are products of the same size.
        result.backward[name] = sum(
            device.product_s(rows, k, n, c) + device.product_s(n, k, rows, c) for rows, n, k, c in products
        )
    seen = batch.seq_length if not m.num_sliding_layers else min(m.sliding_window or batch.seq_length, batch.seq_length)
    width = (m.q_width + m.v_width) / layout.tp
    scores = 2.0 * t.attention * (seen / 2) * width
    result.forward["core attention"] = device.attention_s(scores)
    result.backward["core attention"] = device.attention_s(2.5 * scores)
    footprints = layer_footprints(m, layout, t, options, m.num_layers if is_moe else 0)
    kept = sum(f.kept_bytes for f in footprints.values())
    result.forward["memory passes"] = device.traffic_s(assume.passes_per_tensor * kept)
    result.backward["memory passes"] = 2 * result.forward["memory passes"]
    weights = layer_weights(m, layout, is_moe)
    result.backward["gradient accumulation"] = device.traffic_s(weights * (2 + 4 + 4)) if m.is_zaya else 0.0
    for flow in layer_flows(m, layout, t, is_moe):
        stride, size = group(layout, flow.kind)
        skew = assume.skew if flow.op == "all_to_all" else 1.0
        seconds = flow.calls * network.time_s(flow.op, flow.size_bytes, stride, size, skew)
        name = {"tp": "tensor parallel", "kv_replica": "tensor parallel", "cp": "context parallel"}.get(
            flow.kind, "expert parallel"
        )
        result.forward[name] = result.forward.get(name, 0.0) + seconds * (1 - flow.backward)
        result.backward[name] = result.backward.get(name, 0.0) + seconds * flow.backward
    _add_recomputation(result, layout, m)
    forward, backward = KERNELS["zaya" if m.is_zaya else "moe" if is_moe else "dense"]
    again = forward if layout.recompute == "full" else 0
    # Where the accelerator finishes a layer before the host has started the next, it waits.
    result.forward["waiting for the host"] = max(0.0, forward * HOST_S - result.forward_s)
    result.backward["waiting for the host"] = max(0.0, (backward + again) * HOST_S - result.backward_s)
    return result


def layer_weights(m: ModelShape, layout: Layout, is_moe: bool) -> float:
    """Return the elements of one layer on a rank."""
    return layer_parameters(m, layout, m.num_layers if is_moe else 0).total


def _add_recomputation(result: StageTime, layout: Layout, m: ModelShape) -> None:
    local = {k: v for k, v in result.forward.items() if not k.endswith("parallel")}
    if layout.recompute == "full":
        share = 1.0
        if layout.recompute_method == "block":
            share = min(1.0, layout.recompute_num_layers * layout.stages / m.num_layers)
        result.backward["recomputation"] = share * sum(local.values())
    elif layout.recompute == "selective":
        again = {
            "core_attn": ("core attention", "convolutions"),
            "experts": ("experts",),
            "moe_act": (),
            "moe": ("experts", "router"),
            "layernorm": (),
        }
        names = {name for module in layout.recompute_modules for name in again.get(module, ())}
        result.backward["recomputation"] = sum(local.get(name, 0.0) for name in names) + 0.2 * local["memory passes"]


def stage_time(
    m: ModelShape, layout: Layout, batch: Batch, device: Accelerator, network: Network, assume: Assumptions,
    options: Options, stage: int, cache: dict[bool, StageTime],
) -> StageTime:  # fmt: skip
    """Return the times of one virtual stage for one micro-batch; ``cache`` holds the layers' times."""
    sizes = layout.layers_of_stages(m.num_layers)
    first = sum(sizes[:stage])
    total = StageTime()
    moe = sum(m.is_moe_layer(index) for index in range(first, first + sizes[stage]))
    for is_moe, count in ((True, moe), (False, sizes[stage] - moe)):
        if not count:
            continue
        if is_moe not in cache:
            cache[is_moe] = layer_time(m, layout, batch, device, network, assume, options, is_moe)
        for into, layer in ((total.forward, cache[is_moe].forward), (total.backward, cache[is_moe].backward)):
            for name, seconds in layer.items():
                into[name] = into.get(name, 0.0) + seconds * count
    t = Tokens.of(m, layout, batch, 1.0)
    if stage == layout.stages - 1:
        v = m.vocab_size / layout.tp
        product = device.product_s(t.attention, v, m.hidden_size)
        blockwise = m.is_zaya and options.loss_workspace_bytes is not None
        total.forward["head"] = product + device.traffic_s(t.attention * v * 12)
        total.backward["head"] = (3 if blockwise else 2) * product + device.traffic_s(t.attention * v * 12)
    if stage == 0:
        total.forward["embedding"] = device.traffic_s(6 * t.local * m.hidden_size)
        total.backward["embedding"] = device.traffic_s(10 * m.vocab_size / layout.tp * m.hidden_size)
    return total


class Event(NamedTuple):
    """One pass of one micro-batch through one virtual stage, when it happens."""

    rank: int
    forward: bool
    microbatch: int
    stage: int
    start_s: float
    length_s: float


Timeline = list[Event]


def timeline(layout: Layout, microbatches: int, times: list[StageTime], hop_s: float) -> Timeline:
    """Return every pass of a step. A pass starts when its rank is free and its input has arrived."""
    pp = layout.pp
    orders = [passes(pp, layout.vp, microbatches, rank, layout.schedule) for rank in range(pp)]
    done: dict[tuple[bool, int, int], float] = {}
    clock, position = [0.0] * pp, [0] * pp
    events: Timeline = []
    while any(position[rank] < len(orders[rank]) for rank in range(pp)):
        before = len(events)
        for rank in range(pp):
            while position[rank] < len(orders[rank]):
                forward, micro, chunk = orders[rank][position[rank]]
                stage = chunk * pp + rank
                arrival = _arrival(done, forward, micro, stage, layout.stages, hop_s)
                if arrival is None:
                    break
                length = times[stage].forward_s if forward else times[stage].backward_s
                start = max(clock[rank], arrival)
                clock[rank] = done[forward, micro, stage] = start + length
                events.append(Event(rank, forward, micro, stage, start, length))
                position[rank] += 1
        assert len(events) > before, "a schedule whose passes wait for each other"
    return events


def _arrival(
    done: dict[tuple[bool, int, int], float], forward: bool, micro: int, stage: int, stages: int, hop_s: float
) -> float | None:
    """Return when the input of a pass is there; None if the pass that makes it has not run."""
    if forward:
        if stage == 0:
            return 0.0
        ready = done.get((True, micro, stage - 1))
    elif stage == stages - 1:
        return done.get((True, micro, stage))
    else:
        ready = done.get((False, micro, stage + 1))
    return None if ready is None else ready + hop_s


def simulate(layout: Layout, microbatches: int, times: list[StageTime], hop_s: float) -> tuple[float, list[float]]:
    """Return the length of the passes of a step and the idle time of each pipeline rank.

    Many micro-batches repeat the same pattern: beyond some turns the rest is extrapolated.
    """
    pp = layout.pp
    if pp == 1:
        return microbatches * _busy(layout, times, 0), [0.0]
    turns = 2 * pp
    if microbatches > turns + pp:
        short, _ = simulate(layout, turns, times, hop_s)
        longer, _ = simulate(layout, turns + pp, times, hop_s)
        end = short + (microbatches - turns) / pp * (longer - short)
    else:
        end = max(event.start_s + event.length_s for event in timeline(layout, microbatches, times, hop_s))
    idle = [end - microbatches * _busy(layout, times, rank) for rank in range(pp)]
    if layout.schedule == "zb1p":  # weight gradients fill two thirds of the bubble (arXiv 2401.10241, section 2)
        saved = 2 / 3 * min(idle)
        end, idle = end - saved, [rank_idle - saved for rank_idle in idle]
    return end, idle


def _busy(layout: Layout, times: list[StageTime], rank: int) -> float:
    return sum(times[s].forward_s + times[s].backward_s for s in range(rank, layout.stages, layout.pp))


def _optimizer_s(
    m: ModelShape, layout: Layout, device: Accelerator, precision: Precision, assume: Assumptions, pp_rank: int
) -> float:
    """Read gradients, masters and moments, write masters, moments and parameters; zero gradients; norm."""
    parameters = rank_parameters(m, layout, pp_rank)
    own = (
        parameters.dense / (layout.dp * layout.cp) + parameters.expert / layout.edp
        if layout.use_distributed_optimizer
        else parameters.total
    )
    per_element = 2 * precision.gradient + 2 * (precision.master + precision.moments) + precision.parameter
    passes = per_element if assume.fused_optimizer else 2.5 * per_element
    seconds = device.traffic_s(own * passes + parameters.total * precision.gradient)
    if precision.matrix_moments < precision.moments:  # Muon: five Newton-Schulz steps of three products
        seconds += _newton_schulz_s(m, layout, device, own / max(1, parameters.total))
    return seconds


def _newton_schulz_s(m: ModelShape, layout: Layout, device: Accelerator, share: float) -> float:
    h, f = m.hidden_size, m.moe_ffn_hidden_size or m.ffn_hidden_size
    short, long = min(h, f), max(h, f)
    one = 5 * (2 * device.product_s(short, long, short) + device.product_s(short, short, short))
    matrices = 3 * m.num_layers * max(1, m.num_moe_experts) / (layout.pp * layout.ep)
    return one * matrices * share


def stage_times(
    m: ModelShape, layout: Layout, batch: Batch, device: Accelerator, network: Network, options: Options,
    assume: Assumptions,
) -> list[StageTime]:  # fmt: skip
    """Return the times of every virtual stage for one micro-batch."""
    cache: dict[bool, StageTime] = {}
    return [
        stage_time(m, layout, batch, device, network, assume, options, stage, cache) for stage in range(layout.stages)
    ]


def hop_time_s(m: ModelShape, layout: Layout, batch: Batch, network: Network, precision: Precision) -> float:
    """Return the time from one stage to the next."""
    flows = step_flows(m, layout, batch, precision, 0)
    return max((_price(flow, layout, network) for flow in flows if flow.where == "stage"), default=0.0)


def plan_step_time(
    m: ModelShape,
    layout: Layout,
    batch: Batch,
    device: Accelerator,
    network: Network,
    *,
    precision: Precision | None = None,
    options: Options | None = None,
    assume: Assumptions | None = None,
) -> StepTime:
    """Return the predicted time of one optimizer step."""
    precision, options, assume = precision or Precision(), options or Options(), assume or Assumptions()
    times = stage_times(m, layout, batch, device, network, options, assume)
    micro = batch.microbatches(layout)
    flows = step_flows(m, layout, batch, precision, 0)
    _, idle = simulate(layout, micro, times, hop_time_s(m, layout, batch, network, precision))
    slowest = max(range(layout.pp), key=lambda rank: _busy(layout, times, rank))
    parts: dict[str, float] = {}
    for stage in range(slowest, layout.stages, layout.pp):
        for side in (times[stage].forward, times[stage].backward):
            for name, seconds in side.items():
                parts[name] = parts.get(name, 0.0) + seconds * micro
    parts["pipeline bubbles and transfers"] = idle[slowest]
    parts["gradients, exposed"] = _exposed(
        flows, "gradients", layout, network, sum(t.backward_s for t in times) / layout.pp, layout.overlap_grad_reduce
    )
    parts["parameters, exposed"] = _exposed(
        flows, "parameters", layout, network, sum(t.forward_s for t in times) / layout.pp, layout.overlap_param_gather
    )
    parts["tied and replicated gradients"] = sum(
        f.calls * _price(f, layout, network) for f in flows if f.where == "end"
    )
    parts["optimizer"] = _optimizer_s(m, layout, device, precision, assume, slowest)
    step = sum(parts.values())
    return StepTime(
        step_s=step,
        parts={name: seconds for name, seconds in parts.items() if seconds > 0},
        tokens_per_s=batch.tokens / step,
        flops_per_token=model_flops_per_token(m, batch.seq_length),
        world_size=layout.world_size,
        peak_tflops=device.peak_tflops,
    )


def _price(flow: Flow, layout: Layout, network: Network) -> float:
    stride, size = group(layout, flow.kind)
    if flow.kind == "pp":
        size = min(size, 2)
    return network.time_s(flow.op, flow.size_bytes, stride, size)


def _exposed(flows: list[Flow], where: str, layout: Layout, network: Network, behind_s: float, overlap: bool) -> float:
    """Return what a pass does not hide. Dense and expert groups share the links, so their times add."""
    total = sum(f.calls * _price(f, layout, network) for f in flows if f.where == where)
    return max(0.0, total - OVERLAP * behind_s) if overlap else total
