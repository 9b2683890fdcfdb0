"""One attempt as the controller sees it: who runs where, how far each rank is, what has gone wrong. No sockets here.

Feed it what agents say (`hear`), ask `verdict` now and then.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.supervise import classify
from launch.supervise.classify import Cause, RankExit
from launch.supervise.job import Policy
from launch.supervise.wire import Message

RUNNING, FINISHED, STOPPED, FAILED, HUNG = "running", "finished", "stopped", "failed", "hung"


@dataclass
class RankView:
    """The last that is known of a rank."""

    host: str
    heartbeat: dict[str, Any]
    changed: float
    """When the heartbeat last changed, on the controller's clock."""


@dataclass(frozen=True)
class Straggler:
    """A rank that computes longer than the others."""

    rank: int
    host: str
    busy_s: float
    median_s: float


class Watch:
    """The state of one attempt. ``now`` is a monotonic clock everywhere."""

    def __init__(self, number: int, ranks: Mapping[int, str], policy: Policy, now: float) -> None:
        self.number, self.policy, self.started = number, policy, now
        self.ranks = {rank: RankView(host, {}, now) for rank, host in ranks.items()}
        self.seen = dict.fromkeys(ranks.values(), now)
        self.exits: dict[int, RankExit] = {}
        self.lost: dict[str, float] = {}
        self.first_failure: float | None = None
        self.asked_to_stop: float | None = None
        self.busy: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=policy.straggler_steps))
        self.reported: set[int] = set()

    def hear(self, host: str, message: Message, now: float) -> None:
        """Put one message of the agent of ``host`` into the picture; those about former attempts are passed over."""
        kind = message["type"]
        if kind == "beat":
            self.beat(host, {int(rank): beat for rank, beat in message["ranks"].items()}, now)
        elif kind == "exited" and message["attempt"] == self.number:
            rank = message["rank"]
            if message["heartbeat"]:
                self.beat(host, {rank: message["heartbeat"]}, now)
            kernel = tuple(message["kernel"])
            self.exited(RankExit(rank, host, message["status"], message["time"], message["tail"], kernel), now)
        elif kind == "lost":
            self.lose(host, now)

    def beat(self, host: str, heartbeats: Mapping[int, dict[str, Any]], now: float) -> None:
        """The agent of ``host`` is alive, and its ranks say this."""
        self.seen[host] = now
        for rank, heartbeat in heartbeats.items():
            view = self.ranks.get(rank)
            if view is None or heartbeat == view.heartbeat:
                continue
            stepped = heartbeat.get("iteration") != view.heartbeat.get("iteration")
            if heartbeat.get("phase") == "step" and stepped and "busy_s" in heartbeat:
                self.busy[rank].append(float(heartbeat["busy_s"]))
            view.heartbeat, view.changed = heartbeat, now

    def exited(self, exit: RankExit, now: float) -> None:
        """A rank has ended."""
        self.exits[exit.rank] = exit
        if exit.status and self.first_failure is None:
            self.first_failure = now

    def lose(self, host: str, now: float) -> None:
        """The agent of ``host`` is gone."""
        if host in self.seen and host not in self.lost:
            self.lost[host] = now
            self.first_failure = now if self.first_failure is None else self.first_failure

    def ask_to_stop(self, now: float) -> None:
        """The ranks have been told to save and end."""
        self.asked_to_stop = self.asked_to_stop or now

    @property
    def iteration(self) -> int:
        """The furthest iteration that any rank has reported."""
        return max((int(view.heartbeat.get("iteration", 0)) for view in self.ranks.values()), default=0)

    @property
    def part(self) -> str:
        """The part of the run (its phase) that was last trained; empty before the first step."""
        return max((str(view.heartbeat.get("part", "")) for view in self.ranks.values()), default="")

    def trained(self) -> bool:
        """True once every rank has done a step."""
        return all("step" in view.heartbeat.get("since", {}) for view in self.ranks.values())

    def verdict(self, now: float) -> str:
        """How the attempt stands. A failure is reported `settle_s` after its first sign."""
        for host, seen in self.seen.items():
            if now - seen > self.policy.node_timeout_s and not self._all_ended(host):
                self.lose(host, now)
        if len(self.exits) == len(self.ranks):
            bad = [exit for exit in self.exits.values() if exit.status]
            if not bad:
                reasons = {view.heartbeat.get("reason", "finished") for view in self.ranks.values()}
                return STOPPED if reasons == {"stopped"} else FINISHED
            if self.asked_to_stop is not None:
                return STOPPED
        if self.first_failure is not None and self.asked_to_stop is None:
            return FAILED if now - self.first_failure > self._settle() else RUNNING
        if self.asked_to_stop is not None:
            late = now - self.asked_to_stop > self.policy.save_timeout_s
            return HUNG if late or (self.lost and now - min(self.lost.values()) > self.policy.settle_s) else RUNNING
        return HUNG if self.late_ranks(now) else RUNNING

    def _settle(self) -> float:
        """Only network errors so far: wait until a dead node would have been noticed, for it is the better answer."""
        failed = [exit for exit in self.exits.values() if exit.status]
        if failed and not self.lost and classify.find_cause(failed, []).category == classify.NETWORK:
            return self.policy.node_timeout_s + self.policy.settle_s
        return self.policy.settle_s

    def _all_ended(self, host: str) -> bool:
        return all(rank in self.exits for rank, view in self.ranks.items() if view.host == host)

    def timeout_of(self, phase: str) -> float:
        """How long a rank may stay in a phase."""
        if phase in ("step", "evaluate"):
            return self.policy.hang_timeout_s
        return self.policy.save_timeout_s if phase in ("save", "ended") else self.policy.start_timeout_s

    def late_ranks(self, now: float) -> list[int]:
        """Ranks that have not moved for longer than their phase allows."""
        return [
            rank
            for rank, view in self.ranks.items()
            if rank not in self.exits and now - view.changed > self.timeout_of(view.heartbeat.get("phase", "start"))
        ]

    def cause(self) -> Cause:
        """The cause of a failure."""
        return classify.find_cause([exit for exit in self.exits.values() if exit.status], sorted(self.lost))

    def stragglers(self) -> list[Straggler]:
        """Ranks that were slower than the others in each of the last steps; each is reported once."""
        full = {rank: times for rank, times in self.busy.items() if len(times) == self.policy.straggler_steps}
        if len(full) < len(self.ranks) or len(full) < 2:
            return []
        medians = {rank: statistics.median(times) for rank, times in full.items()}
        # The lower median: in a world of two the quicker rank is the measure.
        usual = statistics.median_low(medians.values())
        found = []
        for rank, median in sorted(medians.items()):
            limit = usual * self.policy.straggler_factor
            if median > limit and min(full[rank]) > usual and rank not in self.reported:
                self.reported.add(rank)
                found.append(Straggler(rank, self.ranks[rank].host, round(median, 4), round(usual, 4)))
        return found

    def phases(self) -> dict[str, float]:
        """Phase -> when the last rank entered it (wall clock); the split of a start."""
        entered: dict[str, float] = {}
        for view in self.ranks.values():
            for phase, when in view.heartbeat.get("since", {}).items():
                entered[phase] = max(entered.get(phase, 0.0), float(when))
        return entered
