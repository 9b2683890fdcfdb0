"""The one table of a run's metrics: name, unit, kind and the event that sets it. Torch-free.

The Prometheus endpoint, TensorBoard and the other trackers show its rows; the dashboard and the alert rules
(monitoring.py) refer to them. Names follow Prometheus' conventions: base units in the name, `_total` on counters,
points in time as seconds since 1970. Counters begin at 0 in every process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from megatron_zaya.telemetry import events as e

JOB_LABELS = ("run", "job_id", "job_user", "job_partition", "cluster_name", "hostname")
"""On every series. All but `run` are those of AMD's device metrics exporter, so that both join on them."""

STEP_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)

Values = float | Mapping[str, float] | None
"""One value, or one for each value of the metric's label, or nothing to say."""


@dataclass(frozen=True)
class Metric:
    """One row: what it is called and where its value comes from."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    event: type
    read: Callable[[Any, float], Values]
    """From an event and its time: what a gauge is set to, a counter grows by, a histogram observes."""
    label: str = ""
    """Its own label besides those of the job; its values are few."""
    tracked: bool = True
    """Whether it is a curve for trackers of experiments."""


def _gauge(name: str, help_text: str, event: type, field: str, label: str = "", tracked: bool = True) -> Metric:
    def read(one: Any, when: float) -> Values:
        value = getattr(one, field)
        if isinstance(value, list):
            return {str(index): float(item) for index, item in enumerate(value)}
        return cast(Values, value)

    return Metric(name, "gauge", help_text, event, read, label, tracked)


def _count(name: str, help_text: str, event: type) -> Metric:
    return Metric(name, "counter", help_text, event, lambda one, when: 1.0, tracked=False)


def _now(name: str, help_text: str, event: type) -> Metric:
    return Metric(name, "gauge", help_text, event, lambda one, when: when, tracked=False)


def _constant(name: str, help_text: str, event: type, value: float) -> Metric:
    return Metric(name, "gauge", help_text, event, lambda one, when: value, tracked=False)


def _causes(one: e.Restarted, when: float) -> Values:
    return {cause: float(one.causes.count(cause)) for cause in one.causes}


RUNNING = "zaya_train_running"
LAST_STEP = "zaya_train_last_step_timestamp_seconds"
COMMITTED = "zaya_checkpoint_last_iteration"
COMMITTED_AT = "zaya_checkpoint_last_timestamp_seconds"
SUSPECTED = "zaya_train_hang_suspected"
RUNNING_HELP = "1 while the process trains, 0 once it has ended in order."
SUSPECTED_HELP = "1 while nothing was heard for ten times the slowest of the last steps."
COMMITTED_HELP = "Iteration of the newest safe step; before the first save, where this process began."
COMMITTED_AT_HELP = "When the newest step was safe; before the first save, when this process began."

METRICS: tuple[Metric, ...] = (
    # -- the run
    _constant(RUNNING, RUNNING_HELP, e.RunStarted, 1.0),
    _constant(RUNNING, RUNNING_HELP, e.RunEnded, 0.0),
    _now("zaya_train_start_timestamp_seconds", "When this process began to train.", e.RunStarted),
    _gauge("zaya_train_attempt", "Attempt of the supervised job, from 0.", e.RunStarted, "attempt", tracked=False),
    Metric("zaya_train_restarts", "gauge", "Ended attempts by cause.", e.Restarted, _causes, "category", tracked=False),
    _gauge("zaya_train_ranks", "Ranks of the run.", e.RunStarted, "world_size", tracked=False),
    _gauge("zaya_train_parameters", "Parameters of the model.", e.RunStarted, "parameters", tracked=False),
    _gauge("zaya_train_target_iterations", "Iterations of the schedule.", e.RunStarted, "train_iters", tracked=False),
    # -- steps
    Metric(
        "zaya_train_step_duration_seconds", "histogram", "Time of an optimizer step.", e.StepDone,
        lambda one, when: one.step_time_s,
    ),
    _count("zaya_train_steps_total", "Optimizer steps of this process.", e.StepDone),
    Metric(
        "zaya_train_tokens_total", "counter", "Tokens trained on by this process.", e.StepDone,
        lambda one, when: round(one.tokens_per_s * one.step_time_s), tracked=False,
    ),
    _gauge("zaya_train_iteration", "Iterations done.", e.StepDone, "iteration", tracked=False),
    _gauge("zaya_train_iteration", "Iterations done.", e.RunStarted, "iteration", tracked=False),
    _now(LAST_STEP, "When the last step ended; before the first, when this process began.", e.StepDone),
    _now(LAST_STEP, "When the last step ended; before the first, when this process began.", e.RunStarted),
    _gauge("zaya_train_consumed_tokens", "Tokens trained on since the run began.", e.StepDone, "consumed_tokens"),
    _gauge("zaya_train_loss", "Training loss, nats per token.", e.StepDone, "loss"),
    _gauge("zaya_train_loss", "Training loss, nats per token.", e.StepSkipped, "loss", tracked=False),
    _gauge("zaya_train_grad_norm", "Norm of the gradient before clipping.", e.StepDone, "grad_norm"),
    _gauge("zaya_train_learning_rate", "Learning rate.", e.StepDone, "learning_rate"),
    _gauge("zaya_train_batch_samples", "Global batch size.", e.StepDone, "global_batch_size"),
    _gauge("zaya_train_tokens_per_second", "Speed over all ranks.", e.StepDone, "tokens_per_s"),
    Metric(
        "zaya_train_model_flops_per_second", "gauge", "Model FLOP/s per accelerator, recomputation not counted.",
        e.StepDone, lambda one, when: one.tflops * 1e12,
    ),
    _gauge("zaya_train_mfu_ratio", "Model FLOP/s over the accelerator's peak.", e.StepDone, "mfu"),
    _count("zaya_train_skipped_steps_total", "Steps left out: loss or gradient not finite.", e.StepSkipped),
    _count("zaya_train_loss_spikes_total", "Losses far above the last ones.", e.LossSpike),
    _gauge("zaya_train_group_grad_norm", "Norm of the gradient by group.", e.GradientNorms, "norms", "group"),
    _gauge("zaya_train_validation_loss", "Loss on held-out text, nats per token.", e.Evaluated, "loss"),
    _gauge("zaya_train_validation_duration_seconds", "Time of the last evaluation.", e.Evaluated, "time_s"),
    # -- experts
    _gauge("zaya_moe_skip_ratio", "Share of (token, layer) pairs that skip.", e.StepDone, "skip_rate"),
    _gauge("zaya_moe_max_expert_load", "Busiest expert, in even shares.", e.StepDone, "max_expert_load"),
    _gauge("zaya_moe_dead_experts", "(Layer, expert) pairs without a token.", e.StepDone, "dead_experts"),
    _gauge("zaya_moe_layer_load_violation", "Busiest expert / even share - 1.", e.MoeHealth, "load_violation", "layer"),
    _gauge(
        "zaya_moe_layer_load_entropy_ratio", "Entropy of the router's choices over its maximum.", e.MoeHealth,
        "load_entropy", "layer",
    ),
    _gauge("zaya_moe_layer_dead_experts", "Experts without a token.", e.MoeHealth, "dead_experts", "layer"),
    _gauge("zaya_moe_layer_skip_ratio", "Share of tokens that skip the layer.", e.MoeHealth, "skip_rate", "layer"),
    # -- memory and waits
    _gauge("zaya_train_device_memory_peak_bytes", "Allocated, fullest rank.", e.MemoryUsed, "device_peak_bytes"),
    _gauge("zaya_train_device_memory_reserved_bytes", "Reserved, fullest rank.", e.MemoryUsed, "device_reserved_bytes"),
    _gauge("zaya_train_host_memory_bytes", "Resident memory of a rank, largest.", e.MemoryUsed, "host_bytes"),
    _gauge("zaya_train_data_wait_seconds", "Wait for samples in a step, longest.", e.Communication, "data_wait_s"),
    _gauge("zaya_train_grad_sync_seconds", "Wait for reduced gradients, longest.", e.Communication, "grad_sync_s"),
    _gauge("zaya_train_busy_median_seconds", "Computing in a step, median rank.", e.Communication, "busy_median_s"),
    _gauge("zaya_train_busy_slowest_seconds", "Computing in a step, slowest.", e.Communication, "busy_slowest_s"),
    _gauge("zaya_train_slowest_rank", "Rank that computed longest.", e.Communication, "slowest_rank", tracked=False),
    # -- checkpoints
    _gauge("zaya_checkpoint_stall_seconds", "Training held up by the last save.", e.Saved, "stall_s"),
    _gauge("zaya_checkpoint_durable_seconds", "From the start of a save until it was safe.", e.Saved, "time_s"),
    _count("zaya_checkpoint_saves_total", "Steps that became safe.", e.Saved),
    _count("zaya_checkpoint_failures_total", "Saves that failed.", e.SaveFailed),
    _gauge(COMMITTED, COMMITTED_HELP, e.Saved, "iteration", tracked=False),
    _gauge(COMMITTED, COMMITTED_HELP, e.RunStarted, "iteration", tracked=False),
    _now(COMMITTED_AT, COMMITTED_AT_HELP, e.Saved),
    _now(COMMITTED_AT, COMMITTED_AT_HELP, e.RunStarted),
    _gauge(
        "zaya_checkpoint_interval_iterations", "Iterations between saves; 0 at the end only.", e.RunStarted,
        "save_interval", tracked=False,
    ),
    _gauge("zaya_checkpoint_load_seconds", "Time to read a step at the start.", e.Loaded, "time_s", tracked=False),
    # -- telemetry itself
    Metric(
        "zaya_telemetry_missed_events", "gauge", "Events that a sink did not get.", e.SinkTrouble,
        lambda one, when: {one.sink: float(one.missed)}, "sink", tracked=False,
    ),
    _constant("zaya_telemetry_sinks_in_trouble", "1 once a sink failed or was too slow.", e.SinkTrouble, 1.0),
    _constant("zaya_telemetry_sinks_in_trouble", "1 once a sink failed or was too slow.", e.RunStarted, 0.0),
)  # fmt: skip


def updates(event: e.Event, when: float) -> Iterator[tuple[Metric, str, float]]:
    """Yield (metric, value of its label, value) for everything that an event says."""
    for metric in BY_EVENT.get(type(event), ()):
        values = metric.read(event, when)
        if isinstance(values, Mapping):
            yield from ((metric, label, float(value)) for label, value in values.items())
        elif values is not None:
            yield metric, "", float(values)


BY_EVENT: dict[type, list[Metric]] = {}
for _metric in METRICS:
    BY_EVENT.setdefault(_metric.event, []).append(_metric)


def curves(event: e.Event) -> dict[str, float]:
    """Return the finite values of an event for trackers of experiments, by `section/name[/label]`."""
    found = {}
    for metric, label, value in updates(event, 0.0):
        if metric.tracked and math.isfinite(value):
            section, name = metric.name.removeprefix("zaya_").split("_", 1)
            found[f"{section}/{name}" + (f"/{label}" if label else "")] = value
    return found


def markdown_table() -> str:
    """Return the table for documentation."""
    lines = ["| metric | kind | label | meaning |", "|---|---|---|---|"]
    rows = {m.name: f"| `{m.name}` | {m.kind} | {m.label} | {m.help} |" for m in METRICS}
    suspicion = f"| `{SUSPECTED}` | gauge | | {SUSPECTED_HELP} |"
    return "\n".join([*lines, *rows.values(), suspicion]) + "\n"


def iteration_of(event: e.Event) -> int | None:
    """Return the iteration that an event belongs to, if any."""
    return getattr(event, "iteration", None)


class MetricState:
    """The metrics as they stand now: what Prometheus reads."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, float]] = {}
        """Gauges and counters: metric, value of its label, value."""
        self.buckets: dict[str, list[int]] = {}
        """Histograms: observations in each of STEP_BUCKETS_S, not cumulated, and beyond them."""
        for metric in METRICS:
            if metric.kind == "counter":
                self.values[metric.name] = {"": 0.0}
            elif metric.kind == "histogram":
                self.values[metric.name] = {"": 0.0}
                self.buckets[metric.name] = [0] * (len(STEP_BUCKETS_S) + 1)

    def handle(self, event: e.Event, when: float) -> None:
        """Take what an event says."""
        for metric, label, value in updates(event, when):
            current = self.values.setdefault(metric.name, {})
            if metric.kind == "gauge":
                current[label] = value
                continue
            current[label] = current.get(label, 0.0) + value
            if metric.kind == "histogram":
                place = sum(value > bound for bound in STEP_BUCKETS_S)
                self.buckets[metric.name][place] += 1
