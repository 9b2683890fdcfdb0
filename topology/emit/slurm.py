"""Slurm's view: `topology.conf` (tree), `topology.yaml` (block and tree), and the SLURM_HOSTFILE.

Slurm has no notion of a rail; one tree of leaves describes all rails when they split the nodes alike, and
the emitters refuse when they do not. Formats: https://slurm.schedmd.com/topology.conf.html,
topology.yaml.html.
"""

from __future__ import annotations

import numpy as np
import yaml

from topology.cabling import check_cabling
from topology.errors import TopologyError
from topology.fabric import Fabric
from topology.hostlist import compress
from topology.place import Placement


def leaf_nodes(fabric: Fabric) -> dict[str, list[str]]:
    """Leaf position (`leaf0`, ...) -> its nodes, valid for every rail.

    Raises:
        TopologyError: the rails split the nodes differently, so no single tree is true.
    """
    findings = check_cabling(fabric)
    if findings:
        first = findings[0]
        raise TopologyError(
            f"rails are not congruent, Slurm cannot describe them: {first.message}",
            where=first.host,
            remedy="repair the cabling (`zaya topology show` lists all findings)",
        )
    groups = fabric.leaf_group
    names = np.array(fabric.node_names)
    return {f"leaf{group}": names[groups == group].tolist() for group in np.unique(groups)}


def topology_conf(fabric: Fabric) -> str:
    """`topology.conf` for TopologyPlugin=topology/tree."""
    leaves = leaf_nodes(fabric)
    lines = [
        f"# {fabric.spec.name}: {fabric.rails} congruent rails of {len(leaves)} leaves. One switch stands",
        "# for the leaf at that position on every rail. Use with TopologyPlugin=topology/tree.",
    ]
    lines += [f"SwitchName={leaf} Nodes={compress(nodes)}" for leaf, nodes in leaves.items()]
    if len(leaves) > 1 and _joined(fabric):
        lines.append(f"SwitchName=spine Switches={compress(leaves)}")
    return "\n".join(lines) + "\n"


def topology_yaml(fabric: Fabric) -> str:
    """`topology.yaml` (Slurm 25.05 and later): blocks of one leaf each, and the tree for other partitions."""
    leaves = leaf_nodes(fabric)
    base = min(len(nodes) for nodes in leaves.values())
    sizes = [base << power for power in range(8) if base << power <= fabric.nodes]
    blocks = [{"block": leaf, "nodes": compress(nodes)} for leaf, nodes in leaves.items()]
    switches = [{"switch": leaf, "nodes": compress(nodes)} for leaf, nodes in leaves.items()]
    if len(leaves) > 1 and _joined(fabric):
        switches.append({"switch": "spine", "children": compress(leaves)})
    document = [
        {
            "topology": "rails-block",
            "cluster_default": True,
            "block": {"block_sizes": sizes, "blocks": blocks},
        },
        {"topology": "rails-tree", "cluster_default": False, "tree": {"switches": switches}},
    ]
    return yaml.safe_dump(document, sort_keys=False)


def _joined(fabric: Fabric) -> bool:
    """True when leaves of one rail reach each other."""
    return any(switch.tier != "leaf" for switch in fabric.switches)


def slurm_hostfile(placement: Placement) -> str:
    """One host per task in rank order, for `SLURM_HOSTFILE=... srun --distribution=arbitrary`.

    SLURM_NODEID stays sorted by name whatever the file says, so MASTER_ADDR is the first line of this
    file and not the first of `scontrol show hostnames`.
    """
    return "".join(f"{host}\n" for _, host, _ in placement.rank_map())
