"""Who is this process: the one place that reads rank and world from the environment of a launcher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class LaunchError(RuntimeError):
    """The environment does not say who this process is. The message is for the user."""


@dataclass(frozen=True)
class RankEnv:
    """Identity of one process of the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_single(self) -> bool:
        """True for a world of one process, which needs no rendezvous."""
        return self.world_size == 1


def read_rank_env(environ: Mapping[str, str] | None = None) -> RankEnv:
    """Read the world that torchrun announces; without any of its variables this process is a world of its own.

    Raises:
        LaunchError: some of the variables are missing, are no integers, or contradict each other.
    """
    environ = os.environ if environ is None else environ
    given = [name for name in _VARIABLES if name in environ]
    if not given:
        return RankEnv()
    missing = [name for name in _VARIABLES if name not in environ]
    if missing:
        raise LaunchError(
            f"{', '.join(given)} set, but not {', '.join(missing)}: start ranks with `zaya train --nproc N`"
        )
    try:
        rank, world_size, local_rank, local_world_size = (int(environ[name]) for name in _VARIABLES)
    except ValueError:
        seen = ", ".join(f"{name}={environ[name]!r}" for name in _VARIABLES)
        raise LaunchError(f"{seen}: integers are needed") from None
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise LaunchError(
            f"rank {rank} of {world_size}, local rank {local_rank} of {local_world_size}: not a possible world"
        )
    if world_size > 1 and not (environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")):
        raise LaunchError(f"{world_size} ranks, but MASTER_ADDR or MASTER_PORT is not set: no meeting point")
    return RankEnv(rank, world_size, local_rank, local_world_size)
