"""What is left to read afterwards: `events.jsonl`, `excluded.json`, and a report per incident.

Invariant: a line of the event log is complete or absent, and nothing in it is ever rewritten.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.supervise.classify import Cause, RankExit
from launch.supervise.policy import REMEDY, Decision
from launch.supervise.stacks import Odd, RankStack
from megatron_zaya.telemetry import jsonl


class EventLog:
    """Appends events to `events.jsonl` and says each on one line."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.say = path, say

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event. A full disk must not end the job: then the line on the console is all there is."""
        record = {"event": event, "time": round(time.time(), 3), **fields}
        shown = ", ".join(f"{key}: {value}" for key, value in fields.items() if value not in ("", None, [], {}))
        self.say(f"{event.replace('_', ' ')}{': ' + shown if shown else ''}")
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            self.say(f"cannot write {self.path}: {error.strerror}")

    def read(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the events so far (of one kind), oldest first."""
        return read_events(self.path, event)


def read_events(path: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Return the events of a log (of one kind), oldest first; none where there is no log yet."""
    return jsonl.read_events(path, event) if path.exists() else []


def read_excluded(folder: Path) -> dict[str, str]:
    """Return host -> reason of the nodes that this job leaves out, in every attempt and after every requeue."""
    path = folder / "excluded.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def exclude(folder: Path, host: str, reason: str) -> None:
    """Leave a node out from now on. An operator takes it back by removing its line."""
    excluded = read_excluded(folder) | {host: reason}
    partial = folder / "excluded.json.partial"
    partial.write_text(json.dumps(excluded, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "excluded.json")


def write_incident(
    folder: Path,
    number: int,
    *,
    job: str,
    attempt: int,
    hosts: Sequence[str],
    cause: Cause,
    decision: Decision,
    iteration: int,
    exits: Sequence[RankExit],
    stacks: Mapping[int, RankStack],
    odd: Odd | None,
) -> Path:
    """Write the report of one incident, for people; return its path."""
    path = folder / "incidents" / f"{number:04d}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    culprit = f"rank {cause.rank} on {cause.host}" if cause.rank is not None else cause.host or "not known"
    when = datetime.now(UTC).isoformat(timespec="seconds")
    lines = [
        f"# Incident {number} of {job}: {cause.sentence()}",
        "",
        "| | |",
        "|---|---|",
        f"| when | {when} |",
        f"| attempt | {attempt} on {len(hosts)} nodes: {' '.join(hosts)} |",
        f"| reached | iteration {iteration} |",
        f"| category | {cause.category} |",
        f"| culprit | {culprit} |",
        f"| decision | {'go on' if decision.go_on else 'stop'}: {decision.reason} |",
        f"| advice | {REMEDY[cause.category]} |",
        "",
        "## Evidence",
        "",
        *_quoted("\n".join(cause.evidence) or cause.reason),
    ]
    if exits:
        lines += ["", "## Ranks that ended", "", "| rank | node | status | log |", "|---|---|---|---|"]
        lines += [
            f"| {e.rank} | {e.host} | {_status(e.status)} | logs/attempt-{attempt:04d}/rank-{e.rank:05d}.log |"
            for e in sorted(exits, key=lambda e: e.time)
        ]
    if stacks:
        lines += ["", "## Stacks", "", f"All of them: stacks/attempt-{attempt:04d}/.", ""]
        first = odd.rank if odd else min(stacks)
        lines += _quoted(stacks[first].text or stacks[first].state or "no answer")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _quoted(text: str) -> list[str]:
    return ["```", *text.strip().splitlines()[-60:], "```"]


def _status(status: int) -> str:
    return f"signal {-status}" if status < 0 else str(status)
