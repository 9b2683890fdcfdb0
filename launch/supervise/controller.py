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
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from launch.errors import LaunchError
from launch.ports import CONTROLLER, MEETING, job_port, own_ports
from launch.supervise import classify, slurm, watch
from launch.supervise.fleet import Fleet
from launch.supervise.inquest import end_ranks, investigate
from launch.supervise.job import Job, read_job
from launch.supervise.policy import Decision, Failure, decide
from launch.supervise.record import EventLog, exclude, read_excluded, write_incident
from launch.supervise.watch import Watch

FINISHED, GIVEN_UP, BAD_INPUT, STOPPED = 0, 1, 2, 75
SLURM_ENDS_US_S = 60.0


def place(job: Job, present: Collection[str], excluded: Collection[str]) -> tuple[list[str], list[str]]:
    """Return (hosts that train, in rank order; spares): the planned order, spares in the places of the missing."""
    known = [host for host in job.hosts if host in present]
    others = [host for host in sorted(present) if host not in known]
    healthy = [host for host in [*known, *others] if host not in excluded]
    planned = job.hosts[: job.nodes]
    if not planned:
        return healthy[: job.nodes], healthy[job.nodes :]
    spares = [host for host in healthy if host not in planned]
    chosen = [host if host in healthy else spares.pop(0) for host in planned if host in healthy or spares]
    return chosen, spares


class Controller:
    """One life of a job: from the start of the batch shell to its end."""

    def __init__(self, job: Job, local: bool) -> None:
        self.job, self.local = job, local
        self.events = EventLog(job.folder / "events.jsonl", lambda text: print(f"zaya: {text}", flush=True))
        self.job_id = "" if local else os.environ.get("SLURM_JOB_ID", "")
        self.base_port = own_ports(CONTROLLER + 1) if not self.job_id else job_port(int(self.job_id))
        self.fleet = Fleet(job, local, self.base_port, self.events)
        self.stop_signal = 0
        self.terminated = asyncio.Event()
        self.attempt = len(self.events.read("attempt_started"))
        self.incidents = len(self.events.read("incident"))
        self.failures: list[Failure] = []
        self.failed_at = 0.0

    async def run(self) -> int:
        """Run the job; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask_to_stop, number)
        hosts = self._hosts()
        self.events.emit("job_started", name=self.job.name, job_id=self.job_id, hosts=hosts, nodes=self.job.nodes)
        async with self.fleet.listening():
            await self.fleet.start(hosts)
            await self.fleet.gather(hosts, lambda: bool(self.stop_signal))
            await self.fleet.preflight()
            return await self._attempts()

    def _ask_to_stop(self, number: int) -> None:
        self.stop_signal = number
        if number == signal.SIGTERM:
            self.terminated.set()

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
            hosts, spares = place(self.job, self.fleet.agents, read_excluded(self.job.folder))
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

    # -- one attempt ---------------------------------------------------------------------------------------------------

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
            self.fleet.send(host, "start", attempt=self.attempt, ranks=own, environment=environment)
        return Watch(self.attempt, ranks, self.job.policy, time.monotonic())

    def _causes(self) -> list[str]:
        """Return why each attempt before this one ended."""
        incidents = {incident["attempt"]: incident["category"] for incident in self.events.read("incident")}
        return [incidents.get(attempt, "requeue") for attempt in range(self.attempt)]

    async def _run_attempt(self, attempt: Watch) -> str:
        """Watch until the attempt is over; return how."""
        training = False
        while True:
            heard = await self.fleet.next()
            while heard is not None:
                attempt.hear(*heard, time.monotonic())
                heard = None if self.fleet.inbox.empty() else self.fleet.inbox.get_nowait()
            now = time.monotonic()
            if self.stop_signal and attempt.asked_to_stop is None:
                self.events.emit("stop_asked", signal=signal.Signals(self.stop_signal).name)
                self.fleet.send_all("signal", number=int(self.stop_signal))
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

    async def _handle_failure(self, attempt: Watch, verdict: str) -> Decision:
        """Name the culprit, end what is left of the attempt, decide, and write it all down."""
        self.failed_at = time.time()
        stacks_folder = self.job.folder / "stacks" / f"attempt-{self.attempt:04d}"
        finding = await investigate(self.fleet, attempt, verdict, stacks_folder)
        await end_ranks(self.fleet, attempt)
        cause = finding.cause
        self.failures.append(Failure(cause, attempt.iteration, finding.silent, attempt.part))
        decision = decide(self.failures, self.job.policy)
        if decision.exclude:
            exclude(self.job.folder, decision.exclude, cause.sentence())
        self.incidents += 1
        report = write_incident(
            self.job.folder,
            self.incidents,
            job=self.job.name,
            attempt=self.attempt,
            hosts=list(dict.fromkeys(view.host for view in attempt.ranks.values())),
            cause=cause,
            decision=decision,
            iteration=attempt.iteration,
            exits=[exit for exit in attempt.exits.values() if exit.status],
            stacks=finding.stacks,
            odd=finding.odd,
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

    # -- leaving -------------------------------------------------------------------------------------------------------

    async def _stopped(self) -> int:
        """The ranks have saved: SIGUSR1 means that there is more to do, so back into the queue."""
        if self.stop_signal != signal.SIGUSR1:
            return FINISHED
        if self.job_id:
            await self._requeue()
        return STOPPED

    async def _too_few(self, hosts: Sequence[str]) -> int:
        """Not enough healthy nodes here: ask Slurm for others, unless other nodes have not helped either."""
        excluded = sorted(read_excluded(self.job.folder))
        self.events.emit("too_few_nodes", healthy=list(hosts), needed=self.job.nodes, excluded=excluded)
        if not self.job_id:
            return GIVEN_UP
        in_vain, most = self._lives_in_vain(), self.job.policy.max_restarts_without_progress
        if in_vain > most:
            reason = (
                f"{in_vain} allocations in a row had too few healthy nodes and trained nothing "
                f"(max_restarts_without_progress={most}); see excluded.json for why"
            )
            self.events.emit("job_given_up", reason=reason)
            return GIVEN_UP
        return STOPPED if await self._requeue() else GIVEN_UP

    def _lives_in_vain(self) -> int:
        """Return how many of the newest lives of this job, this one included, ended for want of nodes untrained."""
        kinds = [record["event"] for record in self.events.read()]
        since = kinds[::-1].index("training") if "training" in kinds else len(kinds)
        return kinds[len(kinds) - since :].count("too_few_nodes")

    async def _requeue(self) -> bool:
        """Put this job back into the queue, without the nodes that it leaves out; return whether Slurm did."""
        await self.fleet.dismiss()
        excluded = sorted(read_excluded(self.job.folder))
        self.events.emit("requeueing", job_id=self.job_id, excluded=excluded)
        complaint = await slurm.requeue(self.job_id, excluded)
        if complaint:
            self.events.emit("requeue_refused", said=complaint)
            return False
        # Slurm ends this shell now; an exit of our own before that could be taken for the end of the job.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.terminated.wait(), SLURM_ENDS_US_S)
        return True


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
