"""All layouts of a model on a cluster, ranked by predicted throughput under a memory margin.

Every legal combination of degrees, micro-batch, recomputation, interleaving and optimizer sharding is enumerated. A
cheap first look (layers priced once per shape, stages added up, the bubble by its formula) orders them; the best ones
and all that could belong to the front of memory against time are then priced in full. Rejected ones keep their reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

from megatron_zaya.plan.activations import Options
from megatron_zaya.plan.hardware import Accelerator, Network
from megatron_zaya.plan.layer_time import Assumptions, stage_times
from megatron_zaya.plan.memory import Allowances, Memory, plan_memory
from megatron_zaya.plan.pipeline_time import busy_s
from megatron_zaya.plan.quick import QuickPrices
from megatron_zaya.plan.reduction import with_best_buckets
from megatron_zaya.plan.shape import Batch, Layout, ModelShape, Precision, Recompute
from megatron_zaya.plan.step_time import StepTime, plan_step_time

RECOMPUTE: tuple[tuple[Recompute, tuple[str, ...]], ...] = (
    ("none", ()),
    ("selective", ("layernorm",)),
    ("selective", ("layernorm", "experts")),
    ("selective", ("core_attn", "moe")),
    ("full", ()),
)

SCANNED = 400
"""Plans whose memory is looked at for the front of memory against time, once the ranking is full."""


@dataclass(frozen=True)
class Wanted:
    """What is planned for."""

    model: ModelShape
    world_size: int
    seq_length: int
    global_batch_size: int
    precision: Precision = field(default_factory=Precision)
    options: Options = field(default_factory=Options)
    allowances: Allowances = field(kw_only=True)
    """Those of the accelerator (`Accelerator.allowances`), or as the user knows better."""
    assume: Assumptions = field(default_factory=Assumptions)
    min_fit_probability: float = 0.95
    micro_batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    per_node: int = 8
    max_tp: int = 8


@dataclass(frozen=True)
class Candidate:
    """One plan with its predictions."""

    layout: Layout
    batch: Batch
    memory: Memory
    time: StepTime
    fit_probability: float

    @property
    def memory_bytes(self) -> float:
        """What the worst rank needs."""
        return self.memory.worst.total


@dataclass
class Found:
    """Outcome of a search."""

    best: list[Candidate] = field(default_factory=list)
    """Fastest first."""
    front: list[Candidate] = field(default_factory=list)
    """No other plan is both faster and smaller."""
    rejected: Counter[str] = field(default_factory=Counter)
    considered: int = 0


@lru_cache(maxsize=1024)
def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors in rising order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(small + [number // d for d in reversed(small) if d * d != number])


def degrees(wanted: Wanted) -> Iterator[Layout]:
    """Yield every legal set of degrees. Rules as in `plan.layout`: groups stay in a node or take whole nodes."""
    m, world = wanted.model, wanted.world_size
    node = min(wanted.per_node, world)
    tps = [t for t in divisors(world) if t <= wanted.max_tp and node % t == 0 and m.num_attention_heads % t == 0]
    pps = [p for p in divisors(world) if p <= m.num_layers]
    eps = [e for e in divisors(m.num_moe_experts or 1) if world % e == 0]
    for tp in tps:
        if (m.num_query_groups % tp and tp % m.num_query_groups) or m.vocab_size % tp or wanted.seq_length % tp:
            continue
        for pp in pps:
            if world % (tp * pp):
                continue
            for cp in _context_degrees(wanted, tp, pp, node):
                for ep in eps:
                    for etp in {1, tp} if m.num_moe_experts else {1}:
                        straddles = node % (ep * etp) and (ep * etp) % node
                        if world % (ep * etp * pp) or straddles or (etp > 1 and m.moe_ffn_hidden_size % etp):
                            continue
                        yield Layout(world, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, sequence_parallel=tp > 1)


def _context_degrees(wanted: Wanted, tp: int, pp: int, node: int) -> Iterator[int]:
    """Yield context-parallel sizes: parts of at least 1,024 tokens, two zig-zag chunks each."""
    for cp in divisors(wanted.world_size // (tp * pp)):
        if cp > 1 and (wanted.seq_length % (2 * cp * tp) or wanted.seq_length // cp < 1024):
            continue
        if node % (tp * cp) and (tp * cp) % node:
            continue
        yield cp


class _Look(NamedTuple):
    """One plan at first sight: cheap to make, ordered by its time."""

    seconds: float
    number: int
    base: Layout
    micro_batch_size: int
    vp: int
    recompute: int

    def plan(self, wanted: Wanted) -> tuple[Layout, Batch]:
        """Return the plan itself."""
        kind, modules = RECOMPUTE[self.recompute]
        layout = replace(self.base, vp=self.vp, recompute=kind, recompute_modules=modules)
        return layout, Batch(wanted.seq_length, self.micro_batch_size, wanted.global_batch_size)


def first_looks(wanted: Wanted, quick: QuickPrices, rejected: Counter[str]) -> list[_Look]:
    """Return every legal plan with its approximate time; count those that the batch rules out."""
    looks: list[_Look] = []
    for base in degrees(wanted):
        for micro in wanted.micro_batch_sizes:
            if wanted.global_batch_size % (micro * base.dp):
                rejected["the global batch is no multiple of micro-batch x data-parallel size"] += 1
                continue
            microbatches = wanted.global_batch_size // (micro * base.dp)
            interleavings = _interleavings(wanted.model, base, microbatches)
            plan = base if base.cp == 1 else quick.with_cp_comm_type(base, micro)
            for recompute, price in enumerate(quick.of(plan, micro)):
                for vp in interleavings:
                    seconds = price.step_s(base.pp, vp, microbatches)
                    looks.append(_Look(seconds, len(looks), plan, micro, vp, recompute))
    return looks


def _interleavings(m: ModelShape, layout: Layout, microbatches: int) -> list[int]:
    if layout.pp == 1 or microbatches % layout.pp:
        return [1]
    return [1] + [v for v in (2, 4) if m.num_layers % (layout.pp * v) == 0]


def search(wanted: Wanted, device: Accelerator, network: Network, *, keep: int = 10, price: int = 32) -> Found:
    """Return the best plans, the front, and why the others were rejected.

    Args:
        wanted: model, world, batch, margins.
        device: the accelerator.
        network: what connects them.
        keep: plans in the ranking.
        price: plans that are priced in full.
    """
    found = Found()
    quick = QuickPrices(
        wanted.model, wanted.seq_length, wanted.global_batch_size, device, network, wanted.precision, wanted.options,
        wanted.assume, RECOMPUTE,
    )  # fmt: skip
    looks = sorted(first_looks(wanted, quick, found.rejected))
    found.considered = len(looks)
    candidates: list[Candidate] = []
    smallest = float("inf")
    for scanned, look in enumerate(looks):
        if len(candidates) >= price or (scanned > SCANNED and len(candidates) >= keep):
            break
        layout, batch = look.plan(wanted)
        memory = plan_memory(
            wanted.model, layout, batch, precision=wanted.precision, options=wanted.options,
            allowances=wanted.allowances, ranks={0, min(1, layout.pp - 1), layout.pp - 1},
        )  # fmt: skip
        fits = memory.fit_probability(device.memory_bytes, wanted.allowances)
        if fits < wanted.min_fit_probability:
            found.rejected["does not fit with the wanted probability"] += 1
            continue
        # Beyond the ranking only a plan that needs less memory than all faster ones is of interest.
        if len(candidates) >= keep and memory.worst.total >= smallest:
            continue
        smallest = min(smallest, memory.worst.total)
        candidates.append(_priced(wanted, layout, batch, device, network, memory, fits))
    candidates.sort(key=lambda candidate: candidate.time.step_s)
    found.best, found.front = candidates[:keep], pareto(candidates)
    return found


def _priced(
    wanted: Wanted, layout: Layout, batch: Batch, device: Accelerator, network: Network, memory: Memory, fits: float
) -> Candidate:
    """Price a plan in full, with the size of buckets that suits it."""
    m, precision, options, assume = wanted.model, wanted.precision, wanted.options, wanted.assume
    times = stage_times(m, layout, batch, device, network, options, assume)
    rough_s = batch.microbatches(layout) * busy_s(layout, times, 0)
    layout = with_best_buckets(m, layout, precision, network, times, rough_s)
    time = plan_step_time(m, layout, batch, device, network, precision=precision, options=options, assume=assume)
    return Candidate(layout, batch, memory, time, fits)


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Return the plans that no other beats in both time and memory, fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.time.step_s, c.memory_bytes)):
        if not front or candidate.memory_bytes < front[-1].memory_bytes:
            front.append(candidate)
    return front


def price_all_ranks(candidate: Candidate, wanted: Wanted) -> Candidate:
    """Return the plan with the memory of every pipeline rank, not only of those that may need most."""
    memory = plan_memory(
        wanted.model, candidate.layout, candidate.batch, precision=wanted.precision, options=wanted.options,
        allowances=wanted.allowances,
    )  # fmt: skip
    return replace(candidate, memory=memory)
