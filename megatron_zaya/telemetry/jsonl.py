"""metrics.jsonl: every event as one JSON line, appended, so that nothing of an earlier life of the run is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_zaya.telemetry.events import Event


class JsonlSink:
    """Append events to ``path``; a line is complete or absent after a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> None:
        """Open the file."""
        self.file = self.path.open("a", encoding="utf-8", buffering=1)

    def handle(self, event: Event, when: float) -> None:
        """Write one line."""
        record = {"event": type(event).__name__, "time": round(when, 3), **vars(event)}
        self.file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_events(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records of a file of events (of one kind), oldest first; lines that are no event are left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if kind in (None, record["event"]):
                records.append(record)
        except (ValueError, TypeError, KeyError):  # torn by a kill, or not ours
            continue
    return records


def steps_by_iteration(path: Path) -> dict[int, dict[str, Any]]:
    """Return the step records by iteration; where a run was repeated from a checkpoint, the later record counts."""
    return {record["iteration"]: record for record in read_events(path, "StepDone")}
