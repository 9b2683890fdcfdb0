"""A first look at a plan's time, for ordering millions of them: layers priced once per shape, the bubble by formula.

`step_time.plan_step_time` is the model; this is its shadow. What it leaves out (the head's place in the pipeline,
transfers, the optimizer) changes the order of plans only slightly, and the best ones are priced in full.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_zaya.plan.activations import Options, Tokens
from megatron_zaya.plan.collectives import group, step_flows
from megatron_zaya.plan.hardware import Accelerator, Network
from megatron_zaya.plan.shape import Batch, Layout, ModelShape, Precision, Recompute
from megatron_zaya.plan.step_time import OVERLAP, Assumptions, layer_time

Rerun = tuple[Recompute, tuple[str, ...]]


@dataclass(slots=True)
class QuickPrice:
    """What the time of all plans with the same degrees, micro-batch and recomputation follows from. Seconds."""

    num_layers: int
    forward: float
    """Of a mean layer."""
    backward: float
    head: float
    reduce: float
    gather: float

    def step_s(self, pp: int, vp: int, microbatches: int) -> float:
        """Return the approximate time of a step."""
        layers = -(-self.num_layers // (pp * vp)) * vp
        one = layers * (self.forward + self.backward)
        exposed = max(0.0, self.reduce - OVERLAP * layers * self.backward)
        exposed += max(0.0, self.gather - OVERLAP * layers * self.forward)
        return microbatches * (one + self.head) + (pp - 1) / vp * one + exposed


@dataclass
class QuickPrices:
    """Remembers what does not change between plans of one search."""

    model: ModelShape
    seq_length: int
    global_batch_size: int
    device: Accelerator
    network: Network
    precision: Precision
    options: Options
    assume: Assumptions
    _layers: dict[tuple[object, ...], tuple[float, float]] = field(default_factory=dict)
    _heads: dict[tuple[int, ...], float] = field(default_factory=dict)
    _ends: dict[tuple[int, ...], tuple[float, float]] = field(default_factory=dict)

    def of(self, base: Layout, micro_batch_size: int, rerun: Rerun) -> QuickPrice:
        """Return the prices of a set of degrees."""
        key = (base.tp, base.cp, base.ep, base.etp, micro_batch_size, rerun)
        if key not in self._layers:
            self._layers[key] = self._mean_layer(base, micro_batch_size, rerun)
        head_key = (base.tp, base.cp, micro_batch_size)
        if head_key not in self._heads:
            t = Tokens.of(self.model, base, self._batch(micro_batch_size), 1.0)
            product = self.device.product_s(t.attention, self.model.vocab_size / base.tp, self.model.hidden_size)
            self._heads[head_key] = 4 * product
        ends_key = (base.tp, base.pp, base.cp, base.ep, base.etp)
        if ends_key not in self._ends:
            self._ends[ends_key] = self._data_parallel(base)
        forward, backward = self._layers[key]
        reduce, gather = self._ends[ends_key]
        return QuickPrice(self.model.num_layers, forward, backward, self._heads[head_key], reduce, gather)

    def _batch(self, micro_batch_size: int) -> Batch:
        return Batch(self.seq_length, micro_batch_size, self.global_batch_size)

    def _mean_layer(self, base: Layout, micro_batch_size: int, rerun: Rerun) -> tuple[float, float]:
        m, forward, backward = self.model, 0.0, 0.0
        layout = replace(base, recompute=rerun[0], recompute_modules=rerun[1])
        moe = sum(m.is_moe_layer(index) for index in range(m.num_layers))
        for is_moe, count in ((True, moe), (False, m.num_layers - moe)):
            if count:
                time = layer_time(
                    m, layout, self._batch(micro_batch_size), self.device, self.network, self.assume, self.options,
                    is_moe,
                )  # fmt: skip
                forward += time.forward_s * count / m.num_layers
                backward += time.backward_s * count / m.num_layers
        return forward, backward

    def _data_parallel(self, base: Layout) -> tuple[float, float]:
        totals = {"gradients": 0.0, "parameters": 0.0}
        for flow in step_flows(self.model, base, self._batch(1), self.precision, 0):
            if flow.where in totals:
                stride, size = group(base, flow.kind)
                totals[flow.where] += flow.calls * self.network.time_s(flow.op, flow.size_bytes, stride, size)
        return totals["gradients"], totals["parameters"]
