"""Which node takes which ranks: leaf-aware, degraded fabrics and odd counts included.

Candidates fill leaves so that the groups of one kind after the other stay together; the best by predicted
step communication is then improved by swaps. The bound printed beside it tells how much could be left.
Invariant: a placement uses only healthy, congruent nodes, each once, and its plan is proven legal on
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topology.cost import CostModel
from topology.errors import TopologyError
from topology.fabric import Fabric, IntArray
from topology.legality import Verdict, verify
from topology.plan import Plan
from topology.traffic import SlotGroups, StepCost, StepModel

SWAPS = 1500  # at most; fewer on large fabrics, where one evaluation takes longer
SWAP_RANKS = 2_000_000
CLOSE_ENOUGH = 1e-3  # of the bound; the cost model is not better than that


@dataclass(frozen=True)
class Placement:
    """Slot s of the job (ranks s*gpus ...) runs on node `slots[s]`; `spares` stand by, `excluded` say why."""

    fabric: Fabric
    plan: Plan
    slots: IntArray
    spares: tuple[int, ...]
    excluded: tuple[tuple[int, str], ...]
    cost: StepCost
    bound_s: float
    strategy: str
    verdicts: tuple[Verdict, ...]

    @property
    def hosts(self) -> list[str]:
        """Host of each slot, in rank order."""
        return [self.fabric.node_names[node] for node in self.slots]

    @property
    def master(self) -> str:
        """Host of rank 0."""
        return self.hosts[0]

    def rank_map(self) -> list[tuple[int, str, int]]:
        """(rank, host, local rank) of every rank."""
        gpus, hosts = self.fabric.gpus_per_node, self.hosts
        return [(rank, hosts[rank // gpus], rank % gpus) for rank in range(self.plan.world_size)]


def place(fabric: Fabric, plan: Plan, *, shrink: bool = False, avoid: tuple[str, ...] = ()) -> Placement:
    """Choose and order nodes for a plan.

    Args:
        fabric: the cluster with its health.
        plan: the layout; its world size decides how many nodes are needed.
        shrink: lower the data parallel size when too few nodes are usable.
        avoid: healthy nodes to leave out (for example spares reserved by the operator).

    Raises:
        TopologyError: too few usable nodes, or no legal layout of this size.
    """
    banned = {fabric.find_node(name) for name in avoid}
    healthy = set(fabric.usable_nodes.tolist())
    usable = np.array(sorted(healthy - banned), dtype=np.int64)
    excluded = [(n, fabric.why_unusable(n)) for n in range(fabric.nodes) if n not in healthy]
    excluded += [(n, "kept out on request") for n in sorted(banned & healthy)]
    plan = fit_plan(fabric, plan, len(usable), shrink)
    verdicts = verify(fabric, plan, usable[: _nodes_needed(fabric, plan)])
    illegal = [v for v in verdicts if not v.legal]
    if illegal:
        worst = illegal[0]
        proof = f": {worst.witness.describe()}" if worst.witness else ""
        raise TopologyError(f"group {worst.kind} is illegal on this fabric{proof}", remedy=worst.setting)
    model = StepModel(fabric, plan, CostModel.for_fabric(fabric))
    slots, strategy = _search(fabric, model, usable, _nodes_needed(fabric, plan))
    chosen = set(slots.tolist())
    sizes = np.bincount(fabric.leaf_group[usable]).tolist()
    return Placement(
        fabric=fabric,
        plan=plan,
        slots=slots,
        spares=tuple(int(n) for n in usable if int(n) not in chosen),
        excluded=tuple(excluded),
        cost=model.price(slots),
        bound_s=model.bound(sizes),
        strategy=strategy,
        verdicts=tuple(verdicts),
    )


def _nodes_needed(fabric: Fabric, plan: Plan) -> int:
    return -(-plan.world_size // fabric.gpus_per_node)


def fit_plan(fabric: Fabric, plan: Plan, usable: int, shrink: bool) -> Plan:
    """The plan itself, or, with `shrink`, its largest version that fits; whole nodes only.

    Raises:
        TopologyError: it does not fit and may not shrink, or no data parallel size fits.
    """
    gpus = fabric.gpus_per_node
    if plan.world_size > gpus and plan.world_size % gpus:
        raise TopologyError(
            f"world_size must be whole nodes of {gpus} GPUs", value=plan.world_size, remedy="use a multiple"
        )
    if _nodes_needed(fabric, plan) <= usable:
        return plan
    for nodes in range(usable, 0, -1) if shrink else ():
        try:
            smaller = plan.resized(nodes * gpus)
        except ValueError:
            continue
        if all(v.legal for v in verify(fabric, smaller, fabric.usable_nodes[:nodes])):
            return smaller
    raise TopologyError(
        f"the plan needs {_nodes_needed(fabric, plan)} nodes, {usable} of {fabric.nodes} are usable",
        value=plan.world_size,
        remedy="repair nodes, lower world_size" if shrink else "repair nodes, lower world_size, or pass --shrink",
    )


def _search(fabric: Fabric, model: StepModel, usable: IntArray, needed: int) -> tuple[IntArray, str]:
    """Best candidate, improved by swaps unless it already meets the bound."""
    sizes = np.bincount(fabric.leaf_group[usable]).tolist()
    bound = model.bound(sizes)
    best: tuple[float, float] | None = None
    slots, strategy = usable[:needed], "in order"
    for name, candidate in _candidates(fabric, model, usable, needed):
        cost = model.price(candidate)
        score = (cost.total_s, cost.spine_bytes)
        if best is None or score < best:
            best, slots, strategy = score, candidate, name
    if best is not None and best[0] > bound * (1 + CLOSE_ENOUGH):
        slots, swapped = _improve(model, slots, usable, bound)
        strategy = f"{strategy} + {swapped} swaps" if swapped else strategy
    return slots, strategy


def _candidates(fabric: Fabric, model: StepModel, usable: IntArray, needed: int) -> list[tuple[str, IntArray]]:
    """Leaf-major orders: by slot number, and for each kind with its groups kept whole in a leaf."""
    leaf = fabric.leaf_group[usable]
    by_leaf = [usable[leaf == group].tolist() for group in np.unique(leaf)]
    fullest_first = sorted(by_leaf, key=len, reverse=True)
    flat = np.array([node for nodes in fullest_first for node in nodes], dtype=np.int64)
    found = [("in order", usable[:needed]), ("leaf by leaf", flat[:needed])]
    for kind, groups in model.groups.items():
        if 1 < groups.slots.shape[1] < needed:
            found.append((f"{kind} groups whole", _pack(groups, fullest_first, needed)))
    return found


def _pack(groups: SlotGroups, leaves: list[list[int]], needed: int) -> IntArray:
    """Give each group, in turn, the emptiest leaf that holds it whole; what is left fills the gaps."""
    free = [list(nodes) for nodes in leaves]
    slots = np.full(needed, -1, dtype=np.int64)
    late: list[int] = []
    for row in groups.slots:
        wanted = [int(slot) for slot in row if slots[slot] < 0]
        roomy = [nodes for nodes in free if len(nodes) >= len(wanted)]
        if not roomy:
            late += wanted
            continue
        target = min(roomy, key=len)
        for slot in wanted:
            slots[slot] = target.pop(0)
    rest = [node for nodes in free for node in nodes]
    for slot in [*dict.fromkeys(late), *(s for s in range(needed) if slots[s] < 0 and s not in late)]:
        slots[slot] = rest.pop(0)
    return slots


def _improve(model: StepModel, slots: IntArray, usable: IntArray, bound: float) -> tuple[IntArray, int]:
    """Random swaps between leaves (seeded), kept when they help; also returns how many were kept."""
    rng = np.random.default_rng(0)
    leaf = model.fabric.leaf_group
    pool = np.concatenate([slots, np.setdiff1d(usable, slots)])
    cost = model.price(pool[: len(slots)])
    best, kept = (cost.total_s, cost.spine_bytes), 0
    for _ in range(min(SWAPS, max(100, SWAP_RANKS // model.plan.world_size))):
        i, j = int(rng.integers(len(slots))), int(rng.integers(len(pool)))
        if leaf[pool[i]] == leaf[pool[j]]:
            continue
        pool[[i, j]] = pool[[j, i]]
        cost = model.price(pool[: len(slots)])
        score = (cost.total_s, cost.spine_bytes)
        if score < best:
            best, kept = score, kept + 1
            if best[0] <= bound * (1 + CLOSE_ENOUGH):
                break
        else:
            pool[[i, j]] = pool[[j, i]]
    return pool[: len(slots)].copy(), kept
