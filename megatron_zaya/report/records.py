"""What a metrics file says, read once and then followed: step figures as columns, other events as records.

Invariant: a line that is torn or no event of ours is counted and left out, never an error; a file that does not exist
yet is empty. Memory stays bounded: a step is a row of numbers, and of the large records only some hundred are kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
from array import array
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_zaya.telemetry import events

Columns = dict[str, NDArray[np.float64]]

STEP_FIELDS = (
    "time", "iteration", "train_iters", "consumed_samples", "consumed_tokens", "loss", "grad_norm", "learning_rate",
    "global_batch_size", "step_time_s", "tokens_per_s", "skip_rate", "max_expert_load", "mean_load_violation",
    "load_entropy", "min_load_entropy", "dead_experts", "tflops", "mfu",
)  # fmt: skip
LARGE = frozenset({"MoeHealth", "GradientNorms"})
"""Events of which only some are kept."""
KEPT = 256
NEEDED = {
    record.__name__: {field.name for field in dataclasses.fields(record) if field.default is dataclasses.MISSING}
    for record in get_args(events.Event)
}
"""Fields that every record of a kind has had since there is that kind."""


class Thinned:
    """A list below ``2 * KEPT`` entries: when full it drops every second one, and from then on takes fewer."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.stride, self.seen = 1, 0

    def add(self, record: dict[str, Any]) -> None:
        """Take a record, or leave it out."""
        if self.seen % self.stride == 0:
            self.records.append(record)
        self.seen += 1
        if len(self.records) == 2 * KEPT:
            self.records, self.stride = self.records[::2], self.stride * 2


class Metrics:
    """A metrics file, as far as it has been read; :meth:`poll` reads what was added since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        """Lines that are no event."""
        self._restart()

    def _restart(self) -> None:
        self.damaged, self._offset, self._rest = 0, 0, b""
        self._columns = {name: array("d") for name in STEP_FIELDS}
        self._others: dict[str, list[dict[str, Any]]] = {}
        self._thinned: dict[str, Thinned] = {}
        self.last: dict[str, Any] = {}
        """The newest event of any kind."""

    def poll(self) -> bool:
        """Read what is new; return whether there was any. A file that became shorter is read anew."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._restart()
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return False
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.strip():
                self._take(line)
        return bool(lines)

    @property
    def torn(self) -> bool:
        """Whether the last line is incomplete: the run was killed while it wrote, or is writing just now."""
        return bool(self._rest.strip())

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            kind = record["event"]
        except (ValueError, TypeError, KeyError):
            self.damaged += 1
            return
        if not _is_whole(kind, record):
            self.damaged += 1
            return
        if kind == "StepDone":
            for name in STEP_FIELDS:
                self._columns[name].append(_number(record.get(name)))
        elif kind in LARGE:
            self._thinned.setdefault(kind, Thinned()).add(record)
        else:
            self._others.setdefault(kind, []).append(record)
        self.last = record

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of one kind other than StepDone, oldest first; of the large kinds evenly spaced ones."""
        return self._thinned[kind].records if kind in self._thinned else self._others.get(kind, [])

    def all_steps(self) -> Columns:
        """Return every step in the order of the file: work that was lost and repeated appears twice."""
        return {name: np.array(values) for name, values in self._columns.items()}

    def steps(self) -> Columns:
        """Return the steps by iteration; where a run was repeated from a checkpoint, the later record counts."""
        columns = self.all_steps()
        newest_first = columns["iteration"][::-1]
        _, first = np.unique(newest_first, return_index=True)
        chosen = len(newest_first) - 1 - first
        return {name: values[chosen] for name, values in columns.items()}


def _is_whole(kind: Any, record: dict[str, Any]) -> bool:
    """Return whether an event has what readers rely on; kinds of later versions are not known and pass."""
    numbers = (record.get("time"), record.get("iteration", 0))
    return NEEDED.get(kind, frozenset()) <= record.keys() and not any(math.isnan(_number(value)) for value in numbers)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def joined(columns: list[Columns]) -> Columns:
    """Return several tables of steps one below the other."""
    return {name: np.concatenate([part[name] for part in columns] or [np.empty(0)]) for name in STEP_FIELDS}
