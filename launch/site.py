"""`site.yaml`: everything about a cluster that a run file must not know. Strict; examples are in slurm/sites/.

One file per cluster: how Slurm is asked, which container and which launcher, what the network is called, how patient
the supervisor is, what a healthy node has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from launch.errors import LaunchError
from launch.preflight.limits import Limits
from launch.supervise.job import Policy
from megatron_zaya.config.errors import explain

Count = Annotated[int, Field(ge=1)]
Launcher = Literal["none", "apptainer", "pyxis", "podman-hpc", "oci"]


class Strict(BaseModel):
    """Base: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SlurmSection(Strict):
    """How to ask for nodes."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    time: str = "1-00:00:00"
    """Wall time; a run that needs more is saved, requeued and resumed."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    cpus_per_node: Count | None = None
    exclusive: bool = True
    signal_before_end_s: Count = 300
    """How long before the end of the wall time, or on preemption, the run is told to save."""
    extra: list[str] = []
    """More options of sbatch, each a whole `--option=value`."""


class ContainerSection(Strict):
    """What the ranks run in. The controller stays outside: it speaks to Slurm."""

    launcher: Launcher = "none"
    image: str | None = None
    """File (.sif, .sqsh), image name (podman-hpc, pyxis), or bundle folder (oci)."""
    mounts: list[str] = []
    """`/host/path` or `/host/path:/inside[:ro]`; the run folder and the working folder are always mounted."""
    extra: list[str] = []
    """More options of the launcher."""

    @model_validator(mode="after")
    def _image_is_given(self) -> ContainerSection:
        if (self.launcher == "none") != (self.image is None):
            raise ValueError(f"launcher {self.launcher!r} and image {self.image!r}: give both, or neither")
        return self


class NetworkSection(Strict):
    """Names on the nodes."""

    interface: str | None = None
    """Interface of the management network: bootstrap, Gloo."""
    nics: list[str] = []
    """RDMA devices in rail order, such as ionic_0 to ionic_7."""


class Site(Strict):
    """The whole file."""

    name: str = "unnamed"
    slurm: SlurmSection = SlurmSection()
    container: ContainerSection = ContainerSection()
    network: NetworkSection = NetworkSection()
    ranks_per_node: Count | None = None
    """None: one per GPU."""
    python: str = "python3"
    """Interpreter of the ranks, inside the container if there is one."""
    host_python: str | None = None
    """Interpreter of the controller, outside of it (any Python from 3.11, no packages needed); None: the same."""
    setup: list[str] = []
    """Shell lines before anything else in the batch script, such as `module load rocm`."""
    environment: dict[str, str] = {}
    cluster: str | None = None
    """Cluster description for the topology planner (relative to this file): placement, RCCL environment, limits."""
    preflight: Limits | None = None
    """What a healthy node has; None checks nothing."""
    supervise: Policy = Policy()

    @property
    def ranks(self) -> int:
        """Ranks per node."""
        return self.ranks_per_node or max(1, self.slurm.gpus_per_node)


def load_site(path: Path | None) -> Site:
    """Read a site file; None is a bare site without GPUs, one rank per node.

    Raises:
        LaunchError: no such file, no YAML, an unknown key, or a value that cannot be.
    """
    if path is None:
        return Site(name="here", slurm=SlurmSection(gpus_per_node=0, exclusive=False))
    if not path.is_file():
        raise LaunchError(f"{path}: no such site file; see slurm/sites/ for examples")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        site = Site.model_validate(tree)
    except yaml.YAMLError as error:
        raise LaunchError(f"{path}: not valid YAML: {error}") from None
    except ValidationError as error:
        raise LaunchError(explain(Site, error, str(path))) from None
    if site.cluster is not None:
        site = site.model_copy(update={"cluster": str((path.parent / site.cluster).resolve())})
    return site
