"""128 nodes x 8 light tasks through `zaya submit`, MPI worlds, and mistakes that Slurm refuses: no torch here."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.coordinates import groups_of
from launch.rehearse import digest
from megatron_zaya.data.prepare import prepare
from tests.launch.conftest import BIN, ENVIRONMENT, REPOSITORY, job_field, output, wait
from tests.slurm_cluster import SlurmCluster, missing, slurm_cluster
from tests.train.conftest import TINY_MODEL
from topology.build import load_fabric
from topology.emit.slurm import topology_conf
from topology.groups import derive_groups
from topology.plan import Plan

FABRIC = REPOSITORY / "configs/clusters/mi300x_128x8_rails.yaml"
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    fabric = load_fabric(FABRIC)
    folder = tmp_path_factory.mktemp("slurm") / "c"
    with slurm_cluster(folder, fabric.node_names, topology_conf(fabric), gpus=8) as running:
        yield running


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A folder with a run of 1,024 ranks: plan, site and run file."""
    model = TINY_MODEL | {"num_layers": 8, "num_moe_experts": 8}
    tree = {
        "run": {"name": "big"},
        "model": model,
        "schedule": {"train_iters": 2, "global_batch_size": 16384},
        "data": {"data_path": [str(tmp_path / "text")], "seq_length": 32},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    lines = [json.dumps({"text": "some text\n" * 500})] * 60
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    prepare([str(tmp_path / "text.jsonl")], tmp_path / "text", workers=1)
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump({"world_size": 1024, "pipeline_model_parallel_size": 4, "expert_model_parallel_size": 8})
    )
    site = {
        "name": "test",
        "slurm": {"exclusive": False, "time": "10"},
        "cluster": str(FABRIC),
        "python": f"{sys.executable}",
        "environment": {"ZAYA_SITE_SAYS": "it's here"},
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    return tmp_path


def zaya(cluster: SlurmCluster, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return cluster.run([str(BIN / "zaya"), *arguments], cwd=folder, extra_env=ENVIRONMENT, check=False, timeout_s=100)


@pytest.mark.soak
def test_1024_tasks_know_who_they_are(big, run_folder):
    done = zaya(big, run_folder, "submit", "run.yaml", "--plan", "plan.yaml", "--site", "site.yaml", "--rehearse")
    assert done.returncode == 0, done.stderr
    job = done.stdout.split("submitted job ")[1].split(";")[0]
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    wait(lambda: job_field(big, job, "JobState") in ended, "end", 200, lambda: output(run_folder))
    assert job_field(big, job, "JobState") == "COMPLETED", output(run_folder)
    launch = run_folder / "runs/big/launch"
    assert "rehearsal passed" in (launch / f"slurm-{job}.out").read_text()
    said = {r["rank"]: r for r in map(json.loads, (launch / "rehearsal.jsonl").read_text().splitlines())}
    assert set(said) == set(range(1024))

    planned = (launch / "hostfile").read_text().splitlines()
    assert planned != sorted(planned), "an order that Slurm would not choose"
    assert [said[rank]["host"] for rank in range(1024)] == planned
    assert {r["master"] for r in said.values()} == {planned[0]}
    assert len({r["port"] for r in said.values()}) == 1
    assert all(r["nic"] == f"ionic_{r['rank'] % 8}" and r["device"] == 0 for r in said.values())
    assert all(r["wrong_environment"] == [] for r in said.values())
    plan = Plan(world_size=1024, pipeline_model_parallel_size=4, expert_model_parallel_size=8)
    groups = derive_groups(plan)
    for kind in ("tp", "cp", "dp", "pp", "ep", "ep_dp"):
        for group in groups[kind].ranks.tolist():
            expected = digest({kind: group})[kind]
            assert all(said[rank]["groups"][kind] == expected for rank in group), (kind, group)


def test_coordinates_agree_with_the_planner():
    layouts = [dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, expert_model_parallel_size=2),
               dict(tensor_model_parallel_size=4, expert_tensor_parallel_size=1, expert_model_parallel_size=8),
               dict(context_parallel_size=2, pipeline_model_parallel_size=4, order="tp-ep-cp-dp-pp")]  # fmt: skip
    for layout in layouts:
        plan = Plan(world_size=32, **layout)
        for kind, found in derive_groups(plan).items():
            if kind in ("tp", "cp", "dp", "pp", "ep", "ep_dp"):
                for group in found.ranks.tolist():
                    assert all(groups_of(rank, 32, plan.model_dump())[kind] == group for rank in group)


# A file per rank: launchers may run the lines of two tasks together.
WHO = (
    "import json, dataclasses, sys; from pathlib import Path; from launch.env import read_rank_env;"
    "c = read_rank_env(); record = json.dumps(dataclasses.asdict(c), default=str);"
    "Path(sys.argv[1], f'{c.rank}.json').write_text(record)"
)


def test_srun_with_pmix_and_mpirun_give_the_same_context(big, tmp_path):
    import shutil

    if not shutil.which("mpirun"):
        pytest.skip("not installed: openmpi-bin (tools/install_apt_packages.sh installs it)")
    first = "from mpi4py import MPI; assert MPI.COMM_WORLD.Get_size() == 4;"
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY), "OMPI_MCA_btl": "self,vader,tcp"}
    environment["OMPI_MCA_orte_tmpdir_base"] = str(
        tmp_path
    )  # else in /tmp by host name and process id, both not unique
    salloc = ["salloc", "-N2", "-n4", "--ntasks-per-node=2", "--time=2", "--gpus-per-node=2"]
    mpirun = ["mpirun", "--allow-run-as-root", "-n", "4", "--map-by", "slot", "-x", "PYTHONPATH"]
    found = []
    for launcher in (["srun", "--mpi=pmix"], mpirun):
        folder = tmp_path / launcher[0]
        folder.mkdir()
        task = [sys.executable, "-c", first + WHO, str(folder)]
        done = big.run([*salloc, *launcher, *task], extra_env=environment, timeout_s=90)
        records = [json.loads(file.read_text()) for file in sorted(folder.iterdir())]
        assert [r["rank"] for r in records] == [0, 1, 2, 3], done.stdout + done.stderr
        found.append(records)
    for record in (*found[0], *found[1]):
        record.pop("supervision")
        assert record.pop("job_labels")["job_partition"] == "main"  # the rest differs: they are two jobs
    assert [r.pop("launcher") for r in found[0]] == ["srun"] * 4
    assert [r.pop("launcher") for r in found[1]] == ["mpi"] * 4
    ports = {r.pop("master_port") for r in found[0]}, {r.pop("master_port") for r in found[1]}
    assert len(ports[0]) == len(ports[1]) == 1, "each job has its own port"
    assert found[0] == found[1]
    assert found[0][3]["hosts"] == ["zaya000", "zaya001"] and found[0][3]["local_rank"] == 1


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"slurm": {"partition": "gone"}}, [], "Its partitions are: main (slurm.partition in the site file)"),
        ({"slurm": {"gpus_per_node": 9}, "ranks_per_node": 8}, [], "It has: 128 nodes of 16 CPUs, gpu:8"),
        ({"container": {"launcher": "apptainer", "image": "/images/zaya.sif"}}, [], "/images/zaya.sif: no such file"),
        ({"container": {"launcher": "pyxis"}}, [], "give both, or neither"),
        ({"slurm": {"partitoin": "main"}}, [], "did you mean 'partition'?"),
        ({}, ["--nodes", "64"], "--nodes 64, but the plan's world of 1024 ranks needs 128 nodes"),
        ({}, ["--spares", "1"], "1 spares are wanted"),
        ({}, ["--plan", "none.yaml"], "plan none.yaml: No such file"),
        ({}, ["--drill", "crash:rank=x"], "drill 'crash:rank=x'"),
        ({}, ["parallel.tensor_model_parallel_size=3"], "is not divided by"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_submitted(big, run_folder, change, arguments, message):
    site = yaml.safe_load((run_folder / "site.yaml").read_text())
    for key, value in change.items():
        site[key] = {**site.get(key, {}), **value} if isinstance(value, dict) else value
    (run_folder / "site.yaml").write_text(yaml.safe_dump(site))
    command = ["submit", "run.yaml", "--site", "site.yaml", "--plan", "plan.yaml", "--rehearse", *arguments]
    done = zaya(big, run_folder, *command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert (done.stderr.count("zaya: "), "Traceback" in done.stderr) == (1, False)
    assert big.run(["squeue", "-h"]).stdout == ""


# Found by every Python of a task: torch must not be reached, and the clock of one node is half a minute ahead.
NO_TORCH = "raise RuntimeError('torch was imported: that is time on an accelerator')"
CLOCK = """import os, time
real = time.time
if os.environ.get("SLURMD_NODENAME") == "zaya001":
    time.time = lambda: real() + 30
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": "no-such-host.invalid"}, "cannot resolve 'no-such-host.invalid', the host of rank 0"),
        ({"MASTER_PORT": "{port}"}, "port {port} on zaya000 (rank 0) is in use"),
        ({"PYTHONPATH": "{folder}/ahead:{folder}:{code}"}, "the clock of zaya001 (rank 1) is "),
        ({"NCCL_IB_HCA": None}, "NCCL_IB_HCA is 'ionic_0' on 1 of 2 ranks, but 'ionic_1' on zaya001 (rank 1)"),
    ],
    ids=["unreachable host", "port in use", "clock skew", "another environment"],
)
def test_nodes_that_cannot_work_together_say_so_before_torch_is_imported(big, run_folder, change, message):
    (run_folder / "torch.py").write_text(NO_TORCH)
    (run_folder / "ahead").mkdir()
    (run_folder / "ahead/sitecustomize.py").write_text(CLOCK)
    with socket.create_server(("", 0)) as taken:
        names = {"port": taken.getsockname()[1], "folder": run_folder, "code": REPOSITORY}
        given = {name: value.format(**names) for name, value in change.items() if value}
        environment = ENVIRONMENT | {"PYTHONPATH": f"{run_folder}:{REPOSITORY}"} | given
        uneven = "export NCCL_IB_HCA=ionic_$SLURM_NODEID; " if "NCCL_IB_HCA" in change else ""
        task = f"{uneven}exec {sys.executable} -m megatron_zaya.pretrain run.yaml schedule.global_batch_size=2"
        options = ["--nodes=2", "--ntasks-per-node=1", "--time=2", "--nodelist=zaya000,zaya001", "--kill-on-bad-exit=1"]
        srun = ["srun", *options, "bash", "-c", task]
        done = big.run(srun, cwd=run_folder, extra_env=environment, check=False, timeout_s=90)
    assert done.returncode != 0
    assert message.format(**names) in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RUN_FILE": "none.yaml"}, "zaya: none.yaml: no such run file"),
        ({"SITE": "site.yaml"}, "container.image /images/zaya.sif: no such file; build it (docs/containers.md)"),
        ({"ZAYA": "/nowhere/zaya"}, "/nowhere/zaya: No such file"),
    ],
)
def test_pretrain_by_plain_sbatch_refuses_what_is_not_there(big, run_folder, environment, message):
    image = {"container": {"launcher": "apptainer", "image": "/images/zaya.sif"}}
    (run_folder / "site.yaml").write_text(yaml.safe_dump(image))
    command = ["sbatch", "--wait", f"--output={run_folder}/out", str(REPOSITORY / "slurm/pretrain.sbatch")]
    given = ENVIRONMENT | {"RUN_FILE": "run.yaml", "NPROC": "1"} | environment
    done = big.run(command, cwd=run_folder, extra_env=given, check=False, timeout_s=90)
    said = (run_folder / "out").read_text()
    assert done.returncode in (2, 127), said
    assert message in said and "Traceback" not in said
