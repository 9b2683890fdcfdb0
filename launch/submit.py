"""`zaya submit`: from a run file to a self-contained launch folder, and to Slurm.

The folder (`<run folder>/launch`) holds what the job needs and why: config.yaml (resolved), plan.yaml, hostfile,
environment.sh with reasons, job.json for the supervisor, job.sbatch, code.json with the revision. Everything that can
be known to be wrong is refused here, before a node is asked for.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml

from launch.containers import Wrapping, check_image, wrap
from launch.errors import LaunchError
from launch.plan_file import read_plan
from launch.site import Site, load_site
from launch.supervise.job import Job
from megatron_zaya.config import RunConfig, dump_config, load_config
from topology.emit.environment import Variable
from topology.hostlist import compress

CODE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    run_file: Path
    overrides: list[str] = field(default_factory=list)
    plan_file: Path | None = None
    site_file: Path | None = None
    nodes: int | None = None
    spares: int = 0
    ranks_per_node: int | None = None
    rehearse: bool = False
    drill: str = ""
    local: bool = False
    allocated: list[str] = field(default_factory=list)
    """Nodes that are there already (inside an allocation); empty when Slurm is still to be asked."""


@dataclass(frozen=True)
class Submission:
    """Everything of a launch folder, not yet written."""

    name: str
    folder: Path
    files: dict[str, str]
    job: Job
    hosts: list[str]
    """Planned order with spares; empty where any nodes will do."""

    def write(self) -> None:
        """Write the folder; what a former submission wrote is replaced, what the run wrote stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        self.job.write()

    def show(self) -> str:
        """All files, for --dry-run; the shared secret is left out."""
        return "".join(f"==> {self.folder / name} <==\n{text.rstrip()}\n\n" for name, text in self.files.items())


def prepare(request: Request) -> Submission:
    """Check the request and render its launch folder. Nothing is written.

    Raises:
        ConfigError, DataError: the run file cannot work.
        LaunchError: site, plan, image or sizes cannot work.
        TopologyError: the fabric cannot carry the layout.
    """
    from megatron_zaya.preconditions import check_run

    site = load_site(request.site_file)
    overrides, world_size = read_plan(request.plan_file) if request.plan_file else ([], None)
    config = load_config(request.run_file, [*overrides, *request.overrides])
    per_node = request.ranks_per_node or site.ranks
    nodes = _nodes(request, world_size, per_node)
    check_run(config, nodes * per_node)
    if not request.local:
        check_image(site.container)
    _check_drill(request.drill)

    folder = (config.run_dir / "launch").resolve()
    workdir = Path.cwd()
    placed = _place(request, site, config, nodes, per_node)
    variables = [*placed.variables, *_site_variables(site)]
    environment = {variable.name: variable.value for variable in variables}
    folders = [folder.parents[1] if folder.parents[1].exists() else folder.parent, CODE]
    wrapping = Wrapping([], []) if request.local else wrap(site.container, workdir, folders)
    python = sys.executable if request.local else site.python
    job = Job(
        name=config.run.name,
        folder=folder,
        workdir=workdir,
        nodes=nodes,
        ranks_per_node=per_node,
        command=[python, "-m", "megatron_zaya.pretrain", str(folder / "config.yaml")],
        agent_command=[*wrapping.prefix, python, "-m", "launch.supervise.agent"],
        srun_options=wrapping.srun_options,
        environment=environment,
        hosts=placed.hosts,
        preflight_command=_preflight(site, python, folder),
        drill=request.drill,
        token=secrets.token_hex(16),
        policy=site.supervise,
    )
    files = {
        "config.yaml": dump_config(config),
        "plan.yaml": yaml.safe_dump(placed.plan, sort_keys=False),
        "environment.sh": _template("environment.sh.j2").render(name=config.run.name, variables=variables),
        "code.json": json.dumps(code_revision(), indent=1) + "\n",
    }
    if placed.hosts:
        files["hostfile"] = "".join(f"{host}\n" for host in placed.hosts[:nodes] for _ in range(per_node))
    if site.preflight is not None:
        files["limits.json"] = site.preflight.model_dump_json(indent=1) + "\n"
    if request.rehearse:
        files["rehearsal.json"] = _rehearsal(job, placed, site)
    files["job.sbatch"] = _batch_script(request, site, job, wrapping)
    return Submission(config.run.name, folder, files, job, placed.hosts)


def _nodes(request: Request, world_size: int | None, per_node: int) -> int:
    """Nodes that train: asked for, of the plan, or of the allocation."""
    if world_size is not None and world_size % per_node:
        raise LaunchError(
            f"plan {request.plan_file}: world_size={world_size} is not divided by {per_node} ranks per node"
        )
    planned = world_size // per_node if world_size else None
    if request.nodes and planned and request.nodes != planned:
        raise LaunchError(f"--nodes {request.nodes}, but the plan's world of {world_size} ranks needs {planned} nodes")
    nodes = request.nodes or planned
    if request.allocated:
        left = len(request.allocated) - request.spares
        if nodes is not None and nodes > left:
            raise LaunchError(
                f"{nodes} nodes and {request.spares} spares are wanted, the allocation has {len(request.allocated)}: "
                f"sbatch --nodes={nodes + request.spares}"
            )
        nodes = nodes or left
    return max(1, nodes or 1)


def _check_drill(text: str) -> None:
    from megatron_zaya.config.drill import parse_drills

    parse_drills(text)


@dataclass(frozen=True)
class _Placed:
    plan: dict[str, Any]
    hosts: list[str]
    variables: list[Variable]


def _place(request: Request, site: Site, config: RunConfig, nodes: int, per_node: int) -> _Placed:
    """Let the topology planner choose and order nodes and say the environment, where the site describes its fabric."""
    layout = {k: v for k, v in config.parallel.model_dump().items() if v is not None}
    plan = {"world_size": nodes * per_node, **layout}
    if site.cluster is None or request.local:
        return _Placed(plan, sorted(request.allocated), [])
    from topology.build import load_fabric
    from topology.emit.environment import environment
    from topology.place import place
    from topology.plan import Plan

    fabric = load_fabric(Path(site.cluster))
    if fabric.gpus_per_node != per_node:
        raise LaunchError(f"{per_node} ranks per node, but {site.cluster} says {fabric.gpus_per_node} GPUs per node")
    fields = {key: value for key, value in plan.items() if key in Plan.model_fields}
    topology_plan = Plan.model_validate(fields | {"workload": _workload(config)})
    avoid = tuple(sorted(set(fabric.node_names) - set(request.allocated))) if request.allocated else ()
    placement = place(fabric, topology_plan, avoid=avoid)
    spares = [fabric.node_names[number] for number in placement.spares][: request.spares]
    if len(spares) < request.spares:
        raise LaunchError(f"{request.spares} spares are wanted, {site.cluster} has {len(spares)} healthy nodes left")
    return _Placed(plan, placement.hosts + spares, environment(fabric, placement.verdicts))


def _workload(config: RunConfig) -> dict[str, Any]:
    model, schedule = config.model, config.schedule
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "num_moe_experts": model.num_moe_experts,
        "seq_length": config.data.seq_length,
        "micro_batch_size": schedule.micro_batch_size,
        "global_batch_size": schedule.global_batch_size,
    }


def _site_variables(site: Site) -> list[Variable]:
    """Variables of the site file; they come last and win."""
    found = []
    if site.network.interface:
        reason = "the management network of this site"
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            found.append(Variable(name, site.network.interface, reason, "site file, network.interface", "", ""))
    if site.network.nics and site.cluster is None:
        nics = "=" + ",".join(site.network.nics)
        found.append(Variable("NCCL_IB_HCA", nics, "the NICs in rail order", "site file, network.nics", "", ""))
    for name, value in site.environment.items():
        found.append(Variable(name, value, "wanted by this site", "site file, environment", "", ""))
    return found


def _preflight(site: Site, python: str, folder: Path) -> list[str]:
    if site.preflight is None:
        return []
    return [
        python,
        "-m",
        "launch.preflight.node",
        "--limits",
        str(folder / "limits.json"),
        "--out",
        str(folder / "preflight"),
    ]


def _rehearsal(job: Job, placed: _Placed, site: Site) -> str:
    record = {
        "world_size": job.world_size,
        "ranks_per_node": job.ranks_per_node,
        "hosts": placed.hosts[: job.nodes],
        "environment": job.environment,
        "nics": job.environment.get("NCCL_IB_HCA", "").lstrip("=").split(",")
        if "NCCL_IB_HCA" in job.environment
        else [],
        "plan": placed.plan,
    }
    return json.dumps(record, indent=1) + "\n"


def code_revision() -> dict[str, Any]:
    """Return the revision of this code, whether it differs from it, and the versions that matter."""
    from importlib.metadata import version

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(CODE), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    revision = git("rev-parse", "HEAD") if (CODE / ".git").exists() and shutil.which("git") else ""
    return {
        "revision": revision or "not a checkout",
        "changed_files": git("status", "--porcelain").splitlines() if revision else [],
        "version": version("megatron-zaya"),
        "code": str(CODE),
    }


# -- rendering ---------------------------------------------------------------------------------------------------------


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment.get_template(name)


def _options(site: Site) -> list[str]:
    """The site's options of sbatch, in a fixed order."""
    slurm = site.slurm
    named = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "constraint": slurm.constraint,
        "time": slurm.time,
        "gpus-per-node": slurm.gpus_per_node or None,
    }
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    return options + (["--exclusive"] if slurm.exclusive else []) + slurm.extra


def _batch_script(request: Request, site: Site, job: Job, wrapping: Wrapping) -> str:
    tasks = job.ranks_per_node if request.rehearse else 1
    options = _options(site)
    if site.slurm.cpus_per_node:
        options.append(f"--cpus-per-task={max(1, site.slurm.cpus_per_node // tasks)}")
    return _template("job.sbatch.j2").render(
        name=job.name,
        nodes=job.nodes + (0 if request.rehearse else request.spares),
        tasks_per_node=tasks,
        options=options,
        folder=str(job.folder),
        workdir=str(job.workdir),
        code=str(CODE),
        setup=site.setup,
        rehearse=request.rehearse,
        hostfile=bool(job.hosts),
        world_size=job.world_size,
        rank_command=shlex.join([*wrapping.srun_options, *wrapping.prefix, site.python, "-m", "launch.rehearse"]),
        host_python=site.host_python or site.python,
        signal_before_end_s=site.slurm.signal_before_end_s,
    )


# -- submitting --------------------------------------------------------------------------------------------------------


def submit(submission: Submission) -> str:
    """Hand the written folder to Slurm; return the job id.

    Raises:
        LaunchError: Slurm is not there or refuses, with what it has to offer.
    """
    if not shutil.which("sbatch"):
        raise LaunchError("sbatch is not on PATH: submit from a login node of the cluster, or run here with --local")
    command = ["sbatch", "--parsable"]
    if submission.hosts:
        command.append(f"--nodelist={compress(submission.hosts)}")
    script = str(submission.folder / "job.sbatch")
    environment = {k: v for k, v in os.environ.items() if not re.match(r"(SLURM|SBATCH|SRUN)_", k) or k == "SLURM_CONF"}
    for extra in (["--test-only"], []):
        done = subprocess.run([*command, *extra, script], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise LaunchError(f"Slurm refuses the job: {_complaint(done.stderr)}{_offer(done.stderr, environment)}")
    return done.stdout.strip().split(";")[0]


def _complaint(text: str) -> str:
    lines = [line.split("error: ")[-1].strip() for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or "no reason given"


def _offer(complaint: str, environment: dict[str, str]) -> str:
    """What the cluster has, when the complaint is about what it has not."""
    if "partition" in complaint:
        names = subprocess.run(
            ["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, env=environment
        ).stdout.split()
        return f". Its partitions are: {', '.join(sorted(names))} (slurm.partition in the site file)"
    if "onfiguration" in complaint or "node" in complaint.lower():
        shape = subprocess.run(
            ["sinfo", "-h", "-o", "%D nodes of %c CPUs, %G"], capture_output=True, text=True, env=environment
        )
        return f". It has: {'; '.join(shape.stdout.splitlines())}"
    return ""


def describe(submission: Submission) -> dict[str, Any]:
    """What was rendered, as data, for --json."""
    job = asdict(submission.job) | {
        "token": "",
        "folder": str(submission.folder),
        "workdir": str(submission.job.workdir),
    }
    return {"job": job, "files": submission.files}
