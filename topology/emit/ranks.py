"""Rank order for launchers other than srun: torchrun node ranks and an OpenMPI rankfile.

torchrun sorts nodes by name unless told otherwise (https://github.com/pytorch/pytorch/issues/191190), so
every node gets its rank explicitly.
"""

from __future__ import annotations

from topology.place import Placement


def torchrun_node_ranks(placement: Placement) -> str:
    """A shell fragment to source on each node: sets NODE_RANK from the host name, and the master."""
    gpus = min(placement.fabric.gpus_per_node, placement.plan.world_size)
    hosts = placement.hosts
    lines = [
        "# Source this on every node, then: torchrun --nnodes=$NNODES --node-rank=$NODE_RANK \\",
        "#   --nproc-per-node=$NPROC_PER_NODE --master-addr=$MASTER_ADDR --master-port=$MASTER_PORT ...",
        f"export NNODES={len(hosts)} NPROC_PER_NODE={gpus} MASTER_ADDR={hosts[0]}",
        'case "$(hostname -s)" in',
        *(f"    {host}) export NODE_RANK={rank} ;;" for rank, host in enumerate(hosts)),
        '    *) echo "torchrun_node_ranks: $(hostname -s) is not part of this placement" >&2; exit 1 ;;',
        "esac",
    ]
    return "\n".join(lines) + "\n"


def openmpi_rankfile(placement: Placement) -> str:
    """OpenMPI rankfile (`mpirun --rankfile`): rank, host and CPU range of its GPU's share of the cores."""
    fabric = placement.fabric
    share = max(1, fabric.spec.nodes.cpus // fabric.gpus_per_node)
    return "".join(
        f"rank {rank}={host} slot={local * share}-{(local + 1) * share - 1}\n"
        for rank, host, local in placement.rank_map()
    )
