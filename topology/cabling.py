"""Does the cabling match the plan of the fabric? Swapped NICs, missing cables, leaf sets that differ by
rail.

Slurm has no notion of a rail: one tree describes all rails only when every rail splits the nodes over its
leaves in the same way. Invariant: every finding names the node and the NIC or the leaf.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from topology.fabric import Fabric


@dataclass(frozen=True)
class Finding:
    """One deviation: a short code, the host, and a sentence with the remedy."""

    code: str
    host: str
    message: str


def check_cabling(fabric: Fabric) -> list[Finding]:
    """All deviations of the cabling from the rail layout, worst first."""
    return [*_swapped(fabric), *_missing(fabric), *_incongruent(fabric)]


def _swapped(fabric: Fabric) -> list[Finding]:
    """NICs on another rail than their absolute index says; exchanged pairs are reported once."""
    found = []
    nominal = np.array([fabric.nominal_rail(nic) for nic in range(fabric.nics_per_node)])
    for node in np.flatnonzero(((fabric.rail != nominal[None, :]) & (fabric.rail >= 0)).any(axis=1)):
        host, row = fabric.node_names[node], fabric.rail[node]
        wrong = [int(nic) for nic in np.flatnonzero((row != nominal) & (row >= 0))]
        while wrong:
            nic = wrong.pop(0)
            rail = int(row[nic])
            partner = next((o for o in wrong if row[o] == nominal[nic] and nominal[o] == rail), None)
            if partner is None:
                text = f"NIC {nic} is plugged into rail {rail} instead of {nominal[nic]}; move the cable"
                found.append(Finding("wrong-rail", host, text))
            else:
                wrong.remove(partner)
                text = f"NICs {nic} and {partner} are swapped; exchange their cables"
                found.append(Finding("swapped", host, text))
    return found


def _missing(fabric: Fabric) -> list[Finding]:
    return [
        Finding("no-cable", fabric.node_names[node], f"NIC {nic} has no neighbour; check cable and switch port")
        for node, nic in np.argwhere(fabric.leaf < 0)
    ]


def _incongruent(fabric: Fabric) -> list[Finding]:
    """Nodes whose neighbourhood (set of nodes on the same leaf) differs between rails."""
    found: list[Finding] = []
    reference = _neighbourhoods(fabric, 0)
    for nic in range(1, fabric.nics_per_node):
        here = _neighbourhoods(fabric, nic)
        votes = Counter(zip(here.tolist(), reference.tolist(), strict=True))
        usual: dict[int, int] = {}
        for (leaf, group), _ in votes.most_common():
            usual.setdefault(leaf, group)
        for node in range(fabric.nodes):
            leaf = int(here[node])
            if leaf >= 0 and fabric.rail[node, nic] == fabric.nominal_rail(nic) and usual[leaf] != reference[node]:
                name = fabric.switches[leaf].name
                other = fabric.switches[int(reference[node])].name
                text = (
                    f"NIC {nic} is on leaf {name}, whose other nodes are not those of {other} (NIC 0); "
                    "rails with different leaf sets cannot be told to Slurm, move the cable"
                )
                found.append(Finding("incongruent", fabric.node_names[node], text))
    return found


def _neighbourhoods(fabric: Fabric, nic: int) -> np.ndarray:
    return fabric.leaf[:, nic]


def congruent(fabric: Fabric) -> bool:
    """True when one leaf partition describes every rail."""
    return not check_cabling(fabric)
