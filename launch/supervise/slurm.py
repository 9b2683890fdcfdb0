"""The few words the controller exchanges with Slurm: which nodes it has, start agents, requeue without bad nodes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence

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


def _ignore_sigterm() -> None:
    """In the child: a requeue ends this batch shell and all it started, but not before Slurm has heard everything."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


async def _run(*command: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, preexec_fn=_ignore_sigterm
    )
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode(errors="replace").strip()


async def requeue(job_id: str, excluded: Sequence[str] = ()) -> str:
    """Put this very job back into the queue, never again on the ``excluded`` nodes; return Slurm's complaint, if any.

    Only a waiting job can be told which nodes to avoid, so it is held meanwhile: should Slurm refuse the list, the job
    stays held for the operator instead of starting on the bad node again.
    """
    if not excluded:
        status, said = await _run("scontrol", "requeue", job_id)
        return said if status else ""
    _, known = await _run("squeue", "--noheader", f"--jobs={job_id}", "--format=%x")
    avoid = sorted({*excluded, *(expand(known, "squeue") if known not in ("", "(null)") else ())})
    for command in (
        ("requeuehold", job_id),
        # The wished-for nodes are no longer all to be had: any others will do.
        ("update", f"JobId={job_id}", "ReqNodeList=", f"ExcNodeList={compress(avoid)}"),
        ("release", job_id),
    ):
        status, said = await _run("scontrol", *command)
        if status:
            return f"scontrol {' '.join(command)}: {said}"
    return ""
