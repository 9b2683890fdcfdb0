"""Ports of a job, from its id: the same on every node without asking, and different for jobs that share nodes.

Invariant: they lie below Linux's ephemeral range (32768) and away from Slurm's own ports. Standard library only.
"""

from __future__ import annotations

import os
import socket

FIRST, BLOCK, JOBS = 10240, 8, 1200
MEETING, AGREEMENT, CONTROLLER = 0, 1, 4  # offsets in a block; odd attempts meet two higher


def job_port(job_id: int, offset: int = MEETING, attempt: int = 0) -> int:
    """Return the port of a job for one purpose; two attempts after each other never share a meeting point."""
    shift = 0 if offset == CONTROLLER else 2 * (attempt % 2)
    return FIRST + BLOCK * (job_id % JOBS) + offset + shift


def is_free(port: int) -> bool:
    """True when this machine can listen on ``port`` on all its addresses."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def own_ports(count: int) -> int:
    """Return the first of ``count`` free ports for a job without an id, spread over processes."""
    for shift in range(JOBS):
        base = job_port((os.getpid() + shift) % JOBS)
        if all(is_free(base + offset) for offset in range(count)):
            return base
    raise RuntimeError("no free ports on this machine")
