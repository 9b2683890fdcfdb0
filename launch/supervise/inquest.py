"""After a failure: ask the living for their stacks, name the culprit, end what is left of the attempt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launch.supervise import classify, watch
from launch.supervise.classify import Cause, RankExit
from launch.supervise.fleet import Fleet
from launch.supervise.stacks import Odd, RankStack, find_odd
from launch.supervise.watch import Watch

STACKS_WAIT_S = 5.0
REAP_S = 10.0


@dataclass(frozen=True)
class Finding:
    """What is known about a failure. Stacks and the odd rank belong to a hang."""

    cause: Cause
    stacks: Mapping[int, RankStack] = field(default_factory=dict)
    odd: Odd | None = None

    @property
    def silent(self) -> bool:
        """A hang whose culprit did not even answer: its process or node is at fault, not the program."""
        return self.odd is not None and self.odd.silent


async def investigate(fleet: Fleet, attempt: Watch, verdict: str, folder: Path) -> Finding:
    """Find the cause of a failed or hung attempt; the ranks' stacks are kept as files below ``folder``."""
    if verdict != watch.HUNG:
        return Finding(attempt.cause())
    late = attempt.late_ranks(time.monotonic())
    stacks = await _dump_stacks(fleet, attempt, folder)
    odd = find_odd(stacks)
    phase = attempt.ranks[late[0]].heartbeat.get("phase", "start") if late else "stopping"
    waited = f"no rank moved for {attempt.timeout_of(phase):g} s in phase {phase!r}"
    if odd is None:
        return Finding(Cause(classify.HANG, f"{waited}; the stacks do not tell which rank is at fault"), stacks)
    return Finding(Cause(classify.HANG, f"{waited}; {odd.reason}", odd.rank, odd.host), stacks, odd)


async def _dump_stacks(fleet: Fleet, attempt: Watch, folder: Path) -> dict[int, RankStack]:
    """Ask every rank where it is, and keep the answers."""
    fleet.send_all("dump")
    stacks: dict[int, RankStack] = {}
    deadline = time.monotonic() + STACKS_WAIT_S
    folder.mkdir(parents=True, exist_ok=True)
    wanted = set(attempt.ranks) - set(attempt.exits)
    while wanted - set(stacks) and time.monotonic() < deadline:
        host, message = await fleet.next() or ("", {"type": ""})
        if message["type"] == "stacks":
            for rank, stack in message["ranks"].items():
                stacks[int(rank)] = RankStack(int(rank), host, stack["text"], stack["state"])
                (folder / f"rank-{int(rank):05d}.txt").write_text(stack["text"] or stack["state"], encoding="utf-8")
        elif message["type"]:
            attempt.hear(host, message, time.monotonic())
    for rank in wanted - set(stacks):
        stacks[rank] = RankStack(rank, attempt.ranks[rank].host, "", "on a node that did not answer")
    return stacks


async def end_ranks(fleet: Fleet, attempt: Watch) -> None:
    """Kill what still runs and wait until it is gone, so that its ports and devices are free.

    Nodes that are lost are not waited for.
    """
    fleet.send_all("kill")
    deadline = time.monotonic() + REAP_S
    while time.monotonic() < deadline:
        reachable = set(fleet.agents) - set(attempt.lost)
        if not [rank for rank, view in attempt.ranks.items() if rank not in attempt.exits and view.host in reachable]:
            return
        heard = await fleet.next()
        if heard is not None and heard[1]["type"] == "exited":
            rank = heard[1]["rank"]
            attempt.exits.setdefault(rank, RankExit(rank, heard[0], 0, heard[1]["time"]))  # our doing, no failure
        elif heard is not None:
            attempt.hear(*heard, time.monotonic())
