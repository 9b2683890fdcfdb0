"""Real training on a real Slurm: from sbatch to a finished run, and back from every failure.

Every test of this module runs jobs on one cluster of four nodes. Ranks import torch, so each attempt costs seconds.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_zaya.telemetry.jsonl import read_events as read_metrics
from megatron_zaya.telemetry.jsonl import steps_by_iteration
from tests.launch.conftest import ENVIRONMENT, REPOSITORY, events, job_field, output, sbatch, wait, wait_for_end

pytestmark = pytest.mark.slurm
SCRIPTS = REPOSITORY / "slurm"
SITE = """
slurm: {gpus_per_node: 8, exclusive: false}
ranks_per_node: 1
preflight: {gpus: 8, max_clock_offset_s: null, spread: 0.05}  # two busy cores say nothing about slow nodes
supervise: {connect_timeout_s: 60, node_timeout_s: 6, start_timeout_s: 120, hang_timeout_s: 8, settle_s: 1}
"""


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    return {i: (s["loss"], s["grad_norm"]) for i, s in steps_by_iteration(run_dir / "metrics.jsonl").items()}


@pytest.fixture(scope="module")
def site(workdir: Path) -> Path:
    """A site with a preflight, and an amd-smi that knows seven GPUs on node n0 and eight on the others."""
    (workdir / "site.yaml").write_text(SITE)
    recorded = json.loads((REPOSITORY / "tests/launch/recorded/amd_smi_metric.json").read_text())["gpu_data"][0]
    for count in (7, 8):
        gpus = [recorded | {"gpu": number} for number in range(count)]
        (workdir / f"metric-{count}.json").write_text(json.dumps({"gpu_data": gpus}))
    tool = workdir / "bin/amd-smi"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = n0 ] && n=7 || n=8\ncat {workdir}/metric-$n.json\n')
    tool.chmod(0o755)
    return workdir / "site.yaml"


@pytest.fixture(scope="module")
def reference(cluster, workdir) -> dict[int, tuple[float, float]]:
    """Steps of the uninterrupted run: `sbatch slurm/smoke_single_node.sbatch`, two ranks on one node."""
    job = sbatch(
        cluster, workdir, str(SCRIPTS / "smoke_single_node.sbatch"),
        env={"RUN_FILE": "run.yaml", "OVERRIDES": "run.name=smoke"},
    )  # fmt: skip
    assert wait_for_end(cluster, job, workdir) == "COMPLETED", output(workdir)
    assert "smoke_single_node: passed" in (workdir / f"slurm-{job}.out").read_text()
    return losses(workdir / "runs/smoke")


def test_the_smoke_script_trains(reference):
    assert set(reference) == set(range(1, 13))
    assert reference[12][0] < reference[1][0] - 0.3


def test_two_nodes_of_two_ranks_are_preempted_and_go_on(cluster, workdir):
    """`zaya submit`, pushed aside by a job with more right to its nodes. That job is the same run by `pretrain.sbatch`,
    undisturbed: the losses must be equal.
    """
    site = {
        "slurm": {"gpus_per_node": 8, "partition": "main", "time": "10", "signal_before_end_s": 30},
        "python": sys.executable,
    }
    (workdir / "preempted.yaml").write_text(yaml.safe_dump(site))
    # A late loader, so that the signal finds it half-way.
    slow = ";".join(f"slow:rank={rank},iteration=1,seconds=0.6" for rank in range(4))
    submit = ["zaya", "submit", "run.yaml", "run.name=preempted", "--site", "preempted.yaml", "--nodes", "2"]
    done = cluster.run([*submit, "--nproc", "2", "--drill", slow], cwd=workdir, extra_env=ENVIRONMENT)
    job = re.search(r"submitted job (\d+)", done.stdout)[1]
    run_dir = workdir / "runs/preempted"
    wait(lambda: events(run_dir, "training"), "first step", diagnose=lambda: output(workdir))
    nodes = f"--nodelist={','.join(events(run_dir, 'attempt_started')[0]['hosts'])}"
    environment = {"RUN_FILE": "run.yaml", "NPROC": "2", "OVERRIDES": "run.name=whole"}
    script = str(SCRIPTS / "pretrain.sbatch")
    whole = sbatch(cluster, workdir, "--partition=urgent", nodes, script, env=environment)
    assert wait_for_end(cluster, whole, workdir) == "COMPLETED", output(workdir)
    assert wait_for_end(cluster, job, workdir) == "COMPLETED", output(workdir)
    assert job_field(cluster, job, "Restarts") == "1"
    assert events(run_dir, "stop_asked")[0]["signal"] == "SIGUSR1"
    ended = read_metrics(run_dir / "metrics.jsonl", "RunEnded")
    assert [e["reason"] for e in ended] == ["SIGUSR1", "finished"]
    assert 0 < ended[0]["iteration"] < 12
    assert losses(run_dir) == losses(workdir / "runs/whole"), "bit for bit"


def test_a_bad_node_a_full_disk_a_crash_a_hang_and_a_dead_node_in_one_run(
    cluster, workdir, site, small_disk, reference
):
    """Of four nodes one fails its check, two train, one stands by. Every failure is named and the losses are those of
    an undisturbed run.
    """
    run_dir = workdir / "runs/faults"
    run_dir.mkdir(parents=True)
    (run_dir / "checkpoints").symlink_to(small_disk)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 65536)
    drills = ["crash:rank=1,iteration=2", "hang:rank=1,iteration=7,attempt=1"]
    drills += [f"slow:rank={rank},iteration=3,seconds=0.3,attempt=2" for rank in range(2)]
    environment = {
        "RUN_FILE": "run.yaml",
        "OVERRIDES": "run.name=faults",
        "SITE": str(site),
        "PATH": f"{workdir / 'bin'}:{ENVIRONMENT['PATH']}",
        "SPARES": "2",
        "DRILL": ";".join(drills),
    }
    job = sbatch(cluster, workdir, "--nodes=4", str(SCRIPTS / "pretrain.sbatch"), env=environment)
    metrics = run_dir / "metrics.jsonl"
    wait(
        lambda: metrics.exists() and read_metrics(metrics, "SaveFailed"),
        "failed save",
        diagnose=lambda: output(workdir),
    )
    (small_disk / "filler").unlink()
    wait(lambda: len(events(run_dir, "training")) == 3, "third start", diagnose=lambda: output(workdir))
    wait(lambda: read_metrics(metrics, "Saved"), "save", diagnose=lambda: output(workdir))
    victim = events(run_dir, "attempt_started")[-1]["hosts"][1]
    killed = time.time()
    cluster.crash_node(victim)
    wait(lambda: len(events(run_dir, "training")) == 4, "fourth start", diagnose=lambda: output(workdir))
    assert wait_for_end(cluster, job, workdir) == "COMPLETED", output(workdir)

    (bad,) = events(run_dir, "node_excluded")
    assert (bad["host"], bad["why"]) == ("n0", "preflight")
    assert "7 (wanted: 8)" in bad["said"][-1]
    assert "n0" not in events(run_dir, "attempt_started")[0]["hosts"]
    assert "No space left" in read_metrics(metrics, "SaveFailed")[0]["reason"]
    crash, hang, node = events(run_dir, "incident")
    assert (crash["category"], crash["rank"], crash["iteration"]) == ("user code", 1, 2)
    assert "RuntimeError: drill: rank 1 crashes after iteration 2" in crash["reason"]
    assert (hang["category"], hang["rank"], hang["iteration"]) == ("hang", 1, 7), "the full disk did not end the run"
    assert "it is in _fail (train/callbacks/drill.py" in hang["reason"]
    assert (node["category"], node["host"]) == ("node", victim)
    final = events(run_dir, "attempt_started")[-1]["hosts"]
    assert {victim, "n0"}.isdisjoint(final) and len(final) == 2
    start = events(run_dir, "training")[-1]
    imports = start["phases"]["join"] - start["phases"]["imports"]
    assert start["phases"]["step"] - killed < 30 + imports
    assert read_metrics(metrics, "RunStarted")[-1]["iteration"] >= 4, "from a checkpoint"
    assert losses(run_dir) == reference, "bit for bit, through four attempts"
    for number in (1, 2, 3):
        assert (run_dir / f"launch/incidents/{number:04d}.md").is_file()
    cluster.reboot_node(victim)


def test_preflight_collectives_and_conversion_by_plain_sbatch(cluster, workdir, site, reference):
    """Both tiers on two healthy nodes, the same figures by the benchmark's script, weights for other programs."""
    convert = ["--nodelist=n3", str(SCRIPTS / "convert.sbatch"), "to-hf", "runs/smoke", "hf"]
    converted = sbatch(cluster, workdir, *convert)
    usage = sbatch(cluster, workdir, "--nodelist=n0", str(SCRIPTS / "convert.sbatch"))
    nodes = ["--nodes=2", "--nodelist=n1,n2"]
    environment = {"SITE": str(site), "NPROC": "1", "PATH": f"{workdir / 'bin'}:{ENVIRONMENT['PATH']}"}
    job = sbatch(cluster, workdir, *nodes, str(SCRIPTS / "preflight.sbatch"), env=environment)
    assert wait_for_end(cluster, job, workdir) == "COMPLETED", output(workdir)
    assert (workdir / "preflight/pass.txt").read_text() == "n[1-2]\n"
    ranks = json.loads((workdir / "preflight/measurements.json").read_text())["ranks"]
    assert [rank["host"] for rank in ranks] == ["n1", "n2"]
    assert all(rank["world.all_reduce"] > 0 and rank["rail.send_recv_from"] for rank in ranks)
    assert wait_for_end(cluster, converted, workdir) == "COMPLETED", output(workdir)
    assert (workdir / "hf/config.json").is_file() and list((workdir / "hf").glob("*.safetensors"))
    assert wait_for_end(cluster, usage, workdir) == "FAILED"
    assert "convert: say what to convert" in (workdir / f"slurm-{usage}.out").read_text()

    bad = sbatch(
        cluster, workdir, "--nodelist=n0,n1", str(SCRIPTS / "preflight.sbatch"), env=environment | {"TIER": "1"}
    )
    fabric = REPOSITORY / "configs/clusters/mi300x_128x8_rails.yaml"
    (workdir / "fabric.env").write_text("export GLOO_SOCKET_IFNAME=lo ZAYA_SOURCED=1\n")
    figures = {"NPROC": "1", "OUT": "figures.json", "CLUSTER": str(fabric), "ENV_FILE": "fabric.env",
               "PYTHON": sys.executable}  # fmt: skip
    nodes = ["--nodes=2", "--nodelist=n2,n3"]
    bench = sbatch(cluster, workdir, *nodes, str(SCRIPTS / "bench_collectives.sbatch"), env=figures)
    assert wait_for_end(cluster, bad, workdir) == "FAILED"
    assert (workdir / "preflight/fail.txt").read_text() == "n0\n"
    assert wait_for_end(cluster, bench, workdir) == "COMPLETED", output(workdir)
    ranks = json.loads((workdir / "figures.json").read_text())["ranks"]
    assert [rank["host"] for rank in ranks] == ["n2", "n3"] and all(rank["world.all_to_all"] > 0 for rank in ranks)
    assert "all_reduce" in (workdir / f"slurm-{bench}.out").read_text(), "the planner's expectation is printed"
