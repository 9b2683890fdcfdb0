"""Start the ranks of a run on this machine with torchrun, the launcher that the batch scripts use as well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType


def torchrun_command(run_file: Path, overrides: list[str], nproc: int) -> list[str]:
    """Return the command line that starts ``nproc`` ranks with a free rendezvous port."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={nproc}",
        "--module",
        "megatron_zaya.pretrain",
        str(run_file),
        *overrides,
    ]


def run_ranks(run_file: Path, overrides: list[str], nproc: int) -> int:
    """Run the ranks to their end and return their exit status; signals to this process reach every rank."""
    environment = dict(os.environ)
    # As torchrun would set it, but without its warning; more ranks than cores must not multiply threads.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    process = subprocess.Popen(torchrun_command(run_file, overrides, nproc), env=environment)

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)
    # An interrupt from the terminal reaches the whole foreground group by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return process.wait()
