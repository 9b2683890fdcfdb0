"""slurm/hooks on a real Slurm: an epilog that cleans up, a prolog that refuses, a health check that drains."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.conftest import REPOSITORY, job_field, wait
from tests.slurm_cluster import SlurmCluster, missing, slurm_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]
HOOKS = REPOSITORY / "slurm/hooks"
BY_HAND = ["sbatch", "--parsable", "--time=5", "--chdir=/", "--output=/dev/null"]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that other users can enter, for jobs that are not root's."""
    path = Path(tempfile.mkdtemp(prefix="zaya-hooks-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Two nodes with the three hooks; the health check is adapted as its header says, with limits for each node."""
    text = (HOOKS / "health_check.sh").read_text()
    adapted = {
        "SLURM_CONF=/etc/slurm/slurm.conf": f"SLURM_CONF={folder}/c/slurm.conf",
        "python=/opt/zaya/bin/python limits=/etc/slurm/zaya-limits.json verdicts=/var/log/zaya-preflight": (
            f"python={sys.executable} limits={folder}/limits-$(hostname -s).json verdicts={folder}/verdicts "
            f"PYTHONPATH={REPOSITORY}\nexport PYTHONPATH"
        ),
    }
    for old, new in adapted.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    script = folder / "health_check.sh"
    script.write_text(text)
    script.chmod(0o755)
    for node in ("n0", "n1"):
        (folder / f"limits-{node}.json").write_text('{"max_clock_offset_s": null}')
    conf = [f"Prolog={HOOKS}/prolog.sh", f"Epilog={HOOKS}/epilog.sh", f"HealthCheckProgram={script}"]
    with slurm_cluster(folder / "c", ["n0", "n1"], more_conf="\n".join([*conf, "HealthCheckInterval=6"])) as running:
        yield running


def node_reason(cluster: SlurmCluster, node: str) -> str:
    return cluster.run(["sinfo", "-h", "-n", node, "-o", "%T %E"]).stdout.strip()


def test_the_epilog_ends_what_a_job_left_and_nothing_else(cluster):
    """Two jobs of one user: the first leaves a process and scratch; they go when the user's last job has ended.

    slurmd is the first process of a test node and reaps no strangers, so only processes that still live are looked for.
    """
    sleeper = "setsid sleep 777 & mkdir /dev/shm/zaya-agent-$SLURM_JOB_ID-x; touch /dev/shm/ready-$SLURM_JOB_ID"
    other = cluster.run([*BY_HAND, "--uid=1", "-w", "n0", "--wrap", "mkdir /dev/shm/zaya-agent-$SLURM_JOB_ID-x; "
                         "while [ ! -e /dev/shm/go ]; do sleep 0.1; done"]).stdout.strip()  # fmt: skip
    wait(lambda: job_field(cluster, other, "JobState") == "RUNNING", "start", diagnose=cluster.log_tail)
    first = cluster.run([*BY_HAND, "--uid=1", "-w", "n0", "--wrap", sleeper]).stdout.strip()
    wait(lambda: job_field(cluster, first, "JobState") == "COMPLETED", "end", diagnose=cluster.log_tail)
    assert cluster.enter("n0", "pgrep -r S,R,D -u daemon sleep"), "the user has another job here"
    assert cluster.enter("n0", "ls -d /dev/shm/zaya-agent-*").split() == [f"/dev/shm/zaya-agent-{other}-x"]
    cluster.enter("n0", "touch /dev/shm/go")
    wait(lambda: job_field(cluster, other, "JobState") == "COMPLETED", "end", diagnose=cluster.log_tail)
    assert cluster.enter("n0", "pgrep -r S,R,D -u daemon sleep; ls -d /dev/shm/zaya-agent-* 2>/dev/null") == ""


def test_the_prolog_refuses_a_node_whose_shared_memory_is_full(cluster):
    """What killed agents left is removed first; then the job is held, the node drained, and both can be taken back."""
    fill = "mount -o remount,size=4100m /dev/shm && mkdir -p /dev/shm/zaya-agent-1-x && fallocate -l 8m /dev/shm/{}"
    job = [*BY_HAND, "-w", "n0", "--wrap", "true"]
    cluster.enter("n0", fill.format("zaya-agent-1-x/segment"))
    cleaned = cluster.run(job).stdout.strip()
    wait(lambda: job_field(cluster, cleaned, "JobState") == "COMPLETED", "end", diagnose=cluster.log_tail)
    cluster.enter("n0", fill.format("somebody-else"))
    refused = cluster.run(job).stdout.strip()
    wait(lambda: "held" in job_field(cluster, refused, "Reason"), "held job", diagnose=cluster.log_tail)
    assert "drain" in node_reason(cluster, "n0") and "Prolog error" in node_reason(cluster, "n0")
    cluster.enter("n0", "rm /dev/shm/somebody-else")
    cluster.run(["scontrol", "update", "nodename=n0", "state=resume"])
    cluster.run(["scontrol", "release", refused])
    wait(lambda: job_field(cluster, refused, "JobState") == "COMPLETED", "end", diagnose=cluster.log_tail)


def test_the_health_check_drains_the_node_that_fails_the_preflight(cluster, folder):
    (folder / "limits-n1.json").write_text('{"max_clock_offset_s": null, "min_memory_gib": 1e6}')
    wait(lambda: "drain" in node_reason(cluster, "n1"), "drained node", diagnose=cluster.log_tail)
    assert "preflight: n1: FAIL" in node_reason(cluster, "n1")
    assert cluster.count("idle") == 1
    assert not json.loads((folder / "verdicts/n1.tier1.json").read_text())["passed"]
