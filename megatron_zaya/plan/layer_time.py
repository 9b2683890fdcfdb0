"""How long one micro-batch takes in a layer or a stage: products, attention, memory passes, collectives, the host.

A layer is priced once without recomputation (`layer_work`); what a recomputation mode repeats is added to that
(`with_recomputation`), so that a search prices the modes of one set of degrees almost for free.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_zaya.plan.activations import Options, Tokens, layer_footprints
from megatron_zaya.plan.collectives import Part, layer_flows, rerun_share
from megatron_zaya.plan.hardware import Accelerator, Network
from megatron_zaya.plan.parameters import layer_parameters
from megatron_zaya.plan.shape import Batch, Layout, ModelShape

HOST_S = 6e-6
"""Time the host needs to start one kernel from PyTorch."""
KERNELS = {"zaya": (140, 240), "dense": (60, 100), "moe": (800, 1500)}
"""Kernels of a layer, forward and backward: this project's counted by the dry run (views at a third), Megatron-Core's
dense layer with fused kernels estimated, its mixture of experts, one by one, fitted."""
WAITING = "waiting for the host"
_NAMES = {"tp": "tensor parallel", "kv_replica": "tensor parallel", "cp": "context parallel"}
_RERUN = {
    "core_attn": ("core attention", "convolutions"),
    "experts": ("experts",),
    "moe": ("experts", "router"),
}
"""What selective recomputation of a module repeats beside passes over memory."""


@dataclass(frozen=True)
class Assumptions:
    """What the hardware and the data decide."""

    skew: float = 1.0
    """Load of the busiest expert rank over the mean."""
    fused_optimizer: bool = True
    passes_per_tensor: float = 2.0
    """Times each kept tensor crosses memory in the forward pass beyond the products; backward twice that."""


@dataclass(slots=True)
class StageTime:
    """One micro-batch through one layer or virtual stage. Seconds, by what is done."""

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

    def add(self, other: StageTime, count: float = 1.0) -> None:
        """Add ``count`` times the other's work."""
        for into, parts in ((self.forward, other.forward), (self.backward, other.backward)):
            for name, seconds in parts.items():
                into[name] = into.get(name, 0.0) + seconds * count


@dataclass(slots=True)
class LayerWork(StageTime):
    """One layer without recomputation."""

    again: dict[tuple[str, Part], float] = field(default_factory=dict)
    """Collectives that a second forward pass of a part repeats, by the name they are listed under."""


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


def sorting_bytes(m: ModelShape, layout: Layout, t: Tokens) -> float:
    """Return what a pass over a layer reads and writes to sort rows by local expert, and back, which nothing keeps.

    Rows arrive by rank; where a rank has several experts Megatron-Core's all-to-all dispatcher sorts them.
    """
    if layout.ep == 1 or m.num_moe_experts <= layout.ep or layout.dispatcher != "alltoall":
        return 0.0
    return 2 * (2 + 2) * t.experts * m.hidden_size


def expert_bias_bytes(m: ModelShape, t: Tokens) -> tuple[float, float]:
    """Return what passes over the experts' outputs read and write to add their biases, forward and backward.

    Megatron-Core (`TEGroupedMLP._apply_bias`) adds the second product's bias, times the fp32 probability of each row,
    outside the product, kernel by kernel. Bytes per element, forward: bias times probability (writes 4), sum (2 + 4,
    writes 4), experts joined (4 + 4), cast (4 + 2). Backward: cast (2 + 4), cast of the rows' gradient (4 + 2), experts
    joined (2 + 2), and twice, for bias and probability, a product (4 + 4) and its sum (4).
    """
    if not m.add_bias_linear:
        return 0.0, 0.0
    elements = t.experts * m.hidden_size
    return 28 * elements, 40 * elements


def layer_work(
    m: ModelShape, layout: Layout, batch: Batch, device: Accelerator, network: Network, assume: Assumptions,
    options: Options, is_moe: bool,
) -> LayerWork:  # fmt: skip
    """Return the times of one layer for one micro-batch, as if nothing were run again."""
    t = Tokens.of(m, layout, batch, 1.0)
    work = LayerWork()
    for name, products in _products(m, layout, t, is_moe, assume.skew if layout.ep > 1 else 1.0).items():
        work.forward[name] = sum([device.product_s(*product) for product in products])
        # The gradients of the input and of the weights are products of the same size.
        work.backward[name] = sum(
            [device.product_s(rows, k, n, c) + device.product_s(n, k, rows, c) for rows, n, k, c in products]
        )
    seen = batch.seq_length if not m.num_sliding_layers else min(m.sliding_window or batch.seq_length, batch.seq_length)
    width = (m.q_width + m.v_width) / layout.tp
    scores = 2.0 * t.attention * (seen / 2) * width
    work.forward["core attention"] = device.attention_s(scores)
    work.backward["core attention"] = device.attention_s(2.5 * scores)
    kept = sum([f.kept_bytes for f in layer_footprints(m, layout, t, options, m.num_layers if is_moe else 0).values()])
    passes = device.traffic_s(assume.passes_per_tensor * kept)
    sorting = device.traffic_s(sorting_bytes(m, layout, t)) if is_moe else 0.0
    biases = [device.traffic_s(size) if is_moe else 0.0 for size in expert_bias_bytes(m, t)]
    work.forward["memory passes"] = passes + sorting + biases[0]
    work.backward["memory passes"] = 2 * passes + sorting + biases[1]
    if m.is_zaya:
        weights = layer_parameters(m, layout, m.num_layers if is_moe else 0).total
        work.backward["gradient accumulation"] = device.traffic_s(weights * (2 + 4 + 4))
    _add_collectives(work, m, layout, t, network, assume.skew, is_moe)
    return work


def _add_collectives(
    work: LayerWork, m: ModelShape, layout: Layout, t: Tokens, network: Network, skew: float, is_moe: bool
) -> None:
    """Add what the collectives of a layer cost; a ring of keys hides behind the attention to the keys before."""
    hidden = [0.0, 0.0]
    for flow in layer_flows(m, layout, t, is_moe):
        once = network.time_s(flow.op, flow.size_bytes, *flow.ranks, skew if flow.op == "all_to_all" else 1.0)
        if flow.behind_attention:
            hidden[0] += flow.forward * once
            hidden[1] += flow.backward * once
        else:
            _add_exposed(work, flow.kind, flow.part, flow.forward * once, flow.backward * once)
    if any(hidden):
        share = (layout.cp - 1) / layout.cp
        cover = share * work.forward["core attention"], share * work.backward["core attention"]
        _add_exposed(work, "cp", "core_attn", max(0.0, hidden[0] - cover[0]), max(0.0, hidden[1] - cover[1]))


def _add_exposed(work: LayerWork, kind: str, part: Part, forward_s: float, backward_s: float) -> None:
    name = _NAMES.get(kind, "expert parallel")
    work.forward[name] = work.forward.get(name, 0.0) + forward_s
    work.backward[name] = work.backward.get(name, 0.0) + backward_s
    work.again[name, part] = work.again.get((name, part), 0.0) + forward_s


def with_recomputation(work: LayerWork, m: ModelShape, layout: Layout, is_moe: bool) -> StageTime:
    """Return the times of a layer with what `layout` runs again, and with the host's time to start the kernels."""
    forward, backward = work.forward, dict(work.backward)
    if layout.recompute != "none":
        backward["recomputation"] = _again_s(work, m, layout)
        for (name, part), seconds in work.again.items():
            backward[name] += rerun_share(layout, part, m.num_layers) * seconds
    first, second = KERNELS["zaya" if m.is_zaya else "moe" if is_moe else "dense"]
    second += first if layout.recompute == "full" else 0
    # Where the accelerator finishes a layer before the host has started the next, it waits.
    forward = {**forward, WAITING: max(0.0, first * HOST_S - sum(forward.values()))}
    backward[WAITING] = max(0.0, second * HOST_S - sum(backward.values()))
    return StageTime(forward, backward)


def _again_s(work: LayerWork, m: ModelShape, layout: Layout) -> float:
    """Return the arithmetic and memory passes that the backward pass repeats."""
    forward = work.forward
    if layout.recompute == "selective":
        names = {name for module in layout.recompute_modules for name in _RERUN.get(module, ())}
        return sum(forward.get(name, 0.0) for name in names) + 0.2 * forward["memory passes"]
    collectives = sum(work.again.values())
    return rerun_share(layout, "", m.num_layers) * (sum(forward.values()) - collectives)


def layer_time(
    m: ModelShape, layout: Layout, batch: Batch, device: Accelerator, network: Network, assume: Assumptions,
    options: Options, is_moe: bool,
) -> StageTime:  # fmt: skip
    """Return the times of one layer for one micro-batch."""
    work = layer_work(m, layout, batch, device, network, assume, options, is_moe)
    return with_recomputation(work, m, layout, is_moe)


def stage_times(
    m: ModelShape, layout: Layout, batch: Batch, device: Accelerator, network: Network, options: Options,
    assume: Assumptions,
) -> list[StageTime]:  # fmt: skip
    """Return the times of every virtual stage for one micro-batch."""
    layers: dict[bool, StageTime] = {}
    times, first = [], 0
    for stage, size in enumerate(layout.layers_of_stages(m.num_layers)):
        total = StageTime()
        moe = sum(m.is_moe_layer(index) for index in range(first, first + size))
        for is_moe, count in ((True, moe), (False, size - moe)):
            if count and is_moe not in layers:
                layers[is_moe] = layer_time(m, layout, batch, device, network, assume, options, is_moe)
            if count:
                total.add(layers[is_moe], count)
        total.add(_ends_time(m, layout, batch, device, options, stage))
        times.append(total)
        first += size
    return times


def _ends_time(
    m: ModelShape, layout: Layout, batch: Batch, device: Accelerator, options: Options, stage: int
) -> StageTime:
    """Return what embedding and head add to a stage."""
    t, ends = Tokens.of(m, layout, batch, 1.0), StageTime()
    if stage == layout.stages - 1:
        v = m.vocab_size / layout.tp
        product, passes = device.product_s(t.attention, v, m.hidden_size), device.traffic_s(t.attention * v * 12)
        blockwise = m.is_zaya and options.loss_workspace_bytes is not None
        ends.forward["head"] = product + passes
        ends.backward["head"] = (3 if blockwise else 2) * product + passes
    if stage == 0:
        ends.forward["embedding"] = device.traffic_s(6 * t.local * m.hidden_size)
        ends.backward["embedding"] = device.traffic_s(10 * m.vocab_size / layout.tp * m.hidden_size)
    return ends
