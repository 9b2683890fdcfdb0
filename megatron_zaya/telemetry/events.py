"""The events of a run, and the stream that hands them to sinks. Torch-free.

Invariant: a sink that fails is reported once and dropped; it never stops training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStarted:
    """Training begins or goes on."""

    iteration: int
    """Iterations already done."""
    train_iters: int
    world_size: int
    data_parallel_size: int
    parameters: int
    parameters_active: int
    """Parameters that one token passes, the embedding not counted."""
    resumed_from: str | None = None
    optimizer: str = "AdamW"
    """What goes where, in one line; the run folder's optimizer.txt has every parameter."""


@dataclass(frozen=True)
class StepDone:
    """One optimizer step."""

    iteration: int
    train_iters: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    """Mean over the tokens of the global batch, nats."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    global_batch_size: int
    step_time_s: float
    tokens_per_s: float
    """Over all ranks."""
    skip_rate: float
    """Share of (token, layer) pairs that went to the skip class."""
    max_expert_load: float
    """Busiest expert of any layer, in multiples of an even share of the dispatched tokens."""
    mean_load_violation: float
    """Mean over layers of (busiest expert / even share) - 1."""
    load_entropy: float
    """Mean over layers of the entropy of the experts' load; 1 is even."""
    min_load_entropy: float
    """That of the least even layer."""
    dead_experts: int
    """(Layer, expert) pairs without a token."""


@dataclass(frozen=True)
class Evaluated:
    """Loss on held-out text."""

    iteration: int
    loss: float
    tokens: int
    time_s: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint step is complete and safe on the disk; training went on meanwhile."""

    iteration: int
    path: str
    time_s: float
    """From the start of the save until the step was safe."""
    stall_s: float = 0.0
    """How much of it training was held up."""


@dataclass(frozen=True)
class StepSkipped:
    """A step without a finite loss or gradient, left out (`schedule.nan_policy: skip`); no parameter changed."""

    iteration: int
    loss: float
    grad_norm: float
    in_a_row: int
    in_all: int


@dataclass(frozen=True)
class LossSpike:
    """A loss far above those of the last steps."""

    iteration: int
    loss: float
    deviations: float
    """Above the median, in units of the usual spread."""


@dataclass(frozen=True)
class GradientNorms:
    """Norms of groups of parameters, before clipping (`telemetry.grad_norm_groups_interval`)."""

    iteration: int
    norms: dict[str, float]


@dataclass(frozen=True)
class SaveFailed:
    """A checkpoint step could not be written; the run goes on, and the next save may succeed."""

    iteration: int
    reason: str


@dataclass(frozen=True)
class RunEnded:
    """The loop is over."""

    iteration: int
    reason: str
    """"finished", or the name of the signal that stopped it."""


Event = RunStarted | StepDone | StepSkipped | LossSpike | GradientNorms | Evaluated | Saved | SaveFailed | RunEnded


class Sink(Protocol):
    """A consumer of events; lives on one rank only."""

    def handle(self, event: Event) -> None:
        """Take one event. Must return quickly."""

    def close(self) -> None:
        """Flush and release; called once."""


@dataclass
class EventStream:
    """Hands each event to every sink, in order."""

    sinks: Sequence[Sink] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        """Deliver ``event``."""
        for sink in list(self.sinks):
            self._guarded(sink, lambda sink=sink: sink.handle(event))

    def close(self) -> None:
        """Close every sink."""
        for sink in list(self.sinks):
            self._guarded(sink, sink.close)
        self.sinks = []

    def _guarded(self, sink: Sink, call) -> None:
        try:
            call()
        except Exception as error:
            logger.warning("telemetry: %s failed and is dropped: %s", type(sink).__name__, error)
            self.sinks = [other for other in self.sinks if other is not sink]
