"""Run a function on several real gloo ranks of this machine and collect what each returns.

Ranks are forked from a server process that has imported torch and Megatron-Core once, and has run nothing: importing
them anew costs each rank seconds, and forking the test process itself would copy its threads' locks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank: int, world_size: int, port: int, function: Callable, arguments: tuple, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    try:
        result = (True, function(*arguments))
    except Exception:
        result = (False, traceback.format_exc())
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    if not result[0]:
        os._exit(1)  # the other ranks may be waiting in a collective


def run_ranks(function: Callable, world_size: int, *arguments: Any) -> list[Any]:
    """Call ``function(*arguments)`` on ``world_size`` fresh processes; return the results by rank.

    The processes have torchrun's environment. An exception on any rank fails the caller with its traceback.
    """
    multiprocessing.set_forkserver_preload(["megatron_zaya.train.loop", "tests.ranks"])
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(mp.ProcessExitedException, mp.ProcessRaisedException):  # reported below
            given = (world_size, free_port(), function, arguments, folder)
            mp.start_processes(_rank, given, nprocs=world_size, start_method="forkserver")
        results = [
            pickle.loads(path.read_bytes()) if path.exists() else (False, "died without a word")
            for path in (Path(folder, str(rank)) for rank in range(world_size))
        ]
    failed = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(results) if not good]
    assert not failed, "\n".join(failed)
    return [value for _, value in results]
