"""The controller's side of its agents: start one per node, greet them, check their nodes, speak and listen, dismiss.

Invariant: who does not know the job's token is never heard. What agents say waits in one queue, in order of arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable

from launch.agreement import CLOCK_TOLERANCE_S
from launch.errors import LaunchError
from launch.ports import CONTROLLER, is_free
from launch.supervise import slurm
from launch.supervise.job import Job
from launch.supervise.record import EventLog, exclude
from launch.supervise.wire import LIMIT_BYTES, Message, encode, receive

TICK_S = 0.25
LEAVE_S = 10.0


class Fleet:
    """All agents of one life of a job. ``base_port`` is the first of the job's ports."""

    def __init__(self, job: Job, local: bool, base_port: int, events: EventLog) -> None:
        self.job, self.local, self.events = job, local, events
        self.port = base_port + CONTROLLER
        self.agents: dict[str, asyncio.StreamWriter] = {}
        self.clock_offset_s: dict[str, float] = {}
        self.inbox: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self.launchers: dict[str, asyncio.subprocess.Process] = {}
        """Host -> what starts its agent; the same srun for all in Slurm."""

    # -- speaking and listening ----------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Accept agents for the duration of the block, then send them home.

        Raises:
            LaunchError: the port is taken.
        """
        if not is_free(self.port):
            raise LaunchError(
                f"port {self.port} on {socket.gethostname()} is in use, but this job's agents look for it there: is "
                "another controller of this job still running?"
            )
        address = "127.0.0.1" if self.local else ""
        async with await asyncio.start_server(self.accept, address, self.port, limit=LIMIT_BYTES):
            try:
                yield
            finally:
                await self.dismiss()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: an agent that knows the token, or a stranger."""
        hello = await receive(reader)
        if hello is None or hello.get("token") != self.job.token:
            writer.close()
            return
        host = str(hello["host"])
        self.clock_offset_s[host] = float(hello["clock"]) - time.time()
        self.agents[host] = writer
        await self.inbox.put((host, hello))
        while (message := await receive(reader)) is not None:
            await self.inbox.put((host, message))
        self.agents.pop(host, None)
        writer.close()
        await self.inbox.put((host, {"type": "lost"}))

    def send(self, host: str, kind: str, **fields: object) -> None:
        """Tell one agent; one that is gone is noticed by its reader."""
        writer = self.agents.get(host)
        if writer is not None:
            with contextlib.suppress(OSError, RuntimeError):
                writer.write(encode({"type": kind, **fields}))

    def send_all(self, kind: str, **fields: object) -> None:
        """Tell every agent."""
        for host in list(self.agents):
            self.send(host, kind, **fields)

    async def next(self, timeout_s: float = TICK_S) -> tuple[str, Message] | None:
        """Return the next (host, message), or None after ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self.inbox.get(), timeout_s)
        return None

    # -- coming and going ----------------------------------------------------------------------------------------------

    async def start(self, hosts: list[str]) -> None:
        """Start one agent per node: through srun, or here as a child per planned host."""
        with (self.job.folder / "agents.log").open("ab") as out:
            if not self.local:
                here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
                command = slurm.agents_command(self.job, f"{here}:{self.port}", len(hosts))
                srun = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out)
                self.launchers = dict.fromkeys(hosts, srun)
                return
            command = [*self.job.agent_command, "--controller", f"127.0.0.1:{self.port}", "--job", str(self.job.folder)]
            for host in hosts:
                self.launchers[host] = await asyncio.create_subprocess_exec(
                    *command, "--host", host, stdout=out, stderr=out, start_new_session=True
                )

    async def gather(self, hosts: list[str], asked_to_stop: Callable[[], bool]) -> None:
        """Wait for every node; those that do not answer in time and those whose clock is off are left out."""
        deadline = time.monotonic() + self.job.policy.connect_timeout_s
        while self._awaited(hosts) and time.monotonic() < deadline and not asked_to_stop():
            await self.next()
        absent = sorted(set(hosts) - set(self.agents))
        if absent:
            log = (self.job.folder / "agents.log").read_text(errors="replace").strip().splitlines()
            self.events.emit("nodes_absent", hosts=absent, waited_s=self.job.policy.connect_timeout_s, said=log[-3:])
        for host in absent:
            exclude(self.job.folder, host, "its agent did not answer")
        for host, offset in self.clock_offset_s.items():
            if abs(offset) > CLOCK_TOLERANCE_S:
                self._leave_out(host, "clock", [f"{offset:+.1f} s against the controller: check chrony or ntpd there"])

    def _awaited(self, hosts: list[str]) -> list[str]:
        """Return the hosts whose agents have not answered but still may."""
        return [host for host in hosts if host not in self.agents and self.launchers[host].returncode is None]

    async def preflight(self) -> None:
        """Check every node before anything starts; those that fail are left out."""
        waiting = set(self.agents)
        if not self.job.preflight_command or not waiting:
            return
        start = time.monotonic()
        self.send_all("preflight", command=self.job.preflight_command)
        while waiting and time.monotonic() - start < self.job.policy.connect_timeout_s:
            host, message = await self.next() or ("", {"type": ""})
            if message["type"] == "preflight":
                waiting.discard(host)
                if message["status"]:
                    self._leave_out(host, "preflight", message["output"].strip().splitlines()[-5:])
            elif message["type"] == "lost":
                waiting.discard(host)
        for host in sorted(waiting):
            self._leave_out(host, "preflight", ["no verdict in time"])
        self.events.emit("preflight_done", seconds=round(time.monotonic() - start, 2))

    def _leave_out(self, host: str, why: str, lines: list[str]) -> None:
        exclude(self.job.folder, host, f"{why}: {'; '.join(lines)}")
        self.events.emit("node_excluded", host=host, why=why, said=lines)

    async def dismiss(self) -> None:
        """Send the agents home and wait for them."""
        self.send_all("leave")
        launchers = set(self.launchers.values())
        if launchers:
            await asyncio.wait([asyncio.create_task(process.wait()) for process in launchers], timeout=LEAVE_S)
        for process in launchers:
            if process.returncode is None:
                process.terminate()
        self.launchers = {}
