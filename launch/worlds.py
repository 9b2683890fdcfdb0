"""The three launchers that `launch.env` understands, one function each; None when the launcher is another one.

Invariant: the ranks of a node are consecutive and every node has equally many, or LaunchError. Nothing here falls back
to localhost. Standard library only; mpi4py is imported in a world that MPI started.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.env import RankContext, Supervision
from launch.errors import LaunchError
from launch.ports import job_port, own_ports
from topology.hostlist import expand

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
START = "start ranks with `zaya train --nproc N`, or with `zaya submit`"


def supervision(environ: Mapping[str, str]) -> Supervision:
    """Read what the agent of this node asks for."""

    def path(name: str) -> Path | None:
        return Path(environ[name]) if environ.get(name) else None

    return Supervision(
        heartbeat_file=path("ZAYA_HEARTBEAT_FILE"),
        stacks_file=path("ZAYA_STACKS_FILE"),
        attempt=int(environ.get("ZAYA_ATTEMPT", "0")),
        causes=tuple(filter(None, environ.get("ZAYA_CAUSES", "").split(","))),
        drill=environ.get("ZAYA_DRILL", ""),
    )


JOB_VARIABLES = {
    "job_id": "SLURM_JOB_ID",
    "job_user": "SLURM_JOB_USER",
    "job_partition": "SLURM_JOB_PARTITION",
    "cluster_name": "SLURM_CLUSTER_NAME",
}


def job_labels(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what tells this job from others, empty where no scheduler says; the host always."""
    labels = {label: environ.get(name, "") for label, name in JOB_VARIABLES.items()}
    return labels | {"hostname": environ.get("SLURMD_NODENAME") or socket.gethostname()}


def _integers(environ: Mapping[str, str], names: Sequence[str], start: str = START) -> list[int]:
    given = [name for name in names if environ.get(name)]
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise LaunchError(f"{', '.join(given)} set, but not {', '.join(missing)}: {start}")
    try:
        return [int(environ[name]) for name in names]
    except ValueError:
        seen = ", ".join(f"{name}={environ[name]!r}" for name in names)
        raise LaunchError(f"{seen}: integers are needed") from None


def _world(
    environ: Mapping[str, str], launcher: str, numbers: Sequence[int], hosts: Sequence[str], port: int
) -> RankContext:
    """Return the context of one rank, if it is possible.

    Args:
        environ: the variables; MASTER_ADDR, where set, is the host of rank 0, else the first of ``hosts``.
        launcher: who started the rank.
        numbers: rank, world size, local rank, local world size.
        hosts: nodes in rank order; empty where nobody says.
        port: the meeting point; 0 where there is none.
    """
    rank, size, local, local_size = numbers
    context = RankContext(
        rank,
        size,
        local,
        local_size,
        hosts=tuple(hosts),
        master_addr=environ.get("MASTER_ADDR") or next(iter(hosts), ""),
        master_port=port,
        launcher=launcher,
        supervision=supervision(environ),
    )
    if not (0 <= rank < size and 0 <= local < local_size <= size):
        raise LaunchError(f"rank {rank} of {size}, local rank {local} of {local_size}: not a possible world")
    if size % local_size or rank % local_size != local:
        raise LaunchError(
            f"rank {rank} of {size} is local rank {local} of {local_size}: the ranks of a node must be consecutive and "
            "every node must have equally many; use block distribution (srun --ntasks-per-node=N, mpirun --map-by slot)"
        )
    if hosts and len(hosts) != context.nodes:
        raise LaunchError(f"{context.nodes} nodes of {local_size} ranks, but {len(hosts)} hosts: {' '.join(hosts)}")
    return context


def read_hostfile(path: Path) -> list[str]:
    """Return the hosts of a hostfile, one per task or one per node, in rank order.

    Raises:
        LaunchError: there is no such file, or it is empty.
    """
    try:
        hosts = [
            line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.split("#")[0].strip()
        ]
    except OSError as error:
        raise LaunchError(
            f"hostfile {path}: {error.strerror}; it must be on a file system that every node sees"
        ) from None
    if not hosts:
        raise LaunchError(f"hostfile {path} names no host")
    return hosts


def from_torchrun(environ: Mapping[str, str]) -> RankContext | None:
    """Read the variables of torchrun, which our agents set as well."""
    if not any(name in environ for name in TORCHRUN):
        return None
    numbers = _integers(environ, TORCHRUN)
    if numbers[1] > 1 and not (environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")):
        raise LaunchError(f"{numbers[1]} ranks, but MASTER_ADDR or MASTER_PORT is not set: no meeting point")
    hosts = list(dict.fromkeys(read_hostfile(Path(environ["ZAYA_HOSTFILE"])))) if environ.get("ZAYA_HOSTFILE") else []
    launcher = "agent" if environ.get("ZAYA_HEARTBEAT_FILE") else "torchrun"
    return _world(environ, launcher, numbers, hosts, _port(environ))


def _port(environ: Mapping[str, str]) -> int:
    """MASTER_PORT if set, else the port of the Slurm job, else 0."""
    text = environ.get("MASTER_PORT", "")
    if text:
        if not text.isdigit() or not 0 < int(text) < 65535:
            raise LaunchError(f"MASTER_PORT={text!r} is not a port (1 to 65534)")
        return int(text)
    job = environ.get("SLURM_JOB_ID", "")
    return job_port(int(job)) if job.isdigit() else 0


def from_srun(environ: Mapping[str, str]) -> RankContext | None:
    """Read the variables of a task of srun. SLURM_HOSTFILE, where set, is the order of the ranks.

    SLURM_NODEID follows the sorted names, whatever the hostfile says; so neither it nor the first name of the node
    list says where rank 0 is.
    """
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_JOB_ID" in environ:
            raise LaunchError(
                f"this is the batch shell of job {environ['SLURM_JOB_ID']} with {environ['SLURM_NTASKS']} tasks, not "
                "one of them: start the ranks with srun"
            )
        return None
    start = "these come with srun; pass the environment on (no --export=NONE, no `env -i`)"
    size_name = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    rank, world_size, local_rank = _integers(environ, ("SLURM_PROCID", size_name, "SLURM_LOCALID"), start)
    if world_size == 1:
        return RankContext(launcher="srun", supervision=supervision(environ))
    node_list = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if not node_list:
        raise LaunchError(f"{world_size} ranks, but SLURM_STEP_NODELIST is not set: {start}")
    hosts = expand(node_list, "SLURM_STEP_NODELIST")
    if environ.get("SLURM_HOSTFILE"):
        hosts = _order_from_hostfile(Path(environ["SLURM_HOSTFILE"]), hosts, rank, world_size, environ)
    if world_size % len(hosts):
        raise LaunchError(
            f"{world_size} tasks on {len(hosts)} nodes: give --ntasks-per-node, all nodes need equally many"
        )
    return _world(environ, "srun", (rank, world_size, local_rank, world_size // len(hosts)), hosts, _port(environ))


def _order_from_hostfile(
    path: Path, allocated: list[str], rank: int, world_size: int, environ: Mapping[str, str]
) -> list[str]:
    lines = read_hostfile(path)
    order = list(dict.fromkeys(lines))
    if set(order) != set(allocated):
        strangers = sorted(set(order) ^ set(allocated))
        raise LaunchError(f"hostfile {path} and the step's nodes differ in {', '.join(strangers)}")
    if len(lines) not in (world_size, len(order)):
        raise LaunchError(f"hostfile {path} has {len(lines)} lines for {world_size} tasks on {len(order)} nodes")
    per_node = world_size // len(order)
    own, wanted = environ.get("SLURMD_NODENAME", ""), order[min(rank // per_node, len(order) - 1)]
    if own and own != wanted:
        raise LaunchError(
            f"rank {rank} runs on {own}, hostfile {path} wants it on {wanted}: start with "
            "`srun --distribution=arbitrary` and the same SLURM_HOSTFILE"
        )
    return order


def from_mpi(environ: Mapping[str, str]) -> RankContext | None:
    """Read the variables of OpenMPI or MPICH; hosts come from all ranks, through mpi4py. Collective."""
    names = next((names for names in MPI if names[0] in environ), None)
    # srun --mpi=pmi2 sets PMI_RANK too, but not what mpiexec adds: then Slurm's variables are the ones to read.
    if names is None or ("SLURM_STEP_ID" in environ and names[2] not in environ):
        return None
    numbers = _integers(environ, names, "they come with mpirun")
    if numbers[1] == 1:
        return RankContext(launcher="mpi", supervision=supervision(environ))
    hosts, port = _exchange_hosts(numbers[0], numbers[1], _port(environ))
    return _world(environ, "mpi", numbers, hosts, port)


def _exchange_hosts(rank: int, world_size: int, port: int) -> tuple[tuple[str, ...], int]:
    try:
        from mpi4py import MPI as mpi  # noqa: N811
    except ImportError as error:
        raise LaunchError(
            f"started by MPI ({world_size} ranks), but mpi4py cannot be imported ({error}): install it against this MPI"
        ) from None
    world = mpi.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (rank, world_size):
        raise LaunchError(
            f"the environment says rank {rank} of {world_size}, mpi4py says {world.Get_rank()} of {world.Get_size()}: "
            "mpi4py was built against another MPI than mpirun's"
        )
    if not port:
        port = world.bcast(own_ports(2) if rank == 0 else 0)
    names = world.allgather(re.split(r"\.", socket.gethostname())[0])
    return tuple(dict.fromkeys(names)), port
