"""The canonical fabric: nodes, NICs, switches, rates and health as arrays; what every planner reads.

`domain[n, k]` is the routing domain of NIC k of node n: the connected component of healthy switches behind
it, or -1 without a working path. Two NICs can talk exactly when their domains are equal and not -1: that is
the whole physics of a rails-only fabric. Invariant: arrays are [nodes, nics] and never change in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from topology.errors import TopologyError
from topology.spec import ClusterSpec

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

GB = 1e9 / 8  # bytes per second in one Gb/s


@dataclass(frozen=True)
class Switch:
    """One switch. `up` are indices of the switches above it; `rail` is -1 for one that serves all rails."""

    name: str
    tier: str
    rail: int
    up: tuple[int, ...]


@dataclass(frozen=True)
class Fabric:
    """A cluster as built from a description or from dumps. `spec` keeps rates, names and versions."""

    spec: ClusterSpec
    node_names: tuple[str, ...]
    switches: tuple[Switch, ...]
    leaf: IntArray  # [nodes, nics] switch index, -1 where nothing is plugged in
    nic_ok: BoolArray  # [nodes, nics]
    node_ok: BoolArray  # [nodes]
    switch_ok: BoolArray  # [switches]
    notes: tuple[str, ...] = field(default=())  # what discovery or health found, in words

    @property
    def nodes(self) -> int:
        """Number of compute nodes, healthy or not."""
        return len(self.node_names)

    @property
    def gpus_per_node(self) -> int:
        """GPUs per node."""
        return self.spec.nodes.gpus

    @property
    def nics_per_node(self) -> int:
        """Back-end NICs per node."""
        return self.spec.nics.per_node

    @property
    def rails(self) -> int:
        """Number of rails."""
        return self.spec.rails.count

    @property
    def world_size(self) -> int:
        """All GPUs of the cluster."""
        return self.nodes * self.gpus_per_node

    @property
    def rails_meet(self) -> bool:
        """True where some switch path joins different rails (rail-optimised, single switch)."""
        return self.rails == 1 or self.spec.rails.spine == "shared"

    @cached_property
    def node_index(self) -> dict[str, int]:
        """Node name to index."""
        return {name: i for i, name in enumerate(self.node_names)}

    @cached_property
    def switch_index(self) -> dict[str, int]:
        """Switch name to index."""
        return {switch.name: i for i, switch in enumerate(self.switches)}

    def nic_of_gpu(self, gpu: int) -> int:
        """Absolute NIC index that GPU `gpu` of a node uses (several GPUs may share one NIC)."""
        return gpu * self.nics_per_node // self.gpus_per_node

    def nominal_rail(self, nic: int) -> int:
        """Rail that NIC `nic` of every node is meant to be on."""
        return nic % self.rails

    @cached_property
    def rail(self) -> IntArray:
        """[nodes, nics] rail that each NIC is really plugged into; -1 without a cable."""
        rails = np.array([switch.rail for switch in self.switches] + [-1], dtype=np.int64)
        nominal = np.arange(self.nics_per_node) % self.rails
        found = rails[self.leaf]
        # A leaf that serves all rails (single switch) says nothing: the NIC keeps its nominal rail.
        return np.where((found < 0) & (self.leaf >= 0), nominal[None, :], found)

    @cached_property
    def component(self) -> IntArray:
        """[switches] connected component over healthy switches; -1 for a switch that is down."""
        parent = np.arange(len(self.switches))

        def find(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = int(parent[i])
            return i

        for i, switch in enumerate(self.switches):
            for above in switch.up:
                if self.switch_ok[i] and self.switch_ok[above]:
                    parent[find(i)] = find(above)
        return np.array([find(i) if self.switch_ok[i] else -1 for i in range(len(parent))], dtype=np.int64)

    @cached_property
    def domain(self) -> IntArray:
        """[nodes, nics] routing domain, -1 for a NIC that reaches nothing."""
        alive = self.nic_ok & self.node_ok[:, None] & (self.leaf >= 0)
        component = np.append(self.component, -1)
        return np.where(alive, component[self.leaf], -1)

    @cached_property
    def gpu_domain(self) -> IntArray:
        """[nodes, gpus] routing domain of the NIC of each GPU."""
        nics = np.arange(self.gpus_per_node) * self.nics_per_node // self.gpus_per_node
        return self.domain[:, nics]

    @cached_property
    def usable_nodes(self) -> IntArray:
        """Nodes that may join a multi-node job: up, and every NIC in the domain of its majority.

        Whole nodes are dropped, never single GPUs: rings and trees over uneven rows deadlock
        (https://github.com/meta-pytorch/torchcomms/pull/760).
        """
        reference = self.majority_domain
        good = self.node_ok & (self.domain == reference[None, :]).all(axis=1) & (self.domain >= 0).all(axis=1)
        return np.flatnonzero(good)

    @cached_property
    def majority_domain(self) -> IntArray:
        """[nics] domain in which most nodes have that NIC (-2 where no node has a working one)."""
        best = []
        for nic in range(self.nics_per_node):
            column = self.domain[:, nic]
            column = column[column >= 0]
            best.append(int(np.bincount(column).argmax()) if column.size else -2)
        return np.array(best, dtype=np.int64)

    def why_unusable(self, node: int) -> str:
        """Say in words why a node is not in `usable_nodes`; empty when it is."""
        if not self.node_ok[node]:
            return "node is down"
        reasons = []
        for nic in range(self.nics_per_node):
            leaf = int(self.leaf[node, nic])
            if leaf < 0:
                reasons.append(f"NIC {nic} has no cable")
            elif not self.nic_ok[node, nic]:
                reasons.append(f"NIC {nic} is down")
            elif not self.switch_ok[leaf]:
                reasons.append(f"NIC {nic}: leaf {self.switches[leaf].name} is down")
            elif self.rail[node, nic] != self.nominal_rail(nic):
                reasons.append(f"NIC {nic} is plugged into rail {int(self.rail[node, nic])}")
            elif self.domain[node, nic] != self.majority_domain[nic]:
                reasons.append(f"NIC {nic}: leaf {self.switches[leaf].name} is cut off from the other nodes")
        return "; ".join(reasons)

    @cached_property
    def leaf_group(self) -> IntArray:
        """[nodes] leaf position (0, 1, ... in order of first use) of the node on NIC 0: its neighbourhood."""
        order: dict[int, int] = {}
        return np.array([order.setdefault(int(leaf), len(order)) for leaf in self.leaf[:, 0]], dtype=np.int64)

    def with_failures(
        self,
        nodes: Iterable[str] = (),
        nics: Iterable[tuple[str, int]] = (),
        switches: Iterable[str] = (),
    ) -> Fabric:
        """Return a copy in which these parts are down too.

        Raises:
            TopologyError: a name is unknown or a NIC index is out of range.
        """
        node_ok, nic_ok, switch_ok = self.node_ok.copy(), self.nic_ok.copy(), self.switch_ok.copy()
        for name in nodes:
            node_ok[self.find_node(name)] = False
        for name, nic in nics:
            if not 0 <= nic < self.nics_per_node:
                raise TopologyError(
                    f"node {name} has no such NIC", value=nic, remedy=f"use 0 to {self.nics_per_node - 1}"
                )
            nic_ok[self.find_node(name), nic] = False
        for name in switches:
            if name not in self.switch_index:
                raise TopologyError(
                    "unknown switch",
                    value=name,
                    remedy="names look like r0l0 (leaf) and r0s0 (spine); `show --switches` lists them",
                )
            switch_ok[self.switch_index[name]] = False
        return replace(self, node_ok=node_ok, nic_ok=nic_ok, switch_ok=switch_ok)

    def find_node(self, name: str) -> int:
        """Index of a node by name. Raises TopologyError when there is none."""
        if name not in self.node_index:
            raise TopologyError(
                "unknown node",
                value=name,
                remedy=f"names run from {self.node_names[0]} to {self.node_names[-1]}",
            )
        return self.node_index[name]

    @property
    def nic_bytes_per_s(self) -> float:
        """Line rate of one NIC, bytes per second and direction."""
        return self.spec.nics.rate_gbps * GB

    @property
    def link_bytes_per_s(self) -> float:
        """Usable rate of one scale-up link, bytes per second and direction."""
        return self.spec.scale_up.link_gbps * self.spec.scale_up.usable_fraction * GB
