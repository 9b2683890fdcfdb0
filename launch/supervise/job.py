"""What the controller must know about a job: `job.json` in the launch folder, written by `zaya submit`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.errors import LaunchError


@dataclass(frozen=True)
class Policy:
    """When something counts as broken, and how often it may break. Times in seconds."""

    connect_timeout_s: float = 120.0
    """For the agents of all nodes to answer."""
    node_timeout_s: float = 15.0
    """Silence after which a node counts as dead."""
    start_timeout_s: float = 1800.0
    """From the start of the ranks to the end of their first step: imports, building, loading, compiling."""
    hang_timeout_s: float = 600.0
    """Longest step or evaluation."""
    save_timeout_s: float = 1800.0
    """Longest save; also how long ranks may take to stop when asked."""
    settle_s: float = 2.0
    """After the first sign of a failure: time for the other ranks to say what they saw."""
    max_restarts: int = 100
    max_restarts_without_progress: int = 3
    """Restarts in a row that may fail before an iteration is reached that had not been reached before."""
    blames_before_exclusion: int = 2
    """Failures blamed on a node that do not prove it broken, until it is left out all the same."""
    straggler_factor: float = 1.3
    """A rank that computes this many times as long as the median rank is reported."""
    straggler_steps: int = 10
    """Over so many steps."""

    # Read by pydantic where a site file is validated: an unknown key is an error.
    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True)
class Job:
    """One job, as data. Paths are absolute and on a file system that every node sees."""

    name: str
    folder: Path
    """Where the launcher writes: events, logs, stacks, incidents."""
    workdir: Path
    """Where ranks run."""
    nodes: int
    """Nodes that train; those beyond them in the allocation are spares."""
    ranks_per_node: int
    command: list[str]
    """What each rank runs."""
    agent_command: list[str]
    """What starts an agent on a node: a container launcher, if any, and the interpreter."""
    srun_options: list[str] = field(default_factory=list)
    """What srun itself must know about the container."""
    environment: dict[str, str] = field(default_factory=dict)
    hosts: list[str] = field(default_factory=list)
    """Planned node order; empty means the order of the allocation."""
    preflight_command: list[str] = field(default_factory=list)
    """Checks one node before anything starts; exit status 0 is a pass. Empty skips."""
    drill: str = ""
    token: str = ""
    """Shared secret of controller and agents."""
    policy: Policy = Policy()

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node

    def write(self) -> Path:
        """Write `job.json`, readable by its owner only; return its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "job.json"
        record = asdict(self) | {"folder": str(self.folder), "workdir": str(self.workdir)}
        path.touch(mode=0o600)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return path


def read_job(folder: Path) -> Job:
    """Read `job.json`.

    Raises:
        LaunchError: it is not there, or was written by another version.
    """
    path = folder / "job.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record["policy"] = Policy(**record["policy"])
        return Job(**record | {"folder": Path(record["folder"]), "workdir": Path(record["workdir"])})
    except OSError as error:
        raise LaunchError(f"{path}: {error.strerror}; `zaya submit` writes it") from None
    except (ValueError, TypeError, KeyError) as error:
        raise LaunchError(f"{path}: not a job of this version ({error}); submit again") from None
