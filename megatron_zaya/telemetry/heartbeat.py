"""A rank's sign of life: one small file, rewritten whenever the rank moves on, read by the agent of its node.

`{"phase": ..., "iteration": ..., "time": ..., "since": {phase: first time}, "busy_s": ..., "reason": ...}`. The main
thread writes it, so that a main thread which hangs is seen to hang. Standard library only; without a file it does
nothing.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

PHASES = ("rendezvous", "imports", "join", "build", "first step", "step", "evaluate", "save", "ended")


class Heartbeat:
    """Writer of one rank's file. Atomic: a reader sees the old record or the new one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.record: dict[str, Any] = read_heartbeat(path) if path else {}
        self.record.setdefault("since", {})

    def beat(self, phase: str, iteration: int = 0, **more: float | str) -> None:
        """Say that the rank has entered ``phase`` after ``iteration`` complete iterations."""
        if self.path is None:
            return
        now = time.time()
        self.record["since"].setdefault(phase, now)
        self.record |= {"phase": phase, "iteration": iteration, "time": now, **more}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.record), encoding="utf-8")
        os.replace(partial, self.path)  # noqa: PTH105


def read_heartbeat(path: Path) -> dict[str, Any]:
    """Return the last record, or an empty one where the rank has not written yet."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record
