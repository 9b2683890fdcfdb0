"""A fabric from dumps that operators can collect without root on the switches.

Layout of the folder: `<node>/lldp.txt` (`lldpctl -f keyvalue` or `lldpcli show neighbors`), and, where
there, `<node>/rdma_link.txt` (`rdma link`), `<node>/ibv_devinfo.txt`, `<node>/sysfs.txt` (`grep .
/sys/class/infiniband/ */ports/*/{state,rate}`), `<node>/amd_smi_topology.txt` (`amd-smi topology`);
`switches/<leaf>/lldp.txt` gives the up-links. Invariant: a NIC's identity is the number at the end of its
device or interface name, never its position in a list (https://github.com/ROCm/mori/issues/370).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from topology.errors import TopologyError
from topology.fabric import Fabric, Switch
from topology.spec import ClusterSpec


@dataclass
class NodeDump:
    """What the dumps of one node say, by absolute NIC index."""

    neighbour: dict[int, str] = field(default_factory=dict)  # switch name
    active: dict[int, bool] = field(default_factory=dict)
    rate_gbps: dict[int, float] = field(default_factory=dict)
    gpus: int = 0
    full_mesh: bool = True


def nic_number(name: str) -> int | None:
    """Trailing number of a device name (`ionic_3`, `rail3`, `mlx5_3`), or None."""
    match = re.search(r"(\d+)$", name)
    return int(match[1]) if match else None


def parse_lldp(text: str) -> dict[str, str]:
    """Interface -> name of the neighbouring system, from keyvalue or plain `lldpcli` output."""
    found = dict(re.findall(r"^lldp\.([^.\s]+)\.chassis\.name=(\S+)", text, re.M))
    for block in re.split(r"^Interface:", text, flags=re.M)[1:]:
        interface = re.match(r"\s*([^,\s]+)", block)
        system = re.search(r"^\s*SysName:\s*(\S+)", block, re.M)
        if interface and system:
            found[interface[1]] = system[1]
    return found


def parse_rdma_link(text: str) -> dict[str, tuple[bool, str]]:
    """RDMA device -> (active, network interface) from `rdma link`."""
    rows = re.findall(r"^link (\S+?)/\d+ state (\S+)(?:.*?netdev (\S+))?", text, re.M)
    return {device: (state == "ACTIVE", netdev) for device, state, netdev in rows}


def parse_ibv_devinfo(text: str) -> dict[str, bool]:
    """RDMA device -> active, from `ibv_devinfo`."""
    found = {}
    for block in re.split(r"^hca_id:", text, flags=re.M)[1:]:
        state = re.search(r"state:\s*(\w+)", block)
        found[block.split()[0]] = bool(state and state[1] == "PORT_ACTIVE")
    return found


def parse_sysfs(text: str) -> tuple[dict[str, bool], dict[str, float]]:
    """RDMA device -> active, and -> rate in Gb/s, from the sysfs files of the ports."""
    states = re.findall(r"infiniband/([^/]+)/ports/\d+/state:\s*\d+:\s*(\w+)", text)
    rates = re.findall(r"infiniband/([^/]+)/ports/\d+/rate:\s*([\d.]+)", text)
    return {d: s == "ACTIVE" for d, s in states}, {d: float(r) for d, r in rates}


def parse_amd_smi_topology(text: str) -> tuple[int, bool]:
    """(GPUs, all pairs linked by xGMI) from the link type table of `amd-smi topology`."""
    table = re.search(r"LINK TYPE TABLE:?\s*\n(.*?)(?:\n\s*\n|\Z)", text, re.S | re.I)
    if not table:
        return 0, False
    rows = [line.split() for line in table[1].splitlines()]
    rows = [row for row in rows if row and re.match(r"^(GPU\d+|[0-9a-f]{4}:[0-9a-f:.]+)$", row[0], re.I)]
    rows = [row for row in rows if any(cell.upper() in ("SELF", "XGMI", "PCIE") for cell in row[1:])]
    mesh = all(cell.upper() in ("SELF", "XGMI") for row in rows for cell in row[1:])
    return len(rows), mesh and bool(rows)


def read_node(folder: Path) -> NodeDump:
    """Read the dumps of one node. Raises TopologyError when there is no LLDP dump or no NIC in it."""
    dump = NodeDump()
    lldp = folder / "lldp.txt"
    if not lldp.exists():
        raise TopologyError("no LLDP dump", where=str(lldp), remedy="collect `lldpctl -f keyvalue` on the node")
    device_of: dict[str, int] = {}
    texts = {n: (folder / n).read_text() for n in _OPTIONAL if (folder / n).exists()}
    for device, (active, netdev) in parse_rdma_link(texts.get("rdma_link.txt", "")).items():
        nic = nic_number(device)
        if nic is not None:
            device_of[netdev] = nic
            dump.active[nic] = active
    for interface, system in parse_lldp(lldp.read_text()).items():
        nic = device_of.get(interface, None if device_of else nic_number(interface))
        if nic is not None:
            dump.neighbour[nic] = system
    if not dump.neighbour:
        raise TopologyError("no NIC with a neighbour", where=str(lldp), remedy="check that LLDP runs on the rails")
    for device, active in parse_ibv_devinfo(texts.get("ibv_devinfo.txt", "")).items():
        _merge_state(dump, device, active)
    states, rates = parse_sysfs(texts.get("sysfs.txt", ""))
    for device, active in states.items():
        _merge_state(dump, device, active)
    for device, rate in rates.items():
        nic = nic_number(device)
        if nic is not None:
            dump.rate_gbps[nic] = rate
    if "amd_smi_topology.txt" in texts:
        dump.gpus, dump.full_mesh = parse_amd_smi_topology(texts["amd_smi_topology.txt"])
    return dump


_OPTIONAL = ("rdma_link.txt", "ibv_devinfo.txt", "sysfs.txt", "amd_smi_topology.txt")


def _merge_state(dump: NodeDump, device: str, active: bool) -> None:
    nic = nic_number(device)
    if nic is not None:
        dump.active[nic] = dump.active.get(nic, True) and active


def discover(folder: Path) -> Fabric:
    """Build a fabric from a folder of dumps. Raises TopologyError when it holds no usable node."""
    homes = sorted(p for p in folder.iterdir() if p.is_dir() and p.name != "switches")
    if not homes:
        raise TopologyError("no node folders", where=str(folder), remedy="expect <node>/lldp.txt")
    dumps = {home.name: read_node(home) for home in homes}
    nics = 1 + max(max(d.neighbour | d.active, default=0) for d in dumps.values())
    gpus = max(max(d.gpus for d in dumps.values()), nics)
    rail_of = _vote_rails(dumps)
    notes: list[str] = []
    switches = _switches(folder / "switches", rail_of, set(dumps), notes)
    index = {switch.name: i for i, switch in enumerate(switches)}
    leaf = np.full((len(dumps), nics), -1, dtype=np.int64)
    nic_ok = np.ones_like(leaf, dtype=np.bool_)
    for node, (name, dump) in enumerate(dumps.items()):
        for nic, system in dump.neighbour.items():
            leaf[node, nic] = index[system]
        for nic, active in dump.active.items():
            nic_ok[node, nic] = active
        if dump.gpus and (dump.gpus != gpus or not dump.full_mesh):
            notes.append(f"{name}: {dump.gpus} GPUs, {'' if dump.full_mesh else 'not '}fully linked by xGMI")
    return Fabric(
        spec=_spec(
            folder.name,
            dumps,
            nics,
            gpus,
            rail_of,
            leaf,
            any(s.tier == "spine" and s.rail < 0 for s in switches),
        ),
        node_names=tuple(dumps),
        switches=tuple(switches),
        leaf=leaf,
        nic_ok=nic_ok,
        node_ok=np.ones(len(dumps), dtype=np.bool_),
        switch_ok=np.ones(len(switches), dtype=np.bool_),
        notes=tuple(notes),
    )


def _vote_rails(dumps: dict[str, NodeDump]) -> dict[str, int]:
    """Leaf name -> rail: the NIC index that most nodes plug into it, so a swapped cable is outvoted."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for dump in dumps.values():
        for nic, system in dump.neighbour.items():
            votes[system][nic] += 1
    return {system: count.most_common(1)[0][0] for system, count in sorted(votes.items())}


def _switches(folder: Path, rail_of: dict[str, int], hosts: set[str], notes: list[str]) -> list[Switch]:
    """Leaves, and the spines that the leaves' own LLDP names; without it one spine per rail is assumed."""
    up: dict[str, list[str]] = {}
    for leaf in rail_of:
        path = folder / leaf / "lldp.txt"
        seen = set(parse_lldp(path.read_text()).values()) if path.exists() else set()
        up[leaf] = sorted(seen - hosts - set(rail_of))
    rails_of_spine: dict[str, set[int]] = defaultdict(set)
    for leaf, names in up.items():
        for name in names:
            rails_of_spine[name].add(rail_of[leaf])
    if not rails_of_spine and len(set(rail_of.values())) < len(rail_of):
        notes.append("no LLDP dump of the leaves: one spine per rail is assumed")
        up = {leaf: [f"assumed-spine-{rail}"] for leaf, rail in rail_of.items()}
        rails_of_spine = defaultdict(set, {f"assumed-spine-{rail}": {rail} for rail in rail_of.values()})
    spines = sorted(rails_of_spine)
    index = {name: i for i, name in enumerate([*rail_of, *spines])}
    made = [Switch(leaf, "leaf", rail, tuple(index[n] for n in up[leaf])) for leaf, rail in rail_of.items()]
    for name in spines:
        rails = rails_of_spine[name]
        made.append(Switch(name, "spine", next(iter(rails)) if len(rails) == 1 else -1, ()))
    return made


def _spec(
    name: str,
    dumps: dict[str, NodeDump],
    nics: int,
    gpus: int,
    rail_of: dict[str, int],
    leaf: np.ndarray,
    shared: bool,
) -> ClusterSpec:
    rates = [rate for dump in dumps.values() for rate in dump.rate_gbps.values()]
    leaves = Counter(rail_of.values())
    largest = int(np.bincount(leaf[leaf >= 0]).max())
    rails = max(rail_of.values()) + 1
    if nics % rails or gpus % nics:
        raise TopologyError(f"{gpus} GPUs, {nics} NICs and {rails} rails do not divide each other")
    return ClusterSpec.model_validate(
        {
            "name": name,
            "nodes": {"names": list(dumps), "gpus": gpus},
            "nics": {"per_node": nics, "rate_gbps": min(rates, default=400.0)},
            "rails": {
                "count": rails,
                "leaves_per_rail": max(leaves.values()),
                "nodes_per_leaf": largest,
                "spines_per_rail": 1,
                "spine": "shared" if shared else "per_rail",
            },
        }
    )
