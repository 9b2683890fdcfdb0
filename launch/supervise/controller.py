"""The controller of a job: agents in, attempts out, until the run is finished or going on makes no sense.

    python -m launch.supervise FOLDER [--local]

Exit status: 0 finished, 1 given up (the last incident report says why), 2 the input cannot work, 75 stopped with a
checkpoint and to be started again (in Slurm the job has then been requeued).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

from launch.agreement import CLOCK_TOLERANCE_S
from launch.errors import LaunchError
from launch.ports import CONTROLLER, MEETING, is_free, job_port, own_ports
from launch.supervise import classify, slurm, watch
from launch.supervise.classify import Cause, RankExit
from launch.supervise.job import Job, read_job
from launch.supervise.policy import Decision, Failure, decide
from launch.supervise.record import EventLog, exclude, read_excluded, write_incident
from launch.supervise.stacks import Odd, RankStack, find_odd
from launch.supervise.watch import Watch
from launch.supervise.wire import LIMIT_BYTES, Message, encode, receive

TICK_S = 0.25
STACKS_WAIT_S = 5.0
FINISHED, GIVEN_UP, BAD_INPUT, STOPPED = 0, 1, 2, 75


class Controller:
    """One life of a job: from the start of the batch shell to its end."""

    def __init__(self, job: Job, local: bool) -> None:
        self.job, self.local = job, local
        self.events = EventLog(job.folder / "events.jsonl", lambda text: print(f"zaya: {text}", flush=True))
        self.job_id = "" if local else os.environ.get("SLURM_JOB_ID", "")
        self.agents: dict[str, asyncio.StreamWriter] = {}
        self.clock_offset_s: dict[str, float] = {}
        self.inbox: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self.stop_signal = 0
        self.attempt = len(self.events.read("attempt_started"))
        self.incidents = len(self.events.read("incident"))
        self.failures: list[Failure] = []
        self.failed_at = 0.0
        self.launchers: list[asyncio.subprocess.Process] = []
        self.base_port = own_ports(CONTROLLER + 1) if not self.job_id else job_port(int(self.job_id))

    # -- agents --------------------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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

    def _send(self, host: str, kind: str, **fields: object) -> None:
        writer = self.agents.get(host)
        if writer is not None:
            with contextlib.suppress(OSError, RuntimeError):
                writer.write(encode({"type": kind, **fields}))

    def _send_all(self, kind: str, **fields: object) -> None:
        for host in list(self.agents):
            self._send(host, kind, **fields)

    async def _next(self, timeout_s: float = TICK_S) -> tuple[str, Message] | None:
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self.inbox.get(), timeout_s)
        return None

    async def _start_agents(self, hosts: list[str]) -> None:
        """One agent per node: through srun, or here as a child per planned host."""
        port = self.base_port + CONTROLLER
        out = (self.job.folder / "agents.log").open("ab")
        if not self.local:
            here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
            command = slurm.agents_command(self.job, f"{here}:{port}", len(hosts))
            self.launchers = [await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out)]
            return
        for host in hosts:
            command = [*self.job.agent_command, "--controller", f"127.0.0.1:{port}", "--job", str(self.job.folder)]
            self.launchers.append(
                await asyncio.create_subprocess_exec(
                    *command, "--host", host, stdout=out, stderr=out, start_new_session=True
                )
            )

    async def _gather_agents(self, hosts: list[str]) -> None:
        """Wait for every node, or for enough of them when some do not answer."""
        deadline = time.monotonic() + self.job.policy.connect_timeout_s
        while set(hosts) - set(self.agents) and time.monotonic() < deadline and not self.stop_signal:
            await self._next()
            if all(p.returncode is not None for p in self.launchers) and not self.agents:
                break
        absent = sorted(set(hosts) - set(self.agents))
        if absent:
            log = (self.job.folder / "agents.log").read_text(errors="replace").strip().splitlines()
            self.events.emit("nodes_absent", hosts=absent, waited_s=self.job.policy.connect_timeout_s, said=log[-3:])
        for host in absent:
            exclude(self.job.folder, host, "its agent did not answer")
        for host, offset in self.clock_offset_s.items():
            if abs(offset) > CLOCK_TOLERANCE_S:
                self._leave_out(host, "clock", [f"{offset:+.1f} s against the controller: check chrony or ntpd there"])

    async def _preflight(self) -> None:
        """Check every node before anything starts; those that fail are left out."""
        waiting = set(self.agents)
        if not self.job.preflight_command or not waiting:
            return
        start = time.monotonic()
        self._send_all("preflight", command=self.job.preflight_command)
        while waiting and time.monotonic() - start < self.job.policy.connect_timeout_s:
            host, message = await self._next() or ("", {"type": ""})
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

    # -- attempts ------------------------------------------------------------------------------------------------------

    def _place(self) -> tuple[list[str], list[str]]:
        """Return (hosts that train, in rank order; spares): the planned order, spares in the places of the missing."""
        bad = read_excluded(self.job.folder)
        healthy = [host for host in self._order(sorted(self.agents)) if host not in bad]
        planned = self.job.hosts[: self.job.nodes]
        spares = [host for host in healthy if host not in planned]
        if not planned:
            return healthy[: self.job.nodes], healthy[self.job.nodes :]
        chosen = [host if host in healthy else spares.pop(0) for host in planned if host in healthy or spares]
        return chosen, spares

    def _order(self, hosts: list[str]) -> list[str]:
        planned = [host for host in self.job.hosts if host in hosts]
        return planned + [host for host in hosts if host not in planned]

    def _start_attempt(self, hosts: list[str], spares: list[str]) -> Watch:
        per_node = self.job.ranks_per_node
        self.events.emit("attempt_started", attempt=self.attempt, hosts=hosts, spares=spares)
        hostfile = self.job.folder / f"hostfile.attempt-{self.attempt:04d}"
        hostfile.write_text("".join(f"{host}\n" for host in hosts), encoding="utf-8")
        environment = {
            "WORLD_SIZE": str(len(hosts) * per_node),
            "MASTER_ADDR": "127.0.0.1" if self.local else hosts[0],
            "MASTER_PORT": str(self.base_port + MEETING + 2 * (self.attempt % 2)),
            "ZAYA_HOSTFILE": str(hostfile),
            "ZAYA_ATTEMPT": str(self.attempt),
            "ZAYA_CAUSES": ",".join(self._causes()),
            "ZAYA_DRILL": self.job.drill,
        }
        ranks: dict[int, str] = {}
        for node, host in enumerate(hosts):
            own = list(range(node * per_node, (node + 1) * per_node))
            ranks |= dict.fromkeys(own, host)
            self._send(host, "start", attempt=self.attempt, ranks=own, environment=environment)
        return Watch(ranks, self.job.policy, time.monotonic())

    def _causes(self) -> list[str]:
        """Return why each attempt before this one ended."""
        incidents = {incident["attempt"]: incident["category"] for incident in self.events.read("incident")}
        return [incidents.get(attempt, "requeue") for attempt in range(self.attempt)]

    def _hear(self, attempt: Watch, host: str, message: Message) -> None:
        """Put one message of an agent into the picture."""
        now = time.monotonic()
        kind = message["type"]
        if kind == "beat":
            attempt.beat(host, {int(rank): beat for rank, beat in message["ranks"].items()}, now)
        elif kind == "exited" and message["attempt"] == self.attempt:
            rank = message["rank"]
            if message["heartbeat"]:
                attempt.beat(host, {rank: message["heartbeat"]}, now)
            attempt.exited(
                RankExit(rank, host, message["status"], message["time"], message["tail"], tuple(message["kernel"])), now
            )
        elif kind == "lost":
            attempt.lose(host, now)

    async def _run_attempt(self, attempt: Watch) -> str:
        """Watch until the attempt is over; return how."""
        training = False
        while True:
            heard = await self._next()
            while heard is not None:
                self._hear(attempt, *heard)
                heard = None if self.inbox.empty() else self.inbox.get_nowait()
            now = time.monotonic()
            if self.stop_signal and attempt.asked_to_stop is None:
                self.events.emit("stop_asked", signal=signal.Signals(self.stop_signal).name)
                self._send_all("signal", number=int(self.stop_signal))
                attempt.ask_to_stop(now)
            if not training and attempt.trained():
                training = True
                self._say_training(attempt)
            for slow in attempt.stragglers():
                self.events.emit(
                    "straggler", rank=slow.rank, host=slow.host, busy_s=slow.busy_s, median_s=slow.median_s
                )
            verdict = attempt.verdict(now)
            if verdict != watch.RUNNING:
                return verdict

    def _say_training(self, attempt: Watch) -> None:
        """The first step is done everywhere: how long each part of the way took, and how long a recovery."""
        entered = attempt.phases()
        recovered = round(entered["step"] - self.failed_at, 2) if self.failed_at else None
        self.events.emit("training", attempt=self.attempt, phases=entered, recovered_after_s=recovered)
        self.failed_at = 0.0

    async def _dump_stacks(self, attempt: Watch) -> dict[int, RankStack]:
        """Ask every rank where it is, and keep the answers as files."""
        self._send_all("dump")
        stacks: dict[int, RankStack] = {}
        deadline = time.monotonic() + STACKS_WAIT_S
        folder = self.job.folder / "stacks" / f"attempt-{self.attempt:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        wanted = set(attempt.ranks) - set(attempt.exits)
        while wanted - set(stacks) and time.monotonic() < deadline:
            host, message = await self._next() or ("", {"type": ""})
            if message["type"] == "stacks":
                for rank, stack in message["ranks"].items():
                    stacks[int(rank)] = RankStack(int(rank), host, stack["text"], stack["state"])
                    (folder / f"rank-{int(rank):05d}.txt").write_text(stack["text"] or stack["state"], encoding="utf-8")
            elif message["type"]:
                self._hear(attempt, host, message)
        for rank in wanted - set(stacks):
            stacks[rank] = RankStack(rank, attempt.ranks[rank].host, "", "on a node that did not answer")
        return stacks

    async def _handle_failure(self, attempt: Watch, verdict: str) -> Decision:
        """Name the culprit, end what is left of the attempt, decide, and write it all down."""
        self.failed_at = time.time()
        stacks: dict[int, RankStack] = {}
        odd: Odd | None = None
        if verdict == watch.HUNG:
            late = attempt.late_ranks(time.monotonic())
            stacks = await self._dump_stacks(attempt)
            odd = find_odd(stacks)
            cause = self._hang_cause(attempt, late, odd)
        else:
            cause = attempt.cause()
        self._send_all("kill")
        await self._reap(attempt)
        hosts = list(dict.fromkeys(view.host for view in attempt.ranks.values()))
        self.failures.append(Failure(cause, attempt.iteration, odd.silent if odd else False, attempt.part))
        decision = decide(self.failures, self.job.policy)
        if decision.exclude:
            exclude(self.job.folder, decision.exclude, cause.sentence())
        self.incidents += 1
        report = write_incident(
            self.job.folder,
            self.incidents,
            job=self.job.name,
            attempt=self.attempt,
            hosts=hosts,
            cause=cause,
            decision=decision,
            iteration=attempt.iteration,
            exits=[exit for exit in attempt.exits.values() if exit.status],
            stacks=stacks,
            odd=odd,
        )
        self.events.emit(
            "incident",
            number=self.incidents,
            attempt=self.attempt,
            category=cause.category,
            rank=cause.rank,
            host=cause.host,
            reason=cause.reason,
            iteration=attempt.iteration,
            decision=decision.reason,
            excluded=decision.exclude,
            report=str(report),
        )
        return decision

    def _hang_cause(self, attempt: Watch, late: list[int], odd: Odd | None) -> Cause:
        phase = attempt.ranks[late[0]].heartbeat.get("phase", "start") if late else "stopping"
        waited = f"no rank moved for {attempt.timeout_of(phase):g} s in phase {phase!r}"
        if odd is None:
            return Cause(classify.HANG, f"{waited}; the stacks do not tell which rank is at fault")
        return Cause(classify.HANG, f"{waited}; {odd.reason}", odd.rank, odd.host)

    async def _reap(self, attempt: Watch) -> None:
        """Wait until the killed ranks are gone, so that their ports and devices are free."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            left = [r for r, v in attempt.ranks.items() if r not in attempt.exits and v.host in self.agents]
            if not left:
                return
            heard = await self._next()
            if heard is not None and heard[1]["type"] == "exited":
                rank = heard[1]["rank"]
                attempt.exits.setdefault(rank, RankExit(rank, heard[0], 0, heard[1]["time"]))
            elif heard is not None:
                self._hear(attempt, *heard)

    # -- the whole life ------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Run the job; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask_to_stop, number)
        hosts = self._hosts()
        self.events.emit("job_started", name=self.job.name, job_id=self.job_id, hosts=hosts, nodes=self.job.nodes)
        port = self.base_port + CONTROLLER
        if not is_free(port):
            raise LaunchError(
                f"port {port} on {socket.gethostname()} is in use, but this job's agents look for it there: is another "
                "controller of this job still running?"
            )
        server = await asyncio.start_server(self._accept, "127.0.0.1" if self.local else "", port, limit=LIMIT_BYTES)
        async with server:
            await self._start_agents(hosts)
            try:
                await self._gather_agents(hosts)
                await self._preflight()
                return await self._attempts()
            finally:
                await self._dismiss()

    def _ask_to_stop(self, number: int) -> None:
        self.stop_signal = number

    def _hosts(self) -> list[str]:
        if self.local:
            return self.job.hosts or [f"local{number}" for number in range(self.job.nodes)]
        hosts = slurm.allocation()
        if len(hosts) < self.job.nodes:
            raise LaunchError(f"the job needs {self.job.nodes} nodes, the allocation has {len(hosts)}: sbatch --nodes")
        return hosts

    async def _attempts(self) -> int:
        while True:
            if self.stop_signal:
                return await self._stopped()
            hosts, spares = self._place()
            if len(hosts) < self.job.nodes:
                return await self._too_few(hosts)
            attempt = self._start_attempt(hosts, spares)
            verdict = await self._run_attempt(attempt)
            if verdict == watch.FINISHED:
                self.events.emit("job_finished", iteration=attempt.iteration)
                return FINISHED
            if verdict == watch.STOPPED:
                self.events.emit("attempt_stopped", attempt=self.attempt, iteration=attempt.iteration)
                return await self._stopped()
            decision = await self._handle_failure(attempt, verdict)
            self.attempt += 1
            if not decision.go_on:
                self.events.emit("job_given_up", reason=decision.reason)
                return BAD_INPUT if self.failures[-1].cause.category == classify.INPUT else GIVEN_UP

    async def _stopped(self) -> int:
        """The ranks have saved: SIGUSR1 means that there is more to do, so back into the queue."""
        if self.stop_signal != signal.SIGUSR1:
            return FINISHED
        if not self.job_id:
            return STOPPED
        await self._dismiss()
        self.events.emit("requeueing", job_id=self.job_id)
        complaint = await slurm.requeue(self.job_id)
        if complaint:
            self.events.emit("requeue_refused", said=complaint)
            return STOPPED
        await asyncio.sleep(60)  # Slurm ends this shell; an exit of our own could be taken for the job's end
        return STOPPED

    async def _too_few(self, hosts: list[str]) -> int:
        """Not enough healthy nodes here: ask Slurm for others, unless even a new allocation brought no progress."""
        excluded = read_excluded(self.job.folder)
        self.events.emit("too_few_nodes", healthy=hosts, needed=self.job.nodes, excluded=sorted(excluded))
        if not self.job_id:
            return GIVEN_UP
        new, complaint = await slurm.resubmit(self.job.folder, sorted(excluded))
        self.events.emit("resubmitted" if new else "resubmission_refused", job_id=new, said=complaint)
        return STOPPED if new else GIVEN_UP

    async def _dismiss(self) -> None:
        """Send the agents home and wait for them."""
        self._send_all("leave")
        waiting = [asyncio.create_task(process.wait()) for process in self.launchers]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=10)
            for process in self.launchers if late else ():
                if process.returncode is None:
                    process.terminate()
        self.launchers = []


def supervise(folder: Path, local: bool) -> int:
    """Run the job of a launch folder to its end; return the exit status."""
    return asyncio.run(Controller(read_job(folder), local).run())


def main(argv: list[str]) -> int:
    """The command line of the batch script."""
    folders = [argument for argument in argv if argument != "--local"]
    if len(folders) != 1:
        print("usage: python -m launch.supervise FOLDER [--local]", file=sys.stderr)
        return BAD_INPUT
    try:
        return supervise(Path(folders[0]), "--local" in argv)
    except LaunchError as error:
        print(f"zaya: {error}", file=sys.stderr)
        return BAD_INPUT
