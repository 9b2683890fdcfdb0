"""What one training step moves: per communicator the operation, its size and how often it runs.

Sizes follow Megatron-Core's schedules (tensor parallel with sequence parallelism, distributed optimizer,
token dispatch per MoE layer). The total adds everything up without overlap: it ranks placements, it does
not predict a step time. Invariant: `StepCost.total_s` is the sum over flows of calls x time of the
slowest group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from topology.cost import CostModel, GroupShape, Routing
from topology.fabric import Fabric, IntArray
from topology.groups import GroupSet, derive_groups
from topology.plan import Plan

KV_WIDTH = 0.25  # keys and values together over the hidden size, for context parallel gathers


BALANCED = Routing()


@dataclass(frozen=True)
class Flow:
    """`calls` times per step the operation `op` with `size_bytes` on every group of `kind`."""

    kind: str
    op: str
    size_bytes: float
    calls: int
    routing: Routing = BALANCED


def step_flows(plan: Plan) -> list[Flow]:
    """All flows of one optimizer step; groups of one rank are left out."""
    w = plan.workload
    microbatches = max(1, w.global_batch_size // (w.micro_batch_size * plan.dp))
    layers = -(-w.num_layers // plan.pp)
    sequence = w.micro_batch_size * w.seq_length * w.hidden_size * w.activation_bytes
    tokens = sequence / (plan.cp * plan.tp)
    dense = w.dense_parameters / (plan.tp * plan.pp)
    expert = w.expert_parameters / (plan.etp * plan.ep * plan.pp)
    routing = Routing(topk=w.moe_router_topk, skew=w.skew)
    flows = []
    if plan.tp > 1:
        flows.append(Flow("tp", "all_reduce", sequence / plan.cp, 4 * layers * microbatches))
    if plan.cp > 1:
        gathered = sequence * KV_WIDTH / plan.tp
        flows.append(Flow("cp", "all_gather", gathered, layers * microbatches))
        flows.append(Flow("cp", "reduce_scatter", gathered, layers * microbatches))
    if plan.ep > 1 and w.expert_parameters:
        flows.append(Flow("ep", "dispatch", tokens, 4 * layers * microbatches, routing))
    if plan.pp > 1:
        stages = plan.virtual_pipeline_model_parallel_size or 1
        flows.append(Flow("pp", "send_recv", tokens, 2 * microbatches * stages))
        embedding = w.vocab_size * w.hidden_size * w.gradient_bytes / plan.tp
        flows.append(Flow("embd", "all_reduce", embedding, 1))
    flows += _gradients("dp_cp", dense, plan.dp * plan.cp, plan)
    flows += _gradients("ep_dp", expert, plan.edp, plan)
    norm = "intra_dist_opt_instance" if plan.use_distributed_optimizer else "mp"
    flows.append(Flow(norm, "all_reduce", 8.0, 1))
    return flows


def _gradients(kind: str, parameters: float, ranks: int, plan: Plan) -> list[Flow]:
    if ranks == 1 or parameters == 0:
        return []
    gradient_bytes = parameters * plan.workload.gradient_bytes
    if not plan.use_distributed_optimizer:
        return [Flow(kind, "all_reduce", gradient_bytes, 1)]
    return [
        Flow(kind, "reduce_scatter", gradient_bytes, 1),
        Flow(kind, "all_gather", parameters * plan.workload.parameter_bytes, 1),
    ]


@dataclass(frozen=True)
class SlotGroups:
    """Groups of one kind as sequences of job slots (node places), equal sequences merged."""

    slots: IntArray  # [distinct groups, nodes in the group]
    copies: IntArray  # [distinct groups] how many groups share the sequence
    per_node: int


def slot_groups(groups: GroupSet, gpus_per_node: int) -> SlotGroups:
    """Collapse rank groups to the slots they visit. Ranks of one node count once per group."""
    slots = groups.ranks // gpus_per_node
    first = np.ones_like(slots, dtype=np.bool_)
    first[:, 1:] = slots[:, 1:] != slots[:, :-1]
    nodes = int(first[0].sum())
    sequences = slots[first].reshape(len(slots), -1) if (first.sum(axis=1) == nodes).all() else slots
    distinct, copies = np.unique(sequences, axis=0, return_counts=True)
    return SlotGroups(distinct, copies.astype(np.int64), max(1, groups.size // distinct.shape[1]))


@dataclass(frozen=True)
class FlowCost:
    """One flow with its worst group, its time per step, and the bytes per step that it puts on the network.

    `network_bytes` is for one group, `spine_bytes` for all groups and only what leaves a leaf.
    """

    flow: Flow
    shape: GroupShape
    time_s: float
    network_bytes: float
    spine_bytes: float


@dataclass(frozen=True)
class StepCost:
    """All flows of a step for one placement."""

    flows: tuple[FlowCost, ...]

    @property
    def total_s(self) -> float:
        """Sum of all communication, nothing overlapped."""
        return sum(cost.time_s for cost in self.flows)

    @property
    def spine_bytes(self) -> float:
        """Bytes per step that leave their leaf."""
        return sum(cost.spine_bytes for cost in self.flows)


@dataclass
class StepModel:
    """Prices placements of one plan on one fabric; precomputes all that does not depend on the placement."""

    fabric: Fabric
    plan: Plan
    cost: CostModel
    flows: list[Flow] = field(init=False)
    groups: dict[str, SlotGroups] = field(init=False)
    _times: dict[tuple[str, float, GroupShape], float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Derive flows and slot groups."""
        self.flows = step_flows(self.plan)
        derived = derive_groups(self.plan)
        gpus = self.fabric.gpus_per_node
        self.groups = {flow.kind: slot_groups(derived[flow.kind], gpus) for flow in self.flows}

    def price(self, slots: IntArray) -> StepCost:
        """Cost of the placement that puts slot s on node `slots[s]`."""
        leaf = self.fabric.leaf_group[slots]
        shapes = {kind: self._worst_shape(kind, leaf) for kind in self.groups}
        return StepCost(tuple(self._flow_cost(flow, *shapes[flow.kind]) for flow in self.flows))

    def _worst_shape(self, kind: str, leaf: IntArray) -> tuple[GroupShape, float]:
        """Shape of the worst group of a kind, and the share of node-to-node traffic that crosses leaves."""
        groups = self.groups[kind]
        rows = leaf[groups.slots]
        nodes = rows.shape[1]
        if nodes == 1:
            return GroupShape(1, groups.per_node), 0.0
        if kind == "ep":  # all-to-all: every node talks to every other one
            away = (rows[:, :, None] != rows[:, None, :]).mean(axis=2) * nodes / (nodes - 1)
            hops = (away > 0).any(axis=1).astype(np.int64)
        else:  # rings; a pipeline is a chain
            away = (rows != np.roll(rows, -1, axis=1)).astype(np.float64)
            if kind == "pp":
                away[:, -1] = 0.0
            hops = away.sum(axis=1).astype(np.int64)
        weight = away * groups.copies[:, None]
        load = np.bincount(rows.ravel(), weights=weight.ravel()) * groups.per_node
        lanes = float(load.max(initial=0.0)) / self.fabric.rails
        share = min(1.0, self._uplink_lanes / lanes) if lanes else 1.0
        shape = GroupShape(nodes, groups.per_node, int(hops.max()), share)
        return shape, float(weight.sum() / (nodes * groups.copies.sum()))

    @property
    def _uplink_lanes(self) -> float:
        """Up-link capacity of one leaf in units of one NIC."""
        rails = self.fabric.spec.rails
        spines = [i for i, switch in enumerate(self.fabric.switches) if switch.tier == "spine"]
        alive = float(np.mean(self.fabric.switch_ok[spines])) if spines else 1.0
        return max(1e-9, rails.nodes_per_leaf * rails.uplink_ratio * rails.spine_efficiency * alive)

    def _flow_cost(self, flow: Flow, shape: GroupShape, crossing: float) -> FlowCost:
        key = (f"{flow.op}{flow.routing}", flow.size_bytes, shape)
        if key not in self._times:
            self._times[key] = self.cost.time(flow.op, flow.size_bytes, shape, flow.routing)
        groups = self.groups[flow.kind]
        sent = flow.calls * self.cost.network_bytes(flow.op, flow.size_bytes, shape, flow.routing)
        spine = sent * crossing * int(groups.copies.sum())
        return FlowCost(flow, shape, flow.calls * self._times[key], sent, spine)

    def bound(self, leaf_sizes: list[int]) -> float:
        """No placement on leaves with so many usable nodes can be faster (seconds).

        Each kind is taken alone: its worst group must cross leaves only when a group is larger than a
        leaf, or when the leaves cannot hold all groups whole; up-links are never congested.
        """
        total = 0.0
        for flow in self.flows:
            groups = self.groups[flow.kind]
            hops = _least_crossings(groups.slots.shape[1], len(groups.slots), leaf_sizes, flow.kind == "pp")
            shape = GroupShape(groups.slots.shape[1], groups.per_node, hops)
            total += self._flow_cost(flow, shape, 0.0).time_s
        return total


def _least_crossings(nodes: int, groups: int, leaf_sizes: list[int], chain: bool) -> int:
    """Fewest leaf changes that the worst of `groups` equal groups of `nodes` nodes must have."""
    if nodes == 1 or not leaf_sizes:
        return 0
    needed, room = 0, 0
    for size in sorted(leaf_sizes, reverse=True):
        needed, room = needed + 1, room + size
        if room >= nodes:
            break
    if needed == 1 and sum(size // nodes for size in leaf_sizes) < groups:
        needed = 2
    return 0 if needed == 1 else needed - 1 if chain else needed
