"""Start the ranks of a run on this machine with torchrun, the launcher that the batch scripts use as well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil


def torchrun_command(module: str, arguments: list[str], nproc: int) -> list[str]:
    """Return the command line that starts ``nproc`` ranks of a module with a free rendezvous port."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={nproc}",
        "--module",
        module,
        *arguments,
    ]


def run_ranks(run_file: Path, overrides: list[str], nproc: int) -> int:
    """Run the ranks to their end and return their exit status.

    The first SIGTERM, SIGINT or SIGUSR1 is handed to every rank, which saves and stops after its step; a second one
    ends torchrun and with it the ranks at once.
    """
    environment = dict(os.environ)
    # As torchrun would set it, but without its warning; more ranks than cores must not multiply threads.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    # A session of its own: an interrupt from the terminal must reach the ranks through us, not torchrun itself,
    # which would kill them half-way.
    command = torchrun_command("megatron_zaya.pretrain", [str(run_file), *overrides], nproc)
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        ranks = psutil.Process(process.pid).children()
        for target in ranks if ranks and len(received) == 1 else [process]:
            target.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, forward)
    return process.wait()
