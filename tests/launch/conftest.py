"""A real Slurm cluster for the tests of a module, a tiny run on real text, and jobs that are waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launch.supervise.record import read_events
from megatron_zaya.data.prepare import prepare
from tests.slurm_cluster import SlurmCluster, missing, slurm_cluster
from tests.train.conftest import TINY_MODEL

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs of a module, with prepared text and `run.yaml`."""
    folder = tmp_path_factory.mktemp("work")
    prepare(["python-stdlib"], folder / "text", limit_documents=60, workers=1)
    tree = {
        "run": {"name": "tiny", "precision": "fp32"},
        "model": TINY_MODEL,
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3},
        "schedule": dict(train_iters=12, global_batch_size=8, micro_batch_size=2, lr_warmup_iters=1),
        "data": {"data_path": [str(folder / "text")], "seq_length": 32},
        "checkpoint": {"save_interval": 4},
        "telemetry": {"loss_curve": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 16 MB, to fill. Nodes see it: it is there before they start."""
    if missing():
        pytest.skip(missing())
    folder = tmp_path_factory.mktemp("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, small_disk: Path) -> Iterator[SlurmCluster]:
    """Four nodes with eight fake GPUs each; jobs of the partition "urgent" push others back into the queue."""
    folder = tmp_path_factory.mktemp("slurm") / "c"
    with slurm_cluster(folder, ["n0", "n1", "n2", "n3"], gpus=8, more_conf=PREEMPTION) as running:
        yield running


# A preempted job gets the signal that it asked for with --signal, and a minute to save.
PREEMPTION = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP
"""

ENVIRONMENT = {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",  # the nodes of the test cluster share one network
}


def sbatch(cluster: SlurmCluster, workdir: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    """Submit from ``workdir``; return the job id."""
    command = ["sbatch", "--parsable", "--time=10", *arguments]
    return cluster.run(command, cwd=workdir, extra_env={**ENVIRONMENT, **(env or {})}).stdout.strip()


def job_field(cluster: SlurmCluster, job_id: str, field: str) -> str:
    """One field of `scontrol show job`."""
    shown = cluster.run(["scontrol", "-o", "show", "job", job_id]).stdout
    return next((word.split("=", 1)[1] for word in shown.split() if word.startswith(f"{field}=")), "")


def wait(ready: Callable[[], object], what: str, timeout_s: float = 180.0, diagnose: Callable[[], str] = str) -> None:
    """Poll until ``ready``; fail with ``diagnose()`` after the deadline."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s\n{diagnose()}"
        time.sleep(0.2)


def wait_for_end(cluster: SlurmCluster, job_id: str, folder: Path, timeout_s: float = 180.0) -> str:
    """Wait for the end of a job; return its state."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
    wait(
        lambda: job_field(cluster, job_id, "JobState") in ended,
        f"end of job {job_id}",
        timeout_s,
        lambda: output(folder) + cluster.log_tail(),
    )
    return job_field(cluster, job_id, "JobState")


def output(folder: Path) -> str:
    """Everything that jobs wrote below a folder, the end of each file."""
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in (".out", ".log")]
    return "\n".join(f"==> {path} <==\n{path.read_text(errors='replace')[-2500:]}" for path in files)


def events(run_dir: Path, kind: str | None = None) -> list[dict]:
    """The supervisor's events of a run."""
    return read_events(run_dir / "launch/events.jsonl", kind)
