"""The placement on a real 128-node Slurm cluster: 1,024 tasks report where they are, as planned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster import SlurmCluster, missing, slurm_cluster
from topology.build import load_fabric
from topology.emit.slurm import slurm_hostfile, topology_conf
from topology.hostlist import compress, expand
from topology.place import Placement, place
from topology.plan import Plan, Workload

SHIPPED = Path(__file__).parents[2] / "configs/clusters/mi300x_128x8_rails.yaml"
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]
REPORT = 'echo "$SLURM_PROCID $SLURMD_NODENAME $SLURM_LOCALID $SLURM_TOPOLOGY_ADDR"'


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    fabric = load_fabric(SHIPPED)
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "c", fabric.node_names, topology_conf(fabric)) as running:
        yield running


def launch(cluster: SlurmCluster, placement: Placement, folder: Path) -> tuple[dict[int, tuple[str, int]], set[str]]:
    """Run one light task per rank in planned order: rank -> (host, local rank), topology addresses."""
    hostfile = folder / "hostfile"
    hostfile.write_text(slurm_hostfile(placement))
    command = ["srun", "--distribution=arbitrary", f"--nodes={len(placement.hosts)}"]
    command += [f"--ntasks={placement.plan.world_size}", "--time=5", "sh", "-c", REPORT]
    done = cluster.run(command, timeout_s=120, extra_env={"SLURM_HOSTFILE": str(hostfile)})
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()]
    return {int(rank): (host, int(local)) for rank, host, local, _ in rows}, {row[3] for row in rows}


def planned(placement: Placement) -> dict[int, tuple[str, int]]:
    return {rank: (host, local) for rank, host, local in placement.rank_map()}


def test_1024_tasks_land_where_the_plan_says(cluster: SlurmCluster, tmp_path: Path) -> None:
    fabric = load_fabric(SHIPPED)
    many_microbatches = Workload(global_batch_size=16384)  # pipelines matter more than rings: kept in leaves
    plan = Plan(world_size=1024, pipeline_model_parallel_size=4, workload=many_microbatches)
    placement = place(fabric, plan)
    assert placement.hosts != sorted(placement.hosts), "the order must be one that Slurm would not choose"
    found, addresses = launch(cluster, placement, tmp_path)
    assert len(found) == 1024
    assert found == planned(placement)
    assert {address.split(".")[0] for address in addresses} == {"spine"}
    assert {address.split(".")[1] for address in addresses} == {"leaf0", "leaf1", "leaf2", "leaf3"}


def test_degraded_cluster_lands_where_the_plan_says(cluster: SlurmCluster, tmp_path: Path) -> None:
    fabric = load_fabric(SHIPPED).with_failures(nodes=["zaya005"], nics=[("zaya070", 3)])
    plan = Plan(world_size=1024, pipeline_model_parallel_size=4, expert_model_parallel_size=8)
    placement = place(fabric, plan, shrink=True)
    assert placement.plan.world_size == 992
    assert placement.hosts != sorted(placement.hosts), "the order must be one that Slurm would not choose"
    drained = ["zaya005", "zaya070"]
    cluster.run(["scontrol", "update", f"nodename={compress(drained)}", "state=drain", "reason=test"])
    try:
        found, _ = launch(cluster, placement, tmp_path)
    finally:
        cluster.run(["scontrol", "update", f"nodename={compress(drained)}", "state=resume"])
    assert found == planned(placement)
    assert not {host for host, _ in found.values()} & set(drained)


def test_slurm_reads_the_emitted_tree(cluster: SlurmCluster) -> None:
    shown = cluster.run(["scontrol", "show", "topology", "leaf2"]).stdout
    nodes = next(word for word in shown.split() if word.startswith("Nodes=")).removeprefix("Nodes=")
    assert expand(nodes) == [f"zaya{number:03}" for number in range(64, 96)]
