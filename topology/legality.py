"""Proof, per communicator, that every pair of its ranks can talk over the fabric.

Rule (https://github.com/NVIDIA/nccl/issues/836): rank a on node A reaches rank b on another node when
their NICs share a routing domain, or, with PXN on, when some member of the same communicator on A has its
NIC in b's domain. Over all ordered pairs that is equivalent to: one domain for all members, or the same
set of domains on every node. Invariant: an illegal verdict carries the pair of ranks that proves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topology.fabric import Fabric, IntArray
from topology.groups import GroupSet, derive_groups
from topology.plan import Plan

INSIDE, SAME_RAIL, RELAY, UNREACHABLE = 0, 1, 2, 3
STATUS = ("inside a node", "same rail", "full rows with relay", "unreachable")
UNEVEN_ROWS = (
    "nodes contribute different numbers of ranks: rail trees deadlock on uneven rows; set "
    "RCCL_DISABLE_RAIL_TREES=1 (https://github.com/meta-pytorch/torchcomms/pull/760)"
)
UNTESTED_RINGS = (
    "rings and trees may still cross rails here whatever NCCL_CROSS_NIC says; confirm with "
    "NCCL_DEBUG_SUBSYS=GRAPH and `zaya topology lint` (https://github.com/NVIDIA/nccl/issues/2345)"
)


@dataclass(frozen=True)
class Witness:
    """Two ranks of one group, where they sit, and the relaying rank if there is one (-1: none)."""

    source: int
    target: int
    source_host: str
    target_host: str
    source_rail: int
    target_rail: int
    relay: int = -1

    def describe(self) -> str:
        """The pair in words."""
        text = (
            f"rank {self.source} ({self.source_host}, rail {self.source_rail}) -> "
            f"rank {self.target} ({self.target_host}, rail {self.target_rail})"
        )
        return f"{text} through rank {self.relay}" if self.relay >= 0 else text


@dataclass(frozen=True)
class Verdict:
    """The proof for all groups of one kind: counts[status] of its groups, and the evidence."""

    kind: str
    purpose: str
    groups: int
    size: int
    counts: tuple[int, int, int, int]
    pxn: bool
    witness: Witness | None
    hazards: tuple[str, ...]

    @property
    def status(self) -> int:
        """Worst status of any group."""
        return max(status for status in range(4) if self.counts[status])

    @property
    def legal(self) -> bool:
        """True when every pair of every group can talk with the planned setting."""
        return self.status <= SAME_RAIL or (self.status == RELAY and self.pxn)

    @property
    def setting(self) -> str:
        """The setting that makes the kind legal; empty when it already is."""
        if self.legal:
            return ""
        if self.status == RELAY:
            return "NCCL_PXN_DISABLE=0 (RCCL's default is 1)"
        return "no setting helps: members must share one rail, or every node must bring the same rails"


def locate(fabric: Fabric, slots: IntArray, ranks: IntArray) -> tuple[IntArray, IntArray]:
    """Node and routing domain of each rank when slot s of the job is node `slots[s]`."""
    gpus = fabric.gpus_per_node
    node = slots[ranks // gpus]
    return node, fabric.gpu_domain[node, ranks % gpus]


def classify(node: IntArray, domain: IntArray) -> IntArray:
    """Status of each group (row) from the node and routing domain of its members."""
    inside = (node == node[:, :1]).all(axis=1)
    connected = (domain >= 0).all(axis=1)
    same = connected & (domain == domain[:, :1]).all(axis=1)
    pairs = _distinct(node * (domain.max() + 2) + domain)
    full = connected & (pairs == _distinct(node) * _distinct(domain))
    status = np.where(full, RELAY, UNREACHABLE)
    status = np.where(same, SAME_RAIL, status)
    return np.where(inside, INSIDE, status).astype(np.int64)


def _distinct(values: IntArray) -> IntArray:
    """Number of distinct values in each row."""
    ordered = np.sort(values, axis=1)
    changes: IntArray = np.count_nonzero(np.diff(ordered, axis=1), axis=1).astype(np.int64)
    return changes + 1


def find_witness(node: IntArray, domain: IntArray) -> tuple[int, int, int] | None:
    """Positions (source, target, relay or -1) of a pair in one group that is not directly connected.

    A pair without a relay is preferred: it proves the group unreachable. None when all pairs talk directly.
    """
    _, host = np.unique(node, return_inverse=True)
    dead = np.flatnonzero(domain < 0)
    if dead.size:
        return int(np.flatnonzero(host != host[dead[0]])[0]), int(dead[0]), -1
    _, rail = np.unique(domain, return_inverse=True)
    present = np.zeros((int(host.max()) + 1, int(rail.max()) + 1), dtype=np.bool_)
    present[host, rail] = True
    missing = np.argwhere(~present)
    if missing.size:
        source_host, target_rail = missing[0]
        return int(np.flatnonzero(host == source_host)[0]), int(np.flatnonzero(rail == target_rail)[0]), -1
    apart = np.flatnonzero((host != host[0]) & (rail != rail[0]))
    if not apart.size:
        return None
    target = int(apart[0])
    return 0, target, int(np.flatnonzero((host == host[0]) & (rail == rail[target]))[0])


def judge(fabric: Fabric, slots: IntArray, groups: GroupSet, pxn: bool) -> Verdict:
    """Prove or refute one kind of communicator for a placement."""
    node, domain = locate(fabric, slots, groups.ranks)
    status = classify(node, domain)
    counts = np.bincount(status, minlength=4)
    worst = int(np.argmax(status))
    witness = None
    hazards: list[str] = []
    if status[worst] >= RELAY:
        found = find_witness(node[worst], domain[worst])
        witness = _witness(fabric, slots, groups.ranks[worst], found) if found else None
        if status[worst] == RELAY and not fabric.rails_meet:
            hazards.append(UNTESTED_RINGS)
    if status[worst] > INSIDE and _uneven(node[worst]):
        hazards.append(UNEVEN_ROWS)
    return Verdict(
        kind=groups.kind,
        purpose=groups.purpose,
        groups=groups.count,
        size=groups.size,
        counts=(int(counts[0]), int(counts[1]), int(counts[2]), int(counts[3])),
        pxn=pxn,
        witness=witness,
        hazards=tuple(hazards),
    )


def _uneven(node: IntArray) -> bool:
    """True when the nodes of one group contribute different numbers of ranks."""
    _, counts = np.unique(node, return_counts=True)
    return bool((counts != counts[0]).any())


def _witness(fabric: Fabric, slots: IntArray, ranks: IntArray, found: tuple[int, int, int]) -> Witness:
    source, target, relay = found
    gpus = fabric.gpus_per_node

    def place(rank: int) -> tuple[str, int]:
        node = int(slots[rank // gpus])
        return fabric.node_names[node], int(fabric.rail[node, fabric.nic_of_gpu(rank % gpus)])

    a, b = int(ranks[source]), int(ranks[target])
    (host_a, rail_a), (host_b, rail_b) = place(a), place(b)
    return Witness(a, b, host_a, host_b, rail_a, rail_b, int(ranks[relay]) if relay >= 0 else -1)


def verify(fabric: Fabric, plan: Plan, slots: IntArray | None = None, pxn: bool | None = None) -> list[Verdict]:
    """Verdict for every kind of communicator of the plan, `world` included.

    `slots[s]` is the node that carries ranks s*gpus .. s*gpus+gpus-1; by default nodes in file order. `pxn`
    defaults to the cluster's `software.pxn`.
    """
    needed = -(-plan.world_size // fabric.gpus_per_node)
    if slots is None:
        slots = np.arange(needed, dtype=np.int64)
    relay = fabric.spec.software.pxn if pxn is None else pxn
    return [judge(fabric, slots, groups, relay) for groups in derive_groups(plan).values()]


def nearest_legal_plan(fabric: Fabric, plan: Plan, slots: IntArray, pxn: bool, tries: int = 160) -> Plan | None:
    """The legal layout of the same world whose degrees differ least (sum of |log2| ratios), or None."""
    wanted = np.log2([plan.tp, plan.cp, plan.pp, plan.ep])
    candidates = []
    options = [d for d in range(1, min(plan.world_size, 64) + 1) if plan.world_size % d == 0]
    for tp in (d for d in options if d <= fabric.gpus_per_node):
        for cp in (d for d in options if d <= 32):
            for pp in options:
                distance = np.abs(np.log2([tp, cp, pp]) - wanted[:3]).sum()
                candidates += [(float(distance + abs(np.log2(ep) - wanted[3])), tp, cp, pp, ep) for ep in options]
    for _, tp, cp, pp, ep in sorted(candidates)[1 : tries + 1]:
        changed = {
            **plan.model_dump(),
            "tensor_model_parallel_size": tp,
            "context_parallel_size": cp,
            "pipeline_model_parallel_size": pp,
            "expert_model_parallel_size": ep,
            "hierarchical_context_parallel_sizes": None,
            "virtual_pipeline_model_parallel_size": plan.virtual_pipeline_model_parallel_size if pp > 1 else None,
        }
        try:
            candidate = Plan.model_validate(changed)
        except ValueError:
            continue
        if all(v.legal for v in verify(fabric, candidate, slots, pxn)):
            return candidate
    return None
