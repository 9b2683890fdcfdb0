"""`zaya submit` renders what it always rendered: golden batch scripts, and everything else of a launch folder."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch.errors import LaunchError
from launch.plan_file import read_plan
from launch.site import load_site
from launch.submit import CODE, Request, prepare
from launch.supervise.job import Job, Policy, read_job
from megatron_zaya.config import load_config
from tests.launch.conftest import BIN, ENVIRONMENT, REPOSITORY

GOLDEN = Path(__file__).parent / "golden"
SITES = sorted(path.stem for path in (REPOSITORY / "slurm/sites").glob("*.yaml"))


@pytest.fixture
def request_for(workdir, monkeypatch):
    """A request in the module's folder for one of the shipped sites; images are not looked for."""
    monkeypatch.chdir(workdir)
    monkeypatch.setattr("launch.submit.check_image", lambda container: None)

    def make(site: str, **changes) -> Request:
        request = Request(
            Path("run.yaml"),
            ["schedule.global_batch_size=64"],
            site_file=REPOSITORY / f"slurm/sites/{site}.yaml",
            nodes=2,
        )
        return replace(request, **changes)

    return make


def normal(text: str, workdir: Path) -> str:
    """The parts of a rendered file that differ between machines, named."""
    return text.replace(str(workdir.resolve()), "@WORK@").replace(str(CODE), "@CODE@")


@pytest.mark.parametrize("site", SITES)
def test_batch_scripts_and_agents_are_golden(request_for, workdir, site):
    """Set UPDATE_GOLDEN=1 to write the files anew, then read the difference."""
    submission = prepare(request_for(site, spares=1))
    start = " ".join(["srun", *submission.job.srun_options, *submission.job.agent_command])
    found = normal(submission.files["job.sbatch"] + f"\n# agents: {start}\n", workdir)
    path = GOLDEN / f"{site}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text()
    checked = subprocess.run([str(BIN / "shellcheck"), "-"], input=submission.files["job.sbatch"], text=True)
    assert checked.returncode == 0


def test_the_folder_says_everything(request_for, workdir):
    submission = prepare(request_for("mi300x_rails", spares=2))
    submission.write()
    folder = workdir / "runs/tiny/launch"
    assert load_config(folder / "config.yaml").schedule.global_batch_size == 64
    assert yaml.safe_load((folder / "plan.yaml").read_text())["world_size"] == 16
    hosts = (folder / "hostfile").read_text().splitlines()
    assert len(hosts) == 16 and hosts[0] == hosts[7] != hosts[8]
    assert len(submission.hosts) == 4, "two that train, two spares"
    job = read_job(folder)
    assert job == replace(submission.job, hosts=submission.hosts)
    assert job.preflight_command[-3].endswith("limits.json")
    code = json.loads((folder / "code.json").read_text())
    assert code["version"] and code["code"] == str(CODE)
    script = f"set -a; source {folder}/environment.sh; echo $NCCL_IB_HCA $HSA_NO_SCRATCH_RECLAIM"
    shown = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout.split()
    assert shown == ["=" + ",".join(f"ionic_{n}" for n in range(8)), "1"]
    text = (folder / "environment.sh").read_text()
    assert text.count("# ") >= 2 * text.count("export "), "a reason and a source each"


def test_a_dry_run_writes_nothing(workdir):
    before = {path: path.stat().st_mtime for path in workdir.rglob("*")}
    command = [str(BIN / "zaya"), "submit", "run.yaml", "run.name=dry", "--nodes", "2", "--dry-run"]
    done = subprocess.run(command, cwd=workdir, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    for name in ("config.yaml", "plan.yaml", "environment.sh", "job.sbatch", "code.json"):
        assert f"launch/{name} <==" in done.stdout
    assert {path: path.stat().st_mtime for path in workdir.rglob("*")} == before


def test_a_run_file_that_is_not_there(workdir):
    command = [str(BIN / "zaya"), "submit", "none.yaml", "--nodes", "2"]
    done = subprocess.run(command, cwd=workdir, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert (done.returncode, "none.yaml: no such run file" in done.stderr) == (2, True)


def test_plans_of_both_shapes(tmp_path):
    flat, nested = tmp_path / "flat.yaml", tmp_path / "nested.yaml"
    flat.write_text("nodes: 4\ngpus: 8\npipeline_model_parallel_size: 2\norder: tp-cp-ep-dp-pp\n")
    nested.write_text("world_size: 32\nparallel: {pipeline_model_parallel_size: 2}\nschedule: {micro_batch_size: 4}\n")
    assert read_plan(flat) == (["parallel.pipeline_model_parallel_size=2"], 32)
    overrides = ["parallel.pipeline_model_parallel_size=2", "schedule.micro_batch_size=4"]
    assert read_plan(nested) == (overrides, 32)
    flat.write_text("pipeline_paralel: 2\n")
    with pytest.raises(LaunchError, match="'pipeline_paralel' is neither a section"):
        read_plan(flat)


def test_a_job_of_another_version_is_refused(tmp_path):
    job = Job("x", tmp_path, tmp_path, 1, 1, ["true"], ["true"], policy=Policy(hang_timeout_s=5))
    job.write()
    assert read_job(tmp_path) == job
    (tmp_path / "job.json").write_text('{"policy": {"patience": 3}}')
    with pytest.raises(LaunchError, match="not a job of this version"):
        read_job(tmp_path)
    with pytest.raises(LaunchError, match="`zaya submit` writes it"):
        read_job(tmp_path / "nowhere")


def test_a_site_that_is_wrong_is_explained(tmp_path):
    path = tmp_path / "site.yaml"
    for text, message in [("supervise: {hang_timeout: 3}", "supervise.hang_timeout"), ("a: [", "not valid YAML")]:
        path.write_text(text)
        with pytest.raises(LaunchError, match=message):
            load_site(path)
    with pytest.raises(LaunchError, match="no such site file"):
        load_site(tmp_path / "none.yaml")
