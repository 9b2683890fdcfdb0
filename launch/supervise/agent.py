"""The agent of one node: runs the ranks that the controller asks for, and tells it how they are.

    python -m launch.supervise.agent --controller HOST:PORT --job FOLDER

Invariant: its ranks never outlive it, and it never outlives its controller. Standard library only, plus the reader of
heartbeats.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.supervise.job import Job, read_job
from launch.supervise.wire import LIMIT_BYTES, Message, encode, receive
from megatron_zaya.telemetry.heartbeat import read_heartbeat

BEAT_S = 0.5
CONNECT_S = 120.0
STACKS_S = 3.0
TAIL_BYTES = 16_384
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """In the child: SIGKILL when the agent dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def process_state(pid: int) -> str:
    """What the kernel says about a process: its state, and where in the kernel it sleeps."""
    try:
        state = re.search(r"^State:\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.M)
        wchan = Path(f"/proc/{pid}/wchan").read_text().strip("0\n ")
    except OSError:
        return ""
    return f"{state[1] if state else '?'}{' in ' + wchan if wchan else ''}"


def tail(path: Path) -> str:
    """Return the end of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


class RankProcess:
    """One rank of one attempt."""

    def __init__(self, rank: int, attempt: int, process: asyncio.subprocess.Process, log: Path, scratch: Path) -> None:
        self.rank, self.attempt, self.process, self.log = rank, attempt, process, log
        self.heartbeat, self.stacks = scratch / f"rank-{rank}.heartbeat", scratch / f"rank-{rank}.stacks"

    @property
    def running(self) -> bool:
        """True until the process has been reaped."""
        return self.process.returncode is None

    def signal(self, number: int) -> None:
        """Signal the rank; SIGKILL goes to everything it started."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    async def dump(self) -> Message:
        """Ask for the stacks of all its threads; empty text when it does not answer in time."""
        before = self.stacks.stat().st_size if self.stacks.exists() else -1
        state = process_state(self.process.pid)
        if before >= 0:  # the file is there once the rank has installed its handler
            self.signal(signal.SIGUSR2)
            deadline = time.monotonic() + STACKS_S
            size = before
            while time.monotonic() < deadline:
                await asyncio.sleep(0.1)
                last, size = size, self.stacks.stat().st_size
                if size > before and size == last:
                    break
        text = self.stacks.read_bytes()[max(before, 0) :].decode(errors="replace") if before >= 0 else ""
        return {"text": text, "state": state}


class Agent:
    """Connected to a controller until it says leave, or is gone."""

    def __init__(self, job: Job, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.job, self.host, self.reader, self.writer = job, host, reader, writer
        self.ranks: dict[int, RankProcess] = {}
        base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
        job_id = os.environ.get("SLURM_JOB_ID", "local")  # slurm/hooks/epilog.sh removes what a killed agent leaves
        self.scratch = Path(tempfile.mkdtemp(prefix=f"zaya-agent-{job_id}-", dir=base))
        self.background: set[asyncio.Task[None]] = set()

    def send(self, kind: str, **fields: Any) -> None:
        """Queue a message; a controller that is gone is noticed by the reader."""
        with contextlib.suppress(OSError, RuntimeError):
            self.writer.write(encode({"type": kind, **fields}))

    async def serve(self) -> bool:
        """Obey until the end; return whether the controller said goodbye."""
        self.send("hello", token=self.job.token, host=self.host, clock=time.time(), cpus=os.cpu_count())
        beating = asyncio.create_task(self._beat())
        try:
            while True:
                message = await receive(self.reader)
                if message is None or message["type"] == "leave":
                    return message is not None
                await self._obey(message)
        finally:
            beating.cancel()
            self.signal_ranks(signal.SIGKILL)
            for rank in self.ranks.values():
                await rank.process.wait()
            shutil.rmtree(self.scratch, ignore_errors=True)

    async def _beat(self) -> None:
        while True:
            beats = {rank: read_heartbeat(p.heartbeat) for rank, p in self.ranks.items() if p.running}
            self.send("beat", ranks={rank: beat for rank, beat in beats.items() if beat})
            await asyncio.sleep(BEAT_S)

    async def _obey(self, message: Message) -> None:
        kind = message["type"]
        if kind == "start":
            await self._start(message)
        elif kind == "signal":
            self.signal_ranks(message["number"])
        elif kind == "kill":
            self.signal_ranks(signal.SIGKILL)
        elif kind == "dump":
            running = [process for process in self.ranks.values() if process.running]
            stacks = await asyncio.gather(*(process.dump() for process in running))
            self.send("stacks", ranks={p.rank: stack for p, stack in zip(running, stacks, strict=True)})
        elif kind == "preflight":
            self._later(self._preflight(message["command"]))

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    def signal_ranks(self, number: int) -> None:
        """Signal every rank that still runs."""
        for process in self.ranks.values():
            if process.running:
                process.signal(number)

    async def _start(self, message: Message) -> None:
        """Start the ranks of an attempt: log, heartbeat and stacks each to their own file."""
        for old in self.ranks.values():
            await old.process.wait()
        self.ranks = {}
        logs = self.job.folder / "logs" / f"attempt-{message['attempt']:04d}"
        logs.mkdir(parents=True, exist_ok=True)
        count = len(message["ranks"])
        for local_rank, rank in enumerate(message["ranks"]):
            for stale in self.scratch.glob(f"rank-{rank}.*"):
                stale.unlink()
            environment = {
                **os.environ,
                **self.job.environment,
                **message["environment"],
                "RANK": str(rank),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(count),
                "ZAYA_HEARTBEAT_FILE": str(self.scratch / f"rank-{rank}.heartbeat"),
                "ZAYA_STACKS_FILE": str(self.scratch / f"rank-{rank}.stacks"),
            }
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
            log = logs / f"rank-{rank:05d}.log"
            with log.open("wb") as out:
                process = await asyncio.create_subprocess_exec(
                    *self.job.command,
                    env=environment,
                    cwd=self.job.workdir,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            self.ranks[rank] = RankProcess(rank, message["attempt"], process, log, self.scratch)
            self._later(self._reap(self.ranks[rank]))

    async def _reap(self, rank: RankProcess) -> None:
        status = await rank.process.wait()
        self.send(
            "exited",
            attempt=rank.attempt,
            rank=rank.rank,
            status=status,
            time=time.time(),
            heartbeat=read_heartbeat(rank.heartbeat),
            tail=tail(rank.log),
            kernel=self._kernel(rank.process.pid) if status else [],
        )

    def _kernel(self, pid: int) -> list[str]:
        """What the system knows about a death: the kernel's lines on this process or on devices, and full disks."""
        lines = [
            line for line in _kernel_lines() if re.search(rf"\b{pid}\b.*([Kk]illed|oom)|amdgpu.*(reset|RAS)|Xid", line)
        ]
        for folder in (self.job.workdir, self.job.folder, Path(tempfile.gettempdir())):
            with contextlib.suppress(OSError):
                if shutil.disk_usage(folder).free == 0:
                    lines.append(f"No space left on device: {folder}")
        return lines[-5:]

    async def _preflight(self, command: list[str]) -> None:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, **self.job.environment},
            cwd=self.job.workdir,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
        out, _ = await process.communicate()
        self.send("preflight", status=process.returncode, output=out.decode(errors="replace")[-4000:])


def _kernel_lines() -> list[str]:
    """Lines of the kernel's log since boot, without blocking; empty where it may not be read."""
    lines: list[str] = []
    try:
        descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return lines
    try:
        while len(lines) < 20_000:
            try:
                record = os.read(descriptor, 8192)
            except BrokenPipeError:
                continue  # overwritten while we read; the next one is there
            except OSError:
                break
            lines.append(record.decode(errors="replace").partition(";")[2].splitlines()[0])
    finally:
        os.close(descriptor)
    return lines


async def connect(address: str, timeout_s: float = CONNECT_S) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Reach the controller, which may start a moment later. Raises OSError with the last reason after ``timeout_s``."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return await asyncio.open_connection(host, int(port), limit=LIMIT_BYTES)
        except OSError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


async def run(address: str, folder: Path, host: str) -> int:
    """Be the agent of ``host``; return the exit status."""
    job = read_job(folder)
    try:
        reader, writer = await connect(address)
    except OSError as error:
        print(f"zaya agent on {host}: cannot reach the controller at {address}: {error}", file=sys.stderr)
        return 1
    agent = Agent(job, host, reader, writer)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # Slurm signals the step: the ranks save and end
        loop.add_signal_handler(number, agent.signal_ranks, number)
    if await agent.serve():
        return 0
    await _requeue_if_orphaned(host, folder)
    return 1


async def _requeue_if_orphaned(host: str, folder: Path) -> None:
    """The controller is gone without a word: its node died, and with --no-kill the allocation would idle on."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if not job_id or not shutil.which("scontrol"):
        return
    with (folder / "agents.log").open("a", encoding="utf-8") as file:  # srun, which carried our output, may be gone
        # Said before it is done: the requeue ends this agent too.
        print(f"zaya agent on {host}: the controller is gone; requeueing job {job_id}", file=file, flush=True)
        process = await asyncio.create_subprocess_exec("scontrol", "requeue", job_id, stdout=file, stderr=file)
        await process.wait()


def main() -> int:
    """Run the agent of this node."""
    parser = argparse.ArgumentParser(description="Agent of one node; started by the controller.")
    parser.add_argument("--controller", required=True, help="HOST:PORT")
    parser.add_argument("--job", required=True, type=Path, help="launch folder")
    parser.add_argument("--host", default=os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    arguments = parser.parse_args()
    return asyncio.run(run(arguments.controller, arguments.job, arguments.host))


if __name__ == "__main__":
    sys.exit(main())
