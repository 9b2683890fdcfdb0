"""A first look at a plan's time, for ordering millions of them: layers priced once per shape, the bubble by formula.

`step_time.plan_step_time` is the model; this is its shadow. What it leaves out (the head's place in the pipeline,
transfers, the optimizer) changes the order of plans only slightly, and the best ones are priced in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_zaya.plan.activations import Options, Tokens
from megatron_zaya.plan.collectives import data_parallel_flows
from megatron_zaya.plan.hardware import Accelerator, Network
from megatron_zaya.plan.layer_time import Assumptions, LayerWork, layer_work, with_recomputation
from megatron_zaya.plan.reduction import flows_s, tail_s
from megatron_zaya.plan.shape import Batch, Layout, ModelShape, Precision, Recompute

Rerun = tuple[Recompute, tuple[str, ...]]
Ends = tuple[tuple[float, float], tuple[float, float]]
"""All gradients and those of the last bucket, all parameters and those of the first. Seconds."""
BUCKET_ELEMENTS = (None, 40_000_000)
"""Sizes of buckets that decide the order; the plans that are priced in full get the best of more."""


@dataclass(slots=True)
class QuickPrice:
    """What the time of all plans with the same degrees, micro-batch and recomputation follows from. Seconds."""

    num_layers: int
    forward: float
    """Of a mean layer."""
    backward: float
    head: float
    ends: tuple[Ends, ...]
    """With buckets of several sizes."""

    def step_s(self, pp: int, vp: int, microbatches: int) -> float:
        """Return the approximate time of a step."""
        layers = -(-self.num_layers // (pp * vp)) * vp
        one = layers * (self.forward + self.backward)
        exposed = min(
            max(reduce[1], reduce[0] - layers * self.backward) + max(gather[1], gather[0] - layers * self.forward)
            for reduce, gather in self.ends
        )
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
    reruns: Sequence[Rerun]
    """The recomputation modes that are compared."""
    _layers: dict[tuple[int, ...], list[tuple[float, float]]] = field(default_factory=dict)
    _rings: dict[tuple[int, ...], bool] = field(default_factory=dict)
    _heads: dict[tuple[int, ...], float] = field(default_factory=dict)
    _ends: dict[tuple[int, ...], tuple[Ends, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Put the recomputation modes into layouts, of which nothing else is read."""
        self._modes = [Layout(recompute=kind, recompute_modules=modules) for kind, modules in self.reruns]

    def of(self, base: Layout, micro_batch_size: int) -> list[QuickPrice]:
        """Return the prices of a set of degrees, one for each recomputation mode."""
        key = (base.tp, base.cp, base.ep, base.etp, micro_batch_size)
        if key not in self._layers:
            self._layers[key] = self._mean_layer(base, micro_batch_size)
        head_key = (base.tp, base.cp, micro_batch_size)
        if head_key not in self._heads:
            t = Tokens.of(self.model, base, self._batch(micro_batch_size), 1.0)
            product = self.device.product_s(t.attention, self.model.vocab_size / base.tp, self.model.hidden_size)
            self._heads[head_key] = 4 * product
        ends_key = (base.tp, base.pp, base.cp, base.ep, base.etp)
        if ends_key not in self._ends:
            self._ends[ends_key] = tuple(
                self._once_a_step(replace(base, bucket_elements=elements)) for elements in BUCKET_ELEMENTS
            )
        head, ends, layers = self._heads[head_key], self._ends[ends_key], self.model.num_layers
        return [QuickPrice(layers, forward, backward, head, ends) for forward, backward in self._layers[key]]

    def with_cp_comm_type(self, base: Layout, micro_batch_size: int) -> Layout:
        """Return the layout with the faster way to the keys of other context-parallel ranks."""
        key = (base.tp, base.cp, micro_batch_size)
        if key not in self._rings:
            both = (base, replace(base, cp_comm_type="p2p"))
            gathered, around = (self._work(layout, micro_batch_size, True) for layout in both)
            self._rings[key] = around.forward_s + around.backward_s < gathered.forward_s + gathered.backward_s
        return replace(base, cp_comm_type="p2p") if self._rings[key] else base

    def _once_a_step(self, base: Layout) -> Ends:
        flows = data_parallel_flows(self.model, base, self.precision, 0)
        sides = ([flow for flow in flows if flow.where == where] for where in ("gradients", "parameters"))
        reduce, gather = ((flows_s(side, self.network), tail_s(side, self.network)) for side in sides)
        return reduce, gather

    def _batch(self, micro_batch_size: int) -> Batch:
        return Batch(self.seq_length, micro_batch_size, self.global_batch_size)

    def _work(self, layout: Layout, micro_batch_size: int, is_moe: bool) -> LayerWork:
        return layer_work(
            self.model, layout, self._batch(micro_batch_size), self.device, self.network, self.assume, self.options,
            is_moe,
        )  # fmt: skip

    def _mean_layer(self, base: Layout, micro_batch_size: int) -> list[tuple[float, float]]:
        """Return the forward and the backward time of a mean layer, for each recomputation mode."""
        m = self.model
        totals = [(0.0, 0.0)] * len(self.reruns)
        moe = sum(m.is_moe_layer(index) for index in range(m.num_layers))
        for is_moe, count in ((True, moe), (False, m.num_layers - moe)):
            if not count:
                continue
            work, share = self._work(base, micro_batch_size, is_moe), count / m.num_layers
            for index, mode in enumerate(self._modes):
                time = with_recomputation(work, m, mode, is_moe)
                forward, backward = totals[index]
                totals[index] = (forward + share * time.forward_s, backward + share * time.backward_s)
        return totals
