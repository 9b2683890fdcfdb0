"""All outputs of one placement, written into a folder.

Invariant: `placement.json` alone is enough to rebuild every other file's content.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from topology.cabling import congruent
from topology.emit import bandwidth, environment, picture, ranks, slurm
from topology.emit.links import link_load
from topology.errors import TopologyError
from topology.legality import STATUS
from topology.place import Placement

FORMATS = {
    "topology-conf": "topology.conf",
    "topology-yaml": "topology.yaml",
    "hostfile": "slurm_hostfile",
    "torchrun": "torchrun_node_ranks.sh",
    "rankfile": "openmpi_rankfile",
    "env": "rccl_env.sh",
    "bandwidth": "expected_bandwidth.json",
    "dot": "fabric.dot",
    "svg": "fabric.svg",
    "html": "fabric.html",
    "json": "placement.json",
}


def render(placement: Placement, kind: str) -> str:
    """Text of one output. Raises TopologyError for an unknown kind or an inexpressible fabric."""
    fabric = placement.fabric
    if kind == "topology-conf":
        return slurm.topology_conf(fabric)
    if kind == "topology-yaml":
        return slurm.topology_yaml(fabric)
    if kind == "hostfile":
        return slurm.slurm_hostfile(placement)
    if kind == "torchrun":
        return ranks.torchrun_node_ranks(placement)
    if kind == "rankfile":
        return ranks.openmpi_rankfile(placement)
    if kind == "env":
        return environment.environment_file(fabric, placement.verdicts)
    if kind == "bandwidth":
        return _json({"rows": bandwidth.as_records(bandwidth.expected_bandwidth(fabric))})
    if kind == "dot":
        return picture.graphviz(placement)
    if kind == "svg":
        return picture.svg(placement)
    if kind == "html":
        return picture.html(placement)
    if kind == "json":
        return _json(as_record(placement))
    raise TopologyError("unknown output", value=kind, remedy=f"use one of {', '.join(FORMATS)}")


def write_all(placement: Placement, folder: Path) -> tuple[list[Path], list[str]]:
    """Write every output; returns the paths, and what was left out: incongruent rails have no Slurm tree."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TopologyError(f"cannot make the folder: {error.strerror}", where=str(folder)) from None
    written, skipped = [], []
    for kind, name in FORMATS.items():
        if kind.startswith("topology-") and not congruent(placement.fabric):
            skipped.append(f"{name}: rails are not congruent")
            continue
        path = folder / name
        path.write_text(render(placement, kind), encoding="utf-8")
        written.append(path)
    return written, skipped


def as_record(placement: Placement) -> dict[str, Any]:
    """The placement as plain data."""
    fabric, load = placement.fabric, link_load(placement)
    return {
        "cluster": fabric.spec.name,
        "plan": placement.plan.model_dump(),
        "strategy": placement.strategy,
        "predicted_communication_s": placement.cost.total_s,
        "bound_s": placement.bound_s,
        "spine_bytes": placement.cost.spine_bytes,
        "nic_bytes": load.nic_bytes,
        "xgmi_bytes": load.xgmi_bytes,
        "uplink_bytes": {f"leaf{leaf}": size for leaf, size in load.uplink_bytes.items()},
        "master": placement.master,
        "hosts": placement.hosts,
        "gpus_per_node": fabric.gpus_per_node,
        "spares": [fabric.node_names[node] for node in placement.spares],
        "excluded": {fabric.node_names[node]: reason for node, reason in placement.excluded},
        "flows": [
            {
                **asdict(cost.flow),
                **asdict(cost.shape),
                "time_s": cost.time_s,
                "spine_bytes": cost.spine_bytes,
            }
            for cost in placement.cost.flows
        ],
        "communicators": [
            {"kind": v.kind, "groups": v.groups, "size": v.size, "status": STATUS[v.status], "legal": v.legal}
            for v in placement.verdicts
        ],
        "environment": [asdict(v) for v in environment.environment(fabric, placement.verdicts)],
    }


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"
