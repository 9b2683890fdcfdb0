"""From a cluster file to a `Fabric`, refusing what cannot be cabled.

Invariant: every complaint names the line of the YAML that is wrong.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from topology.errors import TopologyError
from topology.fabric import Fabric, Switch
from topology.hostlist import expand
from topology.spec import ClusterSpec
from topology.yamlio import Document, Key, parse, read


def load_fabric(path: Path) -> Fabric:
    """Read a cluster file. Raises TopologyError, naming file and line, for anything malformed."""
    return build_fabric(read(path))


def fabric_from_text(text: str, name: str = "<text>") -> Fabric:
    """Build from YAML text. Raises like `load_fabric`."""
    return build_fabric(parse(text, name))


def build_fabric(document: Document) -> Fabric:
    """Build the fabric of a parsed cluster file. Raises like `load_fabric`."""
    spec = document.validate(ClusterSpec)
    names = _node_names(spec, document)
    switches, index = _switches(spec, document)
    leaf = _regular_cabling(spec, len(names), index)
    _apply_cabling(spec, document, names, switches, index, leaf)
    fabric = Fabric(
        spec=spec,
        node_names=tuple(names),
        switches=tuple(switches),
        leaf=leaf,
        nic_ok=np.ones_like(leaf, dtype=np.bool_),
        node_ok=np.ones(len(names), dtype=np.bool_),
        switch_ok=np.ones(len(switches), dtype=np.bool_),
    )
    return _apply_health(fabric, document)


def _node_names(spec: ClusterSpec, document: Document) -> list[str]:
    where = document.where(("nodes", "names"))
    raw = spec.nodes.names
    names = expand(raw, where) if isinstance(raw, str) else raw
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise TopologyError("node named twice", where=where, value=name, remedy="remove one")
        seen.add(name)
    room = spec.rails.leaves_per_rail * spec.rails.nodes_per_leaf
    if not names or len(names) > room:
        raise document.error(
            ("rails", "nodes_per_leaf"),
            f"{len(names)} nodes do not fit {room} places (leaves_per_rail x nodes_per_leaf)",
            remedy="raise leaves_per_rail or nodes_per_leaf",
        )
    return names


def leaf_name(spec: ClusterSpec, rail: int, leaf: int) -> str:
    """Name of a regular leaf: `r3l1`; `l1` where there is one rail only."""
    return f"l{leaf}" if spec.rails.count == 1 else f"r{rail}l{leaf}"


def _regular_switches(spec: ClusterSpec) -> dict[str, tuple[str, int, list[str]]]:
    """Name -> (tier, rail, names above) of the parametric part."""
    rails, made = spec.rails, {}
    shared = [f"s{spine}" for spine in range(rails.spines_per_rail)] if rails.spine == "shared" else []
    for rail in range(rails.count):
        own = [f"r{rail}s{spine}" for spine in range(rails.spines_per_rail)] if rails.spine == "per_rail" else []
        if rails.leaves_per_rail == 1 and rails.spine == "per_rail":
            own = []
        for leaf in range(rails.leaves_per_rail):
            made[leaf_name(spec, rail, leaf)] = ("leaf", rail, own or shared)
        for name in own:
            made[name] = ("spine", rail, list[str]())
    for name in shared:
        made[name] = ("spine", -1, list[str]())
    return made


def _switches(spec: ClusterSpec, document: Document) -> tuple[list[Switch], dict[str, int]]:
    table = _regular_switches(spec)
    lines: dict[str, Key] = {}
    for i, extra in enumerate(spec.switches):
        path: Key = ("switches", i)
        if extra.name in lines:
            raise document.error((*path, "name"), "switch described twice", value=extra.name)
        lines[extra.name] = path
        if extra.rail is not None and extra.rail >= spec.rails.count:
            raise document.error(
                (*path, "rail"),
                "unknown rail",
                value=extra.rail,
                remedy=f"rails are 0 to {spec.rails.count - 1}",
            )
        rail = -1 if extra.rail is None else extra.rail
        if extra.name in table and extra.rail is None:
            rail = table[extra.name][1]
        table[extra.name] = (extra.tier, rail, extra.up)
    index = {name: i for i, name in enumerate(table)}
    for name, path in lines.items():
        for j, above in enumerate(table[name][2]):
            if above not in index:
                raise document.error((*path, "up", j), f"switch {name} has an unknown up-link", value=above)
    _refuse_cycles({name: up for name, (_, _, up) in table.items()}, lines, document)
    return [Switch(n, t, r, tuple(index[u] for u in up)) for n, (t, r, up) in table.items()], index


def _refuse_cycles(up: dict[str, list[str]], lines: dict[str, Key], document: Document) -> None:
    """Depth-first over up-links from the hand-written switches: only they can close a cycle."""
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if state.get(name) == 1:
            ring = (*trail[trail.index(name) :], name)
            culprit = next(n for n in ring[-2::-1] if n in lines)
            raise document.error(
                (*lines[culprit], "up"),
                f"cyclic spine: {' -> '.join(ring)}",
                remedy="up-links must lead away from the leaves",
            )
        if name in state:
            return
        state[name] = 1
        for above in up[name]:
            visit(above, (*trail, name))
        state[name] = 2

    for name in lines:
        visit(name, ())


def _regular_cabling(spec: ClusterSpec, nodes: int, index: dict[str, int]) -> np.ndarray:
    position = np.arange(nodes) // spec.rails.nodes_per_leaf
    table = np.array(
        [
            [index[leaf_name(spec, rail, leaf)] for leaf in range(spec.rails.leaves_per_rail)]
            for rail in range(spec.rails.count)
        ],
        dtype=np.int64,
    )
    rail_of_nic = np.arange(spec.nics.per_node) % spec.rails.count
    return table[rail_of_nic[None, :], position[:, None]]


def _apply_cabling(
    spec: ClusterSpec,
    document: Document,
    names: list[str],
    switches: list[Switch],
    index: dict[str, int],
    leaf: np.ndarray,
) -> None:
    node_index = {name: i for i, name in enumerate(names)}
    seen: dict[tuple[str, int], int] = {}
    for i, cable in enumerate(spec.cabling):
        path: Key = ("cabling", i)
        if cable.node not in node_index:
            raise document.error((*path, "node"), "unknown node", value=cable.node)
        if cable.nic >= spec.nics.per_node:
            raise document.error(
                (*path, "nic"),
                "unknown NIC",
                value=cable.nic,
                remedy=f"NICs are 0 to {spec.nics.per_node - 1}",
            )
        if cable.rail is not None and cable.rail >= spec.rails.count:
            raise document.error(
                (*path, "rail"),
                "unknown rail",
                value=cable.rail,
                remedy=f"rails are 0 to {spec.rails.count - 1}",
            )
        if (cable.node, cable.nic) in seen:
            first = document.where(("cabling", seen[cable.node, cable.nic]))
            raise document.error(path, f"duplicate NIC: {cable.node} NIC {cable.nic} is cabled at {first} too")
        seen[cable.node, cable.nic] = i
        if cable.leaf not in index or switches[index[cable.leaf]].tier != "leaf":
            raise document.error((*path, "leaf"), "unknown leaf", value=cable.leaf)
        target = index[cable.leaf]
        if cable.rail is not None and switches[target].rail not in (-1, cable.rail):
            raise document.error(
                (*path, "leaf"), f"leaf {cable.leaf} is on rail {switches[target].rail}, not {cable.rail}"
            )
        leaf[node_index[cable.node], cable.nic] = target
    _one_leaf_per_rail(spec, document, node_index, switches, leaf)


def _one_leaf_per_rail(
    spec: ClusterSpec,
    document: Document,
    node_index: dict[str, int],
    switches: list[Switch],
    leaf: np.ndarray,
) -> None:
    """A node may sit on one leaf of a rail only: two leaves would make its place in the rail ambiguous."""
    for i, cable in enumerate(spec.cabling):
        row = leaf[node_index[cable.node]]
        rail = switches[int(row[cable.nic])].rail
        for nic, other in enumerate(row):
            if rail >= 0 and switches[int(other)].rail == rail and other != row[cable.nic]:
                raise document.error(
                    ("cabling", i),
                    f"{cable.node} is on two leaves of rail {rail}: NIC {cable.nic} on {cable.leaf}, "
                    f"NIC {nic} on {switches[int(other)].name}",
                    remedy="cable the NICs of one rail to one leaf, or correct the rail",
                )


def _apply_health(fabric: Fabric, document: Document) -> Fabric:
    health = fabric.spec.health
    for i, name in enumerate(health.nodes_down):
        if name not in fabric.node_index:
            raise document.error(("health", "nodes_down", i), "unknown node", value=name)
    for i, nic in enumerate(health.nics_down):
        if nic.node not in fabric.node_index:
            raise document.error(("health", "nics_down", i, "node"), "unknown node", value=nic.node)
        if nic.nic >= fabric.nics_per_node:
            raise document.error(("health", "nics_down", i, "nic"), "unknown NIC", value=nic.nic)
    for i, name in enumerate(health.switches_down):
        if name not in fabric.switch_index:
            raise document.error(("health", "switches_down", i), "unknown switch", value=name)
    return fabric.with_failures(
        health.nodes_down, [(nic.node, nic.nic) for nic in health.nics_down], health.switches_down
    )
