"""The few words the controller exchanges with Slurm: which nodes it has, start agents, requeue, ask for other nodes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.errors import LaunchError
from launch.supervise.job import Job
from topology.hostlist import compress, expand


def allocated_hosts(environ: Mapping[str, str] | None = None) -> list[str]:
    """Nodes of the allocation, sorted as Slurm sorts them; empty outside of one."""
    environ = os.environ if environ is None else environ
    node_list = environ.get("SLURM_JOB_NODELIST", "")
    return expand(node_list, "SLURM_JOB_NODELIST") if node_list else []


def agents_command(job: Job, controller: str, nodes: int) -> list[str]:
    """The srun that starts one agent per node and outlives the death of a node.

    Memory and cores are the whole node's: agents start the ranks, and ranks bind themselves.
    """
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--no-kill", "--kill-on-bad-exit=0"]
    options += ["--wait=0", "--overlap", "--cpu-bind=none", "--mem=0", "--export=ALL"]
    cpus = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if cpus.isdigit():
        options.append(f"--cpus-per-task={cpus}")
    return [
        "srun",
        *options,
        *job.srun_options,
        *job.agent_command,
        "--controller",
        controller,
        "--job",
        str(job.folder),
    ]


def allocation(environ: Mapping[str, str] | None = None) -> list[str]:
    """Nodes of the allocation that this shell is in.

    Raises:
        LaunchError: it is in none.
    """
    hosts = allocated_hosts(environ)
    if not hosts:
        raise LaunchError(
            "SLURM_JOB_NODELIST is not set: this shell is in no allocation; use sbatch, salloc or --local"
        )
    return hosts


async def _run(*command: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode(errors="replace").strip()


async def requeue(job_id: str) -> str:
    """Put this very job back into the queue; return Slurm's complaint, if any."""
    status, said = await _run("scontrol", "requeue", job_id)
    return said if status else ""


async def resubmit(folder: Path, excluded: Sequence[str]) -> tuple[str, str]:
    """Submit the job anew without the bad nodes, to start when this one has ended; return (job id, complaint)."""
    command = ["sbatch", "--parsable", f"--dependency=afterany:{os.environ['SLURM_JOB_ID']}"]
    if excluded:
        command.append(f"--exclude={compress(excluded)}")
    status, said = await _run(*command, str(folder / "job.sbatch"))
    return ("", said) if status else (said.split(";")[0].splitlines()[-1], "")
