"""Who is this process: the one place that reads rank and world from the environment of a launcher.

Three worlds give one `RankContext`: ranks started by torchrun or by our own agents (RANK, WORLD_SIZE, ...), tasks of
srun (SLURM_*), and MPI processes (OpenMPI's or MPICH's variables; hosts are exchanged through mpi4py). Without any of
them a process is a world of its own. Standard library only, so that a mistake costs no import of torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch import devices
from launch.errors import LaunchError
from launch.ports import AGREEMENT, MEETING


@dataclass(frozen=True)
class Supervision:
    """What the agent of this node asks of a rank that it started."""

    heartbeat_file: Path | None = None
    stacks_file: Path | None = None
    """Where SIGUSR2 makes the rank write the stacks of all its threads."""
    attempt: int = 0
    causes: tuple[str, ...] = ()
    """Why each earlier attempt ended: categories of incidents, or "requeue"."""
    drill: str = ""
    """Faults to rehearse, see `megatron_zaya/config/drill.py`."""


@dataclass(frozen=True)
class RankContext:
    """Identity and place of one process of the job. Equal whatever launcher started it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    hosts: tuple[str, ...] = ()
    """Nodes in rank order: host n carries ranks n * local_world_size and following. Empty where nobody says."""
    master_addr: str = ""
    """Host of rank 0; empty in a world of one."""
    master_port: int = 0
    device_index: int = 0
    """Index among the devices that this process sees."""
    cpus: tuple[int, ...] | None = None
    """Cores near the device; None leaves the binding as it is."""
    job_labels: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The job as Slurm names it and the host of this rank, under the names of AMD's device metrics exporter."""
    launcher: str = field(default="none", compare=False)
    supervision: Supervision = field(default=Supervision(), compare=False)

    @property
    def is_single(self) -> bool:
        """True for a world of one process, which needs no rendezvous."""
        return self.world_size == 1

    @property
    def node_rank(self) -> int:
        """Position of this node in the order of the ranks."""
        return self.rank // self.local_world_size

    @property
    def nodes(self) -> int:
        """Nodes in the world."""
        return -(-self.world_size // self.local_world_size)

    @property
    def agreement_port(self) -> int:
        """Port on which rank 0 compares the nodes before anything else."""
        return self.master_port + AGREEMENT - MEETING

    def host_of(self, rank: int) -> str:
        """Name of the node of ``rank``, or its number where names are not known."""
        node = rank // self.local_world_size
        return self.hosts[node] if node < len(self.hosts) else f"node {node}"

    def bind(self) -> None:
        """Join the rendezvous variables and device lists into this process' environment, and bind it to its cores."""
        if not self.is_single:
            os.environ.update(MASTER_ADDR=self.master_addr, MASTER_PORT=str(self.master_port))
        for name, value in devices.repaired_environment(os.environ, devices.is_rocm()).items():
            if value is None:
                del os.environ[name]
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)


def read_rank_env(environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> RankContext:
    """Read the world that a launcher announces.

    Args:
        environ: variables to read instead of this process' own.
        root: where /sys and /dev are, for tests.

    Raises:
        LaunchError: variables are missing, are no integers, or contradict each other.
    """
    from launch import worlds

    environ = os.environ if environ is None else environ
    labels = worlds.job_labels(environ)
    for reader in (worlds.from_torchrun, worlds.from_mpi, worlds.from_srun):
        context = reader(environ)
        if context is not None:
            return _with_devices(replace(context, job_labels=labels), environ, root)
    return RankContext(supervision=worlds.supervision(environ), job_labels=labels)


def _with_devices(context: RankContext, environ: Mapping[str, str], root: Path) -> RankContext:
    visible = devices.visible_devices(environ, devices.is_rocm(root))
    if not devices.accelerators(root):
        return context  # lists of devices that are not there (fake GPUs, CPU nodes) mean nothing
    index = devices.device_index(context.local_rank, context.local_world_size, visible)
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    cpus = devices.cpu_binding(context.local_rank, context.local_world_size, index, visible, allowed, root)
    return replace(context, device_index=index, cpus=cpus)


__all__ = ["LaunchError", "RankContext", "Supervision", "read_rank_env"]
