"""The events of a run: what happened, as plain data. Torch-free; `stream.py` hands them to the sinks.

In `metrics.jsonl` each is one line, `{"event": <name of the class>, "time": <seconds since 1970>, <fields>}`. Fields
are added, never renamed: readers of old runs take what they know. `None` stands for what is not known.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    attempt: int = 0
    """Of a supervised job; 0 is its first start."""
    save_interval: int = 0
    """Iterations between saves; 0 saves at the end only."""
    name: str = ""
    """Name of the run; that of the folder where the run has phases."""
    num_layers: int = 0
    num_experts: int = 0
    flops_per_token: float = 0.0
    """Of the model, forward and backward; recomputation does not count."""
    peak_tflops: float | None = None
    """Of one accelerator, by its vendor or by `telemetry.peak_tflops`."""


@dataclass(frozen=True)
class PhaseStarted:
    """A phase of a run with phases begins or goes on; its events lie in the folder of the phase."""

    phase: str
    number: int
    """From 1."""
    phases: int
    train_iters: int
    train_tokens: int
    """Of the phase."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint was read into the run."""

    iteration: int
    """Of the step that was read; a phase that begins goes on from the last of the one before."""
    path: str
    time_s: float
    bytes_read: int
    """From storage, by the first rank."""
    passed_over: int = 0
    """Newer steps that were damaged."""


@dataclass(frozen=True)
class Restarted:
    """A supervised job trains again after a failure or a requeue."""

    iteration: int
    """From which it goes on."""
    attempt: int
    """From 1: the first start is attempt 0."""
    causes: list[str]
    """Why each earlier attempt ended, oldest first: the categories of incidents, or "requeue"."""


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
    tflops: float = 0.0
    """Model TFLOP/s per accelerator."""
    mfu: float | None = None
    """`tflops` over the accelerator's peak."""
    router_divergence: float | None = None
    """Under router replay: share of (token, layer) pairs whose own choice would have been another."""
    max_router_divergence: float | None = None
    """That of the layer where it is largest."""


@dataclass(frozen=True)
class MoeHealth:
    """The load of every layer's experts in one step (every `telemetry.health_interval` steps); lists go by layer."""

    iteration: int
    expert_loads: list[list[float]]
    """[layer][expert] in multiples of an even share of the layer's dispatched tokens."""
    load_violation: list[float]
    """(Busiest expert / even share) - 1."""
    load_entropy: list[float]
    """Entropy of the experts' load in multiples of its maximum; 1 is even."""
    dead_experts: list[int]
    """Experts without a token."""
    skip_rate: list[float]
    """Share of the tokens that went to the skip class."""


@dataclass(frozen=True)
class MemoryUsed:
    """Memory of the fullest ranks (every `telemetry.health_interval` steps), bytes."""

    iteration: int
    device_peak_bytes: int
    """Allocated at the fullest moment since the report before; 0 without an accelerator."""
    device_reserved_bytes: int
    """Held by the allocator at its largest; 0 without an accelerator."""
    host_bytes: int
    """Resident memory of a rank's process."""


@dataclass(frozen=True)
class Communication:
    """Where a step waited (every `telemetry.health_interval` steps), seconds."""

    iteration: int
    data_wait_s: float
    """For samples, on the rank that waited longest."""
    grad_sync_s: float
    """For the reduction of gradients after the backward pass, on the rank that waited longest."""
    busy_median_s: float
    """From the start of the step to complete gradients, on the median rank; the wait for samples included."""
    busy_slowest_s: float
    """The same on the slowest rank: the rest of the ranks waited for it."""
    slowest_rank: int


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


@dataclass(frozen=True)
class Profiled:
    """The first rank has written its profile of some steps; other ranks write theirs beside it."""

    iteration: int
    """The last one in it."""
    first_iteration: int
    path: str
    """Folder of traces and summaries."""
    step_time_s: float
    """Mean, the profiler's cost included."""
    exposed_communication_s: float
    """Per step: communication during which this rank computed nothing."""


@dataclass(frozen=True)
class SinkTrouble:
    """A consumer of events failed and is left out, or was too slow and missed some."""

    sink: str
    reason: str
    missed: int
    """Events that it did not get so far."""


Event = (
    RunStarted
    | PhaseStarted
    | Loaded
    | Restarted
    | StepDone
    | MoeHealth
    | MemoryUsed
    | Communication
    | StepSkipped
    | LossSpike
    | GradientNorms
    | Evaluated
    | Saved
    | SaveFailed
    | Profiled
    | SinkTrouble
    | RunEnded
)
