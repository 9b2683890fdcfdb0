"""What still works after failures: which nodes drop out, whether the plan still fits, and at what price.

Invariant: a scenario never reports a plan that was not placed and proven legal on the damaged fabric.
"""

from __future__ import annotations

from dataclasses import dataclass

from topology.errors import TopologyError
from topology.fabric import Fabric
from topology.place import Placement, place
from topology.plan import Plan


@dataclass(frozen=True)
class Failure:
    """One part that fails: kind is node, nic or switch; `nic` counts for kind nic only."""

    kind: str
    name: str
    nic: int = -1

    def describe(self) -> str:
        """For example `nic zaya004:3`."""
        return f"{self.kind} {self.name}:{self.nic}" if self.kind == "nic" else f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What is left after a set of failures."""

    failures: tuple[Failure, ...]
    usable_nodes: int
    placement: Placement | None
    keeps_plan: bool
    slowdown: float  # communication per rank-step against the undamaged placement; 1 = the same
    reason: str  # why nothing can run, when placement is None

    def describe(self) -> str:
        """One sentence."""
        if self.placement is None:
            return f"nothing runs: {self.reason}"
        size = self.placement.plan.world_size
        kept = "the plan runs unchanged" if self.keeps_plan else f"the plan runs on {size} ranks"
        return f"{kept}, {len(self.placement.spares)} spare nodes, communication x{self.slowdown:.3f}"


def parse_failure(text: str) -> Failure:
    """Read `node=NAME`, `nic=NAME:INDEX`, `leaf=NAME` or `spine=NAME`. Raises TopologyError."""
    kind, _, name = text.partition("=")
    if kind == "nic" and name.rpartition(":")[2].isdigit() and name.rpartition(":")[0]:
        host, _, index = name.rpartition(":")
        return Failure("nic", host, int(index))
    if kind in ("leaf", "spine", "switch") and name:
        return Failure("switch", name)
    if kind == "node" and name:
        return Failure("node", name)
    raise TopologyError(
        "not a failure",
        where="--fail",
        value=text,
        remedy="write node=NAME, nic=NAME:INDEX, leaf=NAME or spine=NAME",
    )


def damage(fabric: Fabric, failures: tuple[Failure, ...]) -> Fabric:
    """The fabric with these parts down. Raises TopologyError for unknown names."""
    return fabric.with_failures(
        nodes=[f.name for f in failures if f.kind == "node"],
        nics=[(f.name, f.nic) for f in failures if f.kind == "nic"],
        switches=[f.name for f in failures if f.kind == "switch"],
    )


def what_if(fabric: Fabric, plan: Plan, failures: tuple[Failure, ...], before: Placement) -> Outcome:
    """Place the plan on the damaged fabric; shrink its data parallel size when it no longer fits."""
    damaged = damage(fabric, failures)
    usable = len(damaged.usable_nodes)
    try:
        after = place(damaged, plan, shrink=True)
    except TopologyError as error:
        return Outcome(failures, usable, None, False, float("inf"), error.what)
    same = after.plan.world_size == plan.world_size
    return Outcome(failures, usable, after, same, after.cost.total_s / before.cost.total_s, "")


def single_failures(fabric: Fabric) -> list[tuple[Failure, ...]]:
    """One failure of each class: a node, a NIC, a leaf and a spine, the first healthy one of each."""
    node = fabric.node_names[int(fabric.usable_nodes[0])]
    chosen = [Failure("node", node), Failure("nic", node, 0)]
    for tier in ("leaf", "spine"):
        names = [s.name for i, s in enumerate(fabric.switches) if s.tier == tier and fabric.switch_ok[i]]
        chosen += [Failure("switch", name) for name in names[:1]]
    return [(failure,) for failure in chosen]
