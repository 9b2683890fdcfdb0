"""What a profile of some steps says: seconds by part of the model, how far communication hides, and the plan beside it.

Pure: the callback `train/callbacks/profile.py` takes the profile, this module judges it. Times are seconds per step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Span = tuple[float, float]

PLANNED: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "convolutions"),
    "core attention": ("core attention",),
    "router": ("router",),
    "experts": ("experts", "expert parallel"),
    "norms and residuals": ("memory passes",),
    "embedding": ("embedding",),
    "head": ("head",),
    "gradient accumulation": ("gradient accumulation",),
    "gradient reduction": ("gradients, exposed", "parameters, exposed", "tied and replicated gradients"),
    "optimizer": ("optimizer", "Muon"),
}
"""Measured part: the parts of `megatron_zaya.plan.step_time` that predict it. The planner counts all passes over memory
between products as one; here most of them fall into the part that does them."""
REST = "rest"


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the union of spans as disjoint ones, in order."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return result


def length(spans: Iterable[Span]) -> float:
    """Return how long disjoint spans last together."""
    return sum(end - start for start, end in spans)


def common(one: list[Span], other: list[Span]) -> float:
    """Return how long two lists of disjoint, ordered spans last at the same time."""
    total, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] <= other[j][1]:
            i += 1
        else:
            j += 1
    return total


@dataclass(frozen=True)
class Overlap:
    """Communication of a rank, and what of it computing hides."""

    communication_s: float
    hidden_s: float

    @property
    def exposed_s(self) -> float:
        """Communication during which nothing was computed."""
        return self.communication_s - self.hidden_s


def overlap(communication: Iterable[Span], computing: Iterable[Span], steps: int) -> Overlap:
    """Return the overlap per step of two sets of spans over ``steps`` steps."""
    travelling, working = merged(communication), merged(computing)
    return Overlap(length(travelling) / steps, common(travelling, working) / steps)


@dataclass(frozen=True)
class Summary:
    """The profile of one rank."""

    rank: int
    first_iteration: int
    steps: int
    device: str
    step_s: float
    """Wall clock, the profiler's own cost included."""
    parts: dict[str, dict[str, float]]
    """Part: seconds of its forward and backward passes; of kernels on an accelerator, of the processor otherwise."""
    overlap: Overlap
    memory_bytes: dict[str, int] = field(default_factory=dict)
    """Parameters, gradients, optimizer state, peak of the device, resident memory of the process."""

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part and the rest of the step."""
        parts = {name: sum(passes.values()) for name, passes in self.parts.items()}
        return parts | {REST: max(0.0, self.step_s - sum(parts.values()))}


def write_summary(summary: Summary, path: Path) -> None:
    """Write a summary as JSON."""
    path.write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")


def read_summary(path: Path) -> Summary:
    """Read what `write_summary` wrote."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Summary(**record | {"overlap": Overlap(**record["overlap"])})


@dataclass(frozen=True)
class Row:
    """One part, measured and predicted; shares are of the whole step."""

    part: str
    measured_s: float
    measured_share: float
    planned_s: float
    planned_share: float


def beside_plan(summary: Summary, planned: Mapping[str, float]) -> list[Row]:
    """Lay the planner's seconds by cause (`StepTime.parts`) beside the measured ones; both lists add up to the step."""
    measured, step_s = summary.seconds(), sum(planned.values())
    expected = {part: sum(planned.get(name, 0.0) for name in names) for part, names in PLANNED.items()}
    expected[REST] = step_s - sum(expected.values())
    return [
        Row(part, seconds, seconds / summary.step_s, expected[part], expected[part] / step_s)
        for part in (*PLANNED, REST)
        if (seconds := measured.get(part, 0.0)) or expected[part]
    ]
