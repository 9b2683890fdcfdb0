"""Bytes per step on every class of link, for the pictures and the JSON.

A flow loads the xGMI links when its group has several ranks in a node, the NICs when it spans nodes, and
the up-links of leaves for the share of node pairs that sit on different leaves. Invariant: the sum over
leaf up-links equals `StepCost.spine_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topology.cost import bus_factor
from topology.place import Placement


@dataclass(frozen=True)
class LinkLoad:
    """Bytes per step: on the xGMI links of one GPU, on one NIC, and per leaf position up and down."""

    xgmi_bytes: float
    nic_bytes: float
    uplink_bytes: dict[int, float]  # leaf position -> all rails together


def link_load(placement: Placement) -> LinkLoad:
    """Mean load of a step on each class of link, each direction."""
    xgmi = nic = 0.0
    for cost in placement.cost.flows:
        shape = cost.shape
        nic += cost.network_bytes / shape.ranks
        moved = cost.flow.calls * cost.flow.size_bytes * bus_factor(cost.flow.op, shape.ranks)
        xgmi += moved * (shape.per_node - 1) / shape.per_node
    leaf = placement.fabric.leaf_group[placement.slots]
    share = np.bincount(leaf) / len(leaf)
    total = placement.cost.spine_bytes
    return LinkLoad(xgmi, nic, {int(i): float(total * part) for i, part in enumerate(share) if part})
