"""What Muon adds to a step: Newton-Schulz products, and the exchange of matrices that the shards of ZeRO-1 cut.

The optimizer's own plan (`optim/pieces.py`) says who orthogonalises which matrix and what travels in each wave; it is
made here from the same numbers, so the messages are those of the run. A wave is over when its slowest rank is through
with it, and the step when the slowest rank has all its results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_zaya.optim.pieces import Matrix, Plan, Slot, make_plan, messages
from megatron_zaya.optim.rules import Rule, rule_for
from megatron_zaya.plan.buckets import bucket_elements, rank_buckets
from megatron_zaya.plan.collectives import Flow
from megatron_zaya.plan.hardware import Accelerator, Network
from megatron_zaya.plan.shape import Layout, ModelShape, Precision

STEPS = 5
"""Newton-Schulz iterations (arXiv 2511.17127, section V)."""
Shape = tuple[int, int]


@dataclass(frozen=True)
class Wave:
    """One exchange of a grid; ranks are the plan's (tensor-parallel rank x data-parallel size + data-parallel rank)."""

    sent: Mapping[int, int]
    """Elements of the pieces that each holder sends, its own share included; of the results that it gets back."""
    received: Mapping[int, int]
    """Elements that arrive at each owner."""
    longest: int
    """Elements of the largest message between two ranks."""
    work: Mapping[int, Shape]
    """Matrix that each owner orthogonalises."""

    @property
    def busiest(self) -> int:
        """Elements that the busiest rank sends or receives."""
        return max(max(self.sent.values()), max(self.received.values()))


@dataclass(frozen=True)
class Exchange:
    """What the ranks of one grid do: all that hold pieces of the same matrices."""

    ranks: tuple[int, int]
    """Stride and size."""
    local: Mapping[int, Sequence[Shape]]
    """Matrices that lie whole on a rank."""
    waves: Sequence[Wave]


def exchanges(m: ModelShape, layout: Layout, pp_rank: int) -> tuple[Exchange, Exchange]:
    """Return the exchange of the dense and that of the expert matrices of a pipeline rank.

    Raises:
        ValueError: the model is no ZAYA.
    """
    # Nothing else of the layout decides them.
    common = Layout(
        world_size=layout.world_size, pp=layout.pp, vp=layout.vp, stage_layers=layout.stage_layers,
        overlap_grad_reduce=layout.overlap_grad_reduce, bucket_elements=bucket_elements(layout),
    )  # fmt: skip
    dense, expert = replace(common, tp=layout.tp), replace(common, ep=layout.ep, etp=layout.etp)
    return _exchange(m, dense, pp_rank, False), _exchange(m, expert, pp_rank, True)


def muon_flows(m: ModelShape, layout: Layout, precision: Precision, rank: int) -> list[Flow]:
    """Return the calls of global rank ``rank``: in each wave its pieces, then the results."""
    stage_ranks = layout.world_size // layout.pp
    pp_rank, position = divmod(rank, stage_ranks)
    found = []
    for exchange, tp, stride in zip(
        exchanges(m, layout, pp_rank), (layout.tp, layout.etp), (layout.tp, layout.etp * layout.ep), strict=True
    ):
        own = position % tp * (exchange.ranks[1] // tp) + position // stride
        for wave in exchange.waves:
            for elements in (wave.sent.get(own, 0), wave.received.get(own, 0)):
                size = elements * precision.newton_schulz
                found.append(Flow("optimizer", "muon", "all_to_all", size, exchange.ranks, 0, 1))
    return found


def muon_s(
    m: ModelShape, layout: Layout, precision: Precision, device: Accelerator, network: Network, pp_rank: int = 0
) -> float:
    """Return the time of orthogonalising all matrices of a pipeline rank: dense ones, then those of experts."""
    parts = exchanges(m, layout, pp_rank)
    return sum(_exchange_s(exchange, precision.newton_schulz, device, network) for exchange in parts)


@lru_cache(maxsize=64)
def _exchange(m: ModelShape, layout: Layout, pp_rank: int, is_expert: bool) -> Exchange:
    if is_expert:  # a grid spans its ranks of every expert-parallel group
        tp, dp, stride = layout.etp, layout.edp, layout.ep
    else:
        tp, dp, stride = layout.tp, layout.dp, 1  # context parallelism is part of it: the layout has none of its own
    plan = make_plan(_slots(m, layout, pp_rank, is_expert), tp, dp)
    local = {rank: [_shape(plan.matrices[index]) for index in own] for rank, own in plan.local.items()}
    return Exchange((stride, tp * dp), local, [_wave(plan, number) for number in range(len(plan.waves))])


def _slots(m: ModelShape, layout: Layout, pp_rank: int, is_expert: bool) -> list[Slot]:
    """Return Muon's parameters in the order of the buffers, as the optimizer lists them."""
    found = []
    for bucket in rank_buckets(m, layout, pp_rank, is_expert):
        for tensor, start in bucket.places:
            rule = _rule(tensor.name)
            if rule.algorithm == "muon":
                found.append(
                    Slot(
                        tensor.name, tensor.shape, start, bucket.numel, tensor.split_axis, tensor.copies, rule.row_parts
                    )
                )
    return found


@lru_cache(maxsize=256)
def _rule(name: str) -> Rule:
    return rule_for(name, "muon")


def _wave(plan: Plan, number: int) -> Wave:
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    longest = 0
    for (holder, owner), numel in messages(plan, number).items():
        sent[holder] = sent.get(holder, 0) + numel
        received[owner] = received.get(owner, 0) + numel
        if holder != owner:
            longest = max(longest, numel)
    work = {owner: _shape(plan.matrices[index]) for owner, index in plan.waves[number].items()}
    return Wave(sent, received, longest, work)


def _shape(matrix: Matrix) -> Shape:
    return matrix.rows, matrix.cols


def _exchange_s(exchange: Exchange, itemsize: int, device: Accelerator, network: Network) -> float:
    """Follow the ranks of a grid through `ShardedOrthogonalizer`: what travels in order, what hides behind what."""
    prices = [_wave_s(wave, itemsize, exchange.ranks, network) for wave in exchange.waves]
    free = {rank: sum(_iterate_s(shape, device) for shape in own) for rank, own in exchange.local.items()}
    links = arrived = prices[0] if prices else 0.0  # the links, free again; the pieces of this wave, there
    returned = 0.0
    for number, wave in enumerate(exchange.waves):
        # A rank sends the pieces of the next wave when it begins this one; they leave when the last has.
        begun = max([arrived, *free.values()])
        pieces = arrived
        if number + 1 < len(prices):
            links = pieces = max(links, begun) + prices[number + 1]
        for rank, shape in wave.work.items():
            free[rank] = max(arrived, free.get(rank, 0.0)) + _iterate_s(shape, device)
        last = max([arrived, returned, *free.values()])
        links = returned = max(links, last) + prices[number]
        arrived = pieces
    return max([returned, *free.values()])


def _wave_s(wave: Wave, itemsize: int, ranks: tuple[int, int], network: Network) -> float:
    """Return the time of one all-to-all: that of its busiest rank, or of its largest message, which takes one link."""
    whole = network.time_s("all_to_all", wave.busiest * itemsize, *ranks)
    return max(whole, network.time_s("send_recv", wave.longest * itemsize, *ranks))


def _iterate_s(shape: Shape, device: Accelerator) -> float:
    """Return the time of orthogonalising one matrix."""
    return _newton_schulz_s(device, *sorted(shape))


@lru_cache(maxsize=1024)
def _newton_schulz_s(device: Accelerator, short: int, long: int) -> float:
    return STEPS * (2 * device.product_s(short, long, short) + device.product_s(short, short, short))
