"""The cluster fixture itself: fake GPUs, host names, and a node that loses power."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.slurm_cluster import missing, slurm_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]


def test_tasks_see_their_node_and_gpus_and_a_dead_node_is_gone(tmp_path: Path) -> None:
    with slurm_cluster(tmp_path / "c", ["n0", "n1"], gpus=8) as cluster:
        report = 'echo "$(hostname) $SLURM_PROCID $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"'
        command = ["srun", "-N2", "--ntasks-per-node=2", "--gpus-per-node=8", "--time=1", "sh", "-c", report]
        lines = sorted(cluster.run(command).stdout.splitlines())
        devices = ",".join(map(str, range(8)))
        assert lines == [f"n{rank // 2} {rank} {rank % 2} {devices}" for rank in range(4)]
        refused = cluster.run(["srun", "-N1", "--gpus-per-node=9", "true"], check=False)
        assert refused.returncode and "not available" in refused.stderr
        cluster.crash_node("n1")
        cluster.run(["scontrol", "update", "nodename=n1", "state=down", "reason=test"])
        assert (cluster.count("down"), cluster.count("idle")) == (1, 1)
        pids = [process.pid for process in cluster._daemons]
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/stat").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}/stat").exists() for pid in pids)
