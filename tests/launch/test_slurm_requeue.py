"""Back into the queue of a real Slurm, and on with other nodes. Ranks without torch: this is about the launcher.

The jobs of this module run side by side, each on nodes of its own; a test waits for its job.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from launch.submit import Request, prepare, submit
from launch.supervise.record import read_events, read_excluded
from tests.launch.conftest import ENVIRONMENT, job_field, output, wait, wait_for_end
from tests.slurm_cluster import SlurmCluster, missing, slurm_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]
ITERATIONS = 8
SUPERVISE = dict(
    connect_timeout_s=60, node_timeout_s=20, start_timeout_s=90, hang_timeout_s=120, settle_s=0.5,
    max_restarts_without_progress=1,
)  # fmt: skip


@dataclass(frozen=True)
class Toy:
    """A submitted job of toy ranks."""

    cluster: SlurmCluster
    job_id: str
    folder: Path

    def events(self, kind: str) -> list[dict]:
        return read_events(self.folder / "events.jsonl", kind)

    def wait(self, kind: str, count: int = 1) -> list[dict]:
        """Wait for so many events of a kind; return them."""
        wait(lambda: len(self.events(kind)) >= count, f"{count} x {kind}", diagnose=lambda: output(self.folder))
        return self.events(kind)

    def end(self) -> str:
        return wait_for_end(self.cluster, self.job_id, self.folder)

    def field(self, name: str) -> str:
        return job_field(self.cluster, self.job_id, name)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    nodes = [f"t{number}" for number in range(8)]
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "c", nodes) as running:
        yield running


@pytest.fixture(scope="module")
def start(cluster: SlurmCluster, workdir: Path) -> Iterator[Callable[..., Toy]]:
    """What `zaya submit` does, but each rank is a toy with the given faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workdir)
        for name, value in (cluster.environment | ENVIRONMENT).items():
            patch.setenv(name, value)

        def start(name: str, faults: str, *options: str, preflight: dict | None = None, time: str = "10") -> Toy:
            site = {
                "slurm": dict(gpus_per_node=0, exclusive=False, time=time, extra=list(options),
                              signal_before_end_s=55),
                "python": sys.executable,
                "supervise": SUPERVISE,
                "preflight": preflight,
            }  # fmt: skip
            (workdir / f"{name}.yaml").write_text(yaml.safe_dump(site))
            request = Request(Path("run.yaml"), [f"run.name={name}"], site_file=Path(f"{name}.yaml"), nodes=2)
            submission = prepare(request)
            steps = submission.folder / "steps"
            steps.mkdir(parents=True)
            command = [sys.executable, "-m", "tests.launch.toy_rank", str(steps), str(ITERATIONS), faults]
            submission = replace(submission, job=replace(submission.job, command=command))
            submission.write()
            return Toy(cluster, submit(submission), submission.folder)

        yield start


@pytest.fixture(scope="module")
def told(start):
    return start("told", "wait:rank=0,iteration=3,attempt=0", "--nodelist=t[0-1]")


@pytest.fixture(scope="module")
def bad_node(start):
    return start("bad_node", "device:rank=1,iteration=3,attempt=0", "--nodelist=t[2-3]", "--exclude=t7")


@pytest.fixture(scope="module")
def unfit(start):
    return start("unfit", "", "--nodelist=t[4-5]", preflight={"min_memory_gib": 1e9, "max_clock_offset_s": None})


@pytest.fixture(scope="module")
def headless(start):
    return start("headless", "wait:rank=0,iteration=3,attempt=0", "--nodelist=t[6-7]")


def test_sigusr1_saves_and_requeues(told, bad_node, unfit, headless):
    told.wait("training")
    told.cluster.run(["scancel", "--signal=USR1", "--batch", told.job_id])
    assert told.end() == "COMPLETED", output(told.folder)
    assert told.field("Restarts") == "1"
    assert (told.folder / "steps/saved").read_text() == str(ITERATIONS)
    (stopped,), (requeued,) = told.events("attempt_stopped"), told.events("requeueing")
    assert (stopped["iteration"], requeued["excluded"]) == (3, [])
    assert [a["hosts"] for a in told.events("attempt_started")] == [["t0", "t1"]] * 2


def test_a_bad_node_without_a_spare_requeues_the_job_elsewhere(bad_node):
    """The same job, with --exclude of the node: Slurm would give it back otherwise."""
    assert bad_node.end() == "COMPLETED", output(bad_node.folder)
    assert (bad_node.field("Restarts"), bad_node.field("ExcNodeList")) == ("1", "t[3,7]"), "joined with the user's own"
    (incident,) = bad_node.events("incident")
    assert (incident["category"], incident["host"], incident["excluded"]) == ("device", "t3", "t3")
    first, second = bad_node.events("attempt_started")
    assert first["hosts"] == ["t2", "t3"] and "t3" not in second["hosts"]
    assert list(read_excluded(bad_node.folder)) == ["t3"]
    assert bad_node.events("job_finished")[0]["iteration"] == ITERATIONS


def test_limits_that_no_node_meets_end_the_job_soon(unfit):
    assert unfit.end() == "FAILED", output(unfit.folder)
    assert len(unfit.events("job_started")) == 2
    (given_up,) = unfit.events("job_given_up")
    assert "2 allocations in a row had too few healthy nodes" in given_up["reason"]
    assert len(read_excluded(unfit.folder)) == 4
    assert not unfit.events("attempt_started")


def test_the_death_of_the_batch_host_requeues_the_job(headless):
    """The controller dies with its node; the agents notice."""
    cluster = headless.cluster
    headless.wait("training")
    host = headless.field("BatchHost")
    cluster.crash_node(host)
    log = headless.folder / "agents.log"
    wait(lambda: "requeueing job" in log.read_text(), "word of the agents", diagnose=lambda: output(headless.folder))
    cluster.run(["scontrol", "update", f"nodename={host}", "state=down", "reason=test"])  # or its steps never end
    wait(lambda: headless.field("Restarts") == "1", "requeue", diagnose=lambda: output(headless.folder))
    cluster.reboot_node(host)
    assert headless.end() == "COMPLETED", output(headless.folder)
    assert headless.events("job_finished")[0]["iteration"] == ITERATIONS


@pytest.mark.soak
def test_the_end_of_the_wall_time_saves_and_requeues(start):
    """One minute, the shortest that Slurm knows, with the signal as early as it may come."""
    expiring = start("expiring", "wait:rank=0,iteration=3,attempt=0", "--nodelist=t[0-1]", time="1")
    assert expiring.end() == "COMPLETED", output(expiring.folder)
    assert (expiring.field("Restarts"), expiring.events("attempt_stopped")[0]["iteration"]) == ("1", 3)
