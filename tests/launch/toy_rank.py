"""A rank without torch: it beats like a training rank, meets its neighbours through files, and fails as told.

Ranks move in step: nobody starts iteration i before all have done i - 1, so one that hangs holds up all. The
checkpoint is a number in a file. `python -m tests.launch.toy_rank FOLDER ITERATIONS FAULTS`, with faults such as
`crash:rank=1,iteration=3,attempt=0` separated by `;`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from launch.env import read_rank_env
from megatron_zaya.pretrain import _answer_stack_requests
from megatron_zaya.telemetry.heartbeat import Heartbeat


def barrier(folder: Path, attempt: int, iteration: int, rank: int, world_size: int) -> None:
    (folder / f"{attempt}-{iteration}-{rank}").touch()
    while not all((folder / f"{attempt}-{iteration}-{other}").exists() for other in range(world_size)):
        time.sleep(0.02)


def save(path: Path, iteration: int) -> None:
    path.with_suffix(".partial").write_text(str(iteration))
    path.with_suffix(".partial").replace(path)


def fail(kind: str, asked: list[int]) -> None:
    if kind == "crash":
        raise ValueError("a wrong shape")
    if kind == "device":
        print("HIP error: the operation cannot be performed in the present state", flush=True)
        os._exit(1)
    if kind == "nan":
        print("zaya: iteration 4: the loss is nan; the parameters are those of the last good iteration", flush=True)
        os._exit(1)
    if kind == "network":
        print("RuntimeError: [gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1234", flush=True)
        os._exit(1)
    if kind == "input":
        print("zaya: model.num_layer: unknown key", flush=True)
        os._exit(2)
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
    while kind == "hang" or (kind == "wait" and not asked):  # until told to stop
        time.sleep(0.1)


def main(folder: Path, iterations: int, faults: str) -> None:
    env = read_rank_env()
    attempt = env.supervision.attempt
    heartbeat = Heartbeat(env.supervision.heartbeat_file)
    _answer_stack_requests(env)
    asked: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda received, frame: asked.append(received))
    saved = folder / "saved"
    start = int(saved.read_text()) if saved.exists() else 0
    heartbeat.beat("first step", start)
    for iteration in range(start + 1, iterations + 1):
        slow = f"slow:rank={env.rank}" in faults
        time.sleep(0.3 if slow else 0.05)
        barrier(folder, attempt, iteration, env.rank, env.world_size)
        heartbeat.beat("step", iteration, busy_s=0.3 if slow else 0.05)
        for fault in filter(None, faults.split(";")):
            kind, _, where = fault.partition(":")
            if where == f"rank={env.rank},iteration={iteration},attempt={attempt}":
                fail(kind, asked)
        stop = folder / f"stop-{iteration}"
        if asked and env.rank == 0:
            stop.touch()
        barrier(folder, attempt, 10_000 + iteration, env.rank, env.world_size)
        if stop.exists():
            save(saved, iteration)
            heartbeat.beat("ended", iteration, reason="stopped")
            return
        if iteration % 2 == 0 and env.rank == 0:
            save(saved, iteration)
    heartbeat.beat("ended", iterations, reason="finished")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
