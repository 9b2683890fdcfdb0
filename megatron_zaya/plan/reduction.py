"""What happens once a step between data-parallel ranks: buckets, what the passes hide of them, the best size of one.

The gradients of a bucket travel when its last one is there, so those of the last bucket are never hidden; the
parameters of the first bucket are waited for likewise. Large buckets use the links well, small ones leave less exposed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from megatron_zaya.plan.collectives import Flow, data_parallel_flows
from megatron_zaya.plan.hardware import Network
from megatron_zaya.plan.layer_time import StageTime
from megatron_zaya.plan.shape import Layout, ModelShape, Precision

BUCKET_ELEMENTS = (None, 10_000_000, 40_000_000, 160_000_000, 640_000_000)
"""Sizes that a search compares; None is Megatron-Core's choice."""
WORTH = 1e-3
"""Share of a step below which Megatron-Core's choice is kept."""


def flows_s(flows: Iterable[Flow], network: Network) -> float:
    """Return the time of all calls, one after the other: dense and expert groups share the links."""
    return sum([f.calls * network.time_s(f.op, f.size_bytes, *f.ranks) for f in flows])


def tail_s(flows: Iterable[Flow], network: Network) -> float:
    """Return the time of the largest call of each group: the one at the end of a pass that nothing hides."""
    longest: dict[str, float] = {}
    for f in flows:
        once = network.time_s(f.op, f.size_bytes, *f.ranks)
        longest[f.kind] = max(longest.get(f.kind, 0.0), once)
    return sum(longest.values())


def exposed_s(flows: list[Flow], network: Network, behind_s: float) -> float:
    """Return what a pass of ``behind_s`` leaves exposed: what does not fit beside it, at least the last call."""
    count = sum(f.calls for f in flows)
    if not count:
        return 0.0
    return max(tail_s(flows, network), flows_s(flows, network) - behind_s * (1 - 1 / count))


def reduction_s(
    m: ModelShape, layout: Layout, precision: Precision, network: Network, times: list[StageTime]
) -> dict[str, float]:
    """Return what the collectives of a step's end and start cost beyond what the passes (``times``) hide."""
    flows = data_parallel_flows(m, layout, precision, 0)
    gradients, weights, rest = ([f for f in flows if f.where == where] for where in ("gradients", "parameters", "end"))
    stages = range(0, layout.stages, layout.pp)
    backward, forward = sum(times[s].backward_s for s in stages), sum(times[s].forward_s for s in stages)
    return {
        "gradients, exposed": exposed_s(gradients, network, backward if layout.overlap_grad_reduce else 0.0),
        "parameters, exposed": exposed_s(weights, network, forward if layout.overlap_param_gather else 0.0),
        "tied and replicated gradients": flows_s(rest, network),
    }


def with_best_buckets(
    m: ModelShape, layout: Layout, precision: Precision, network: Network, times: list[StageTime], step_s: float
) -> Layout:
    """Return the layout with the size of buckets that leaves least exposed; ``step_s`` is about the whole step."""
    variants = [replace(layout, bucket_elements=elements) for elements in BUCKET_ELEMENTS]
    costs = [sum(reduction_s(m, variant, precision, network, times).values()) for variant in variants]
    best = min(range(len(costs)), key=costs.__getitem__)
    return variants[best] if costs[0] - costs[best] > WORTH * step_s else variants[0]
