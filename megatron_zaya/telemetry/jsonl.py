"""metrics.jsonl: every event as one JSON line, appended, so that nothing of an earlier life of the run is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

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
        record = {"event": type(event).__name__, "time": round(when, 3), **dataclasses.asdict(event)}
        self.file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_events(path: Path, kind: str | None = None) -> list[dict]:
    """Return the records of a metrics file (of one kind), oldest first; a torn last line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if kind is None or record["event"] == kind:
            records.append(record)
    return records


def steps_by_iteration(path: Path) -> dict[int, dict]:
    """Return the step records by iteration; where a run was repeated from a checkpoint, the later record counts."""
    return {record["iteration"]: record for record in read_events(path, "StepDone")}
