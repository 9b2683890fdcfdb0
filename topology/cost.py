"""Time of one collective on a fabric: few parameters, each with a physical meaning.

Every GPU sends on all links of a ring set at once: `p-1` xGMI links inside one node, and `p` lanes of
min(xGMI link, NIC) each when the `p` ranks per node ring through their NICs. A serial term per byte
(memory and copies) adds to the link time. Latency is start + xGMI steps + network steps. The library's
choice between rings and trees, low-latency and bulk protocols is the minimum over them, so the knees
follow from the parameters. Invariant: every time grows with the message size, and with the node count
from two nodes up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf, log2

from topology.fabric import Fabric
from topology.parameters import REGIMES, Parameters, Regime, RegimeConstants, load_parameters

OPS = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "send_recv",
    "all_to_all_flat",
    "all_to_all_relay",
    "dispatch",
    "all_reduce_two_level",
)


@dataclass(frozen=True)
class GroupShape:
    """What the cost of a collective depends on: nodes, ranks per node, and how its rings leave the leaf.

    `spine_hops` is how many ring edges cross a spine; `uplink_share` the share of the NIC rate that the
    tightest up-link leaves each of them (1 = not congested).
    """

    nodes: int
    per_node: int
    spine_hops: int = 0
    uplink_share: float = 1.0

    @property
    def ranks(self) -> int:
        """Ranks in the group."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Routing:
    """Expert routing: experts per token, most nodes a token may visit, and busiest over mean load."""

    topk: int = 1
    node_limit: int | None = None
    skew: float = 1.0


@dataclass(frozen=True)
class CostModel:
    """Times in seconds for messages in bytes. Build it with `for_fabric`."""

    parameters: Parameters
    link_bytes_per_s: float
    nic_line_bytes_per_s: float
    switch_latency_s: float
    rccl: str

    @classmethod
    def for_fabric(cls, fabric: Fabric, parameters: Parameters | None = None) -> CostModel:
        """The model with this fabric's rates and library version."""
        return cls(
            parameters=parameters or load_parameters(),
            link_bytes_per_s=fabric.link_bytes_per_s,
            nic_line_bytes_per_s=fabric.nic_bytes_per_s,
            switch_latency_s=fabric.spec.rails.switch_latency_s,
            rccl=fabric.spec.software.rccl,
        )

    def extremes(self) -> tuple[CostModel, CostModel]:
        """The model at both ends of the published range of the bulk start-up across nodes."""
        constants = self.parameters.constants
        ends = constants.bulk.net_start_range_s or (constants.bulk.net_start_s,) * 2
        fast, slow = (
            self.parameters.model_copy(
                update={"constants": constants.model_copy(
                    update={"bulk": constants.bulk.model_copy(update={"net_start_s": end})})}
            )
            for end in ends
        )  # fmt: skip
        return replace(self, parameters=fast), replace(self, parameters=slow)

    # ---- rates -------------------------------------------------------------------------------------------

    @property
    def nic_bytes_per_s(self) -> float:
        """Payload rate of one NIC for endless messages."""
        return self.nic_line_bytes_per_s * self.parameters.fitted.nic_efficiency

    def nic_rate(self, message_bytes: float) -> float:
        """Payload rate of one NIC for RDMA messages of this size, bytes per second."""
        return message_bytes / (message_bytes / self.nic_bytes_per_s + self.parameters.fitted.nic_message_s)

    def egress(self, shape: GroupShape, regime: Regime) -> float:
        """Bus bandwidth per GPU of a ring set, bytes per second."""
        constants = self._constants(regime)
        if shape.nodes == 1:
            links = (shape.per_node - 1) * self.link_bytes_per_s * constants.payload
        else:
            nic = self.nic_rate(self.parameters.constants.chunk_bytes) * shape.uplink_share
            lane = min(nic, self.link_bytes_per_s) if shape.per_node > 1 else nic
            payload = self.parameters.version(self.rccl).net_payload.get(regime, constants.payload)
            links = shape.per_node * lane * payload
        return 1 / (1 / links + self._serial(regime))

    def _constants(self, regime: Regime) -> RegimeConstants:
        constants = self.parameters.constants
        return constants.bulk if regime == "bulk" else constants.low_latency

    def _hop(self, regime: Regime) -> float:
        fitted = self.parameters.fitted
        return fitted.bulk_hop_s if regime == "bulk" else fitted.low_latency_hop_s

    def _serial(self, regime: Regime) -> float:
        fitted = self.parameters.fitted
        slow = fitted.bulk_serial_s_per_gb if regime == "bulk" else fitted.low_latency_serial_s_per_gb
        return slow / 1e9

    # ---- rings and trees ---------------------------------------------------------------------------------

    def ring(self, size_bytes: float, shape: GroupShape, regime: Regime, passes: int) -> float:
        """Ring: `passes` is 2 for all-reduce, 1 for reduce-scatter and all-gather."""
        steps = passes * (shape.ranks - 1)
        traffic = size_bytes * steps / shape.ranks
        return (
            self._latency(shape, regime, steps, passes * (shape.nodes - 1), passes)
            + traffic / self.egress(shape, regime)
            + self._small_messages(shape, steps, traffic)
        )

    def tree(self, size_bytes: float, shape: GroupShape, regime: Regime) -> float:
        """Tree all-reduce: chains inside nodes, a binary tree between them; up and down."""
        constants = self._constants(regime)
        hop = self._hop(regime)
        levels = ceil(log2(shape.nodes))
        network = constants.tree_net_hop_s + self._spine_latency(shape)
        latency = constants.base_s + 2 * ((shape.per_node - 1) * hop + levels * network)
        return latency + 2 * size_bytes / (self.egress(shape, regime) * constants.tree_efficiency)

    def _latency(self, shape: GroupShape, regime: Regime, steps: int, across: int, passes: int) -> float:
        constants = self._constants(regime)
        hop = self._hop(regime)
        start = constants.net_start_s * passes if across else 0.0
        spines = passes * shape.spine_hops * 2 * self.switch_latency_s
        return float(constants.base_s + (steps - across) * hop + start + across * constants.net_hop_s + spines)

    def _spine_latency(self, shape: GroupShape) -> float:
        return 2 * self.switch_latency_s if shape.spine_hops else 0.0

    def _small_messages(self, shape: GroupShape, steps: int, traffic: float) -> float:
        """Extra NIC time when the pieces of a ring step are smaller than a chunk: one message each."""
        if shape.nodes == 1:
            return 0.0
        constants = self.parameters.constants
        messages = steps * constants.channels_per_nic - traffic / shape.per_node / constants.chunk_bytes
        return max(0.0, messages) * self.parameters.fitted.nic_message_s

    def _regimes(self, op: str, size_bytes: float) -> tuple[Regime, ...]:
        knee = self.parameters.version(self.rccl).knees.get(op)
        if knee is None:
            return REGIMES
        return ("low_latency",) if size_bytes <= knee else ("bulk",)

    # ---- collectives -------------------------------------------------------------------------------------

    def all_reduce(self, size_bytes: float, shape: GroupShape) -> float:
        """All-reduce of a buffer of `size_bytes`, as the library does it."""
        if shape.ranks == 1:
            return 0.0
        best = inf
        for regime in self._regimes("all_reduce", size_bytes):
            best = min(best, self.ring(size_bytes, shape, regime, 2))
            if shape.nodes > 1:
                best = min(best, self.tree(size_bytes, shape, regime))
        return best

    def reduce_scatter(self, size_bytes: float, shape: GroupShape) -> float:
        """Reduce-scatter; `size_bytes` is the whole input buffer of one rank."""
        if shape.ranks == 1:
            return 0.0
        return min(self.ring(size_bytes, shape, r, 1) for r in self._regimes("reduce_scatter", size_bytes))

    def all_gather(self, size_bytes: float, shape: GroupShape) -> float:
        """All-gather; `size_bytes` is the whole gathered buffer. The mirror image of reduce-scatter."""
        if shape.ranks == 1:
            return 0.0
        return min(self.ring(size_bytes, shape, r, 1) for r in self._regimes("all_gather", size_bytes))

    def broadcast(self, size_bytes: float, shape: GroupShape) -> float:
        """Pipelined ring broadcast. The root feeds its own xGMI links only: one node's rate is a ceiling."""
        if shape.ranks == 1:
            return 0.0
        best = inf
        for regime in self._regimes("broadcast", size_bytes):
            rate = self.egress(shape, regime)
            if shape.per_node > 1:
                rate = min(rate, self.egress(GroupShape(1, shape.per_node), regime))
            latency = self._latency(shape, regime, shape.ranks - 1, shape.nodes - 1, 1)
            best = min(best, latency + size_bytes / rate)
        return best

    def all_reduce_two_level(self, size_bytes: float, shape: GroupShape) -> float:
        """Explicit hierarchy: reduce-scatter in the node, all-reduce per rail, all-gather in the node."""
        inside = GroupShape(1, shape.per_node)
        rail = GroupShape(shape.nodes, 1, shape.spine_hops, shape.uplink_share)
        return (
            self.reduce_scatter(size_bytes, inside)
            + self.all_reduce(size_bytes / shape.per_node, rail)
            + self.all_gather(size_bytes, inside)
        )

    def send_recv(self, size_bytes: float, shape: GroupShape) -> float:
        """One rank to one rank: over one link inside a node (`nodes` = 1), over one NIC otherwise."""
        constants, fitted = self.parameters.constants.bulk, self.parameters.fitted
        if shape.nodes == 1:
            return constants.base_s + fitted.bulk_hop_s + size_bytes / self.link_bytes_per_s
        messages = max(1.0, size_bytes / self.parameters.constants.chunk_bytes)
        wire = size_bytes / (self.nic_bytes_per_s * shape.uplink_share)
        latency = constants.base_s + constants.net_hop_s + self._spine_latency(shape)
        return latency + wire + messages * fitted.nic_message_s

    def all_to_all(self, size_bytes: float, shape: GroupShape, *, relay: bool, skew: float = 1.0) -> float:
        """All-to-all; `size_bytes` is what one rank sends in all, its own share included.

        Flat: every pair talks directly, so flows of different rails collide. With relay (PXN, NCCL 2.12)
        data first hops to the peer GPU on the target's rail: one flow per node and rail, no collisions,
        and one xGMI link per pair carries the hop.
        """
        if shape.ranks == 1:
            return 0.0
        constants, fitted = self.parameters.constants.bulk, self.parameters.fitted
        size = size_bytes * skew
        pair = size / shape.ranks
        inside = pair / self.link_bytes_per_s if shape.per_node > 1 else 0.0
        if shape.nodes == 1:
            return constants.base_s + fitted.bulk_hop_s + inside + size * self._serial("bulk")
        remote = size * (shape.nodes - 1) / shape.nodes
        peers = shape.nodes - 1 if relay else shape.ranks - shape.per_node
        share = 1.0 if relay or shape.per_node == 1 else fitted.flat_congestion
        messages = max(peers, remote / self.parameters.constants.chunk_bytes)
        wire = remote / (self.nic_bytes_per_s * shape.uplink_share * share) + messages * fitted.nic_message_s
        hop = remote / shape.per_node / self.link_bytes_per_s if relay and shape.per_node > 1 else 0.0
        latency = constants.base_s + constants.net_hop_s + fitted.bulk_hop_s + self._spine_latency(shape)
        return latency + max(wire, inside + hop)

    def dispatch_logical_bytes(self, token_bytes: float, nodes: int, routing: Routing) -> float:
        """Bytes counted once per (token, node visited), own node included: the usual logical volume."""
        reachable = min(nodes, routing.node_limit or nodes)
        return token_bytes * reachable * (1 - float((1 - 1 / reachable) ** routing.topk))

    def dispatch(self, token_bytes: float, shape: GroupShape, routing: Routing) -> float:
        """Hierarchical expert dispatch: once per node over the own rail, then to the GPUs of that node.

        `token_bytes` is tokens x bytes per token of one rank. Experts are taken as uniform except for the
        skew.
        """
        logical = self.dispatch_logical_bytes(token_bytes, shape.nodes, routing) * routing.skew
        per_node = logical / token_bytes / routing.skew
        fanout = shape.per_node * (1 - float((1 - 1 / shape.per_node) ** (routing.topk / per_node)))
        inside = GroupShape(1, max(shape.per_node, 2))
        forward = fanout * logical / self.egress(inside, "bulk")
        constants, fitted = self.parameters.constants.bulk, self.parameters.fitted
        if shape.nodes == 1:
            return constants.base_s + fitted.bulk_hop_s + forward
        rail = GroupShape(shape.nodes, 1, shape.spine_hops, shape.uplink_share)
        wire = logical * (shape.nodes - 1) / shape.nodes / self.egress(rail, "bulk")
        latency = constants.base_s + fitted.bulk_hop_s + constants.tree_net_hop_s + self._spine_latency(shape)
        peers = (shape.nodes - 1) * fitted.nic_message_s
        return latency + peers + wire + fitted.dispatch_exposed * forward

    def network_bytes(self, op: str, size_bytes: float, shape: GroupShape, routing: Routing) -> float:
        """Bytes that one call puts on the network, all nodes of the group together."""
        if shape.nodes == 1:
            return 0.0
        if op == "dispatch":
            size_bytes = self.dispatch_logical_bytes(size_bytes, shape.nodes, routing)
        if op in ("dispatch", "all_to_all_flat", "all_to_all_relay"):
            return size_bytes * shape.per_node * (shape.nodes - 1)
        return size_bytes * bus_factor(op, shape.ranks) * shape.nodes

    def time(self, op: str, size_bytes: float, shape: GroupShape, routing: Routing | None = None) -> float:
        """Seconds for one of `OPS`. Raises KeyError for another name."""
        routing = routing or Routing()
        if op == "dispatch":
            return self.dispatch(size_bytes, shape, routing)
        if op in ("all_to_all_flat", "all_to_all_relay"):
            return self.all_to_all(size_bytes, shape, relay=op == "all_to_all_relay", skew=routing.skew)
        methods = {
            "all_reduce": self.all_reduce,
            "reduce_scatter": self.reduce_scatter,
            "all_gather": self.all_gather,
            "broadcast": self.broadcast,
            "send_recv": self.send_recv,
            "all_reduce_two_level": self.all_reduce_two_level,
        }
        return methods[op](size_bytes, shape)


def bus_factor(op: str, ranks: int) -> float:
    """Bus bytes over buffer bytes, as rccl-tests count them (doc/PERFORMANCE.md of nccl-tests)."""
    if op.startswith("all_reduce"):
        return 2 * (ranks - 1) / ranks
    if op in ("broadcast", "send_recv", "dispatch"):
        return 1.0
    return (ranks - 1) / ranks
