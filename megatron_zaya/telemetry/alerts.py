"""The alert rules of a run, written against the table of metrics; `monitoring/alerts.yaml` is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from megatron_zaya.telemetry.metrics import METRICS, SUSPECTED

NAMES = frozenset(metric.name for metric in METRICS) | {SUSPECTED}


def series(name: str, selector: str = "", suffix: str = "") -> str:
    """Return ``name`` as it stands in a query. Raises KeyError for a metric that is not in the table."""
    if name not in NAMES:
        raise KeyError(f"{name} is not in the table of metrics")
    return f"{name}{suffix}{selector}"


@dataclass(frozen=True)
class Alert:
    """One rule. ``lasting`` is how long the expression must hold."""

    name: str
    expression: str
    lasting: str
    severity: str
    summary: str
    action: str


LOSS = series("zaya_train_loss")
SKIPPED = series("zaya_train_skipped_steps_total")
RUNNING = series("zaya_train_running")
FLOPS = series("zaya_train_model_flops_per_second")
ATTEMPT = series("zaya_train_attempt")
BEHIND = f"{series('zaya_train_iteration')} - {series('zaya_checkpoint_last_iteration')}"
INTERVAL = series("zaya_checkpoint_interval_iterations")
SAVED_AT = series("zaya_checkpoint_last_timestamp_seconds")
BUSY = series("zaya_train_busy_median_seconds")
JOB = "run, job_id, cluster_name"

ALERTS: tuple[Alert, ...] = (
    Alert(
        "ZayaNoStep",
        f"time() - {series('zaya_train_last_step_timestamp_seconds')} > 600 and {RUNNING} == 1",
        "0m",
        "critical",
        "no optimizer step for ten minutes",
        "The supervisor ends a hang by itself; without one, look at the stacks (SIGUSR2) and at the slowest rank.",
    ),
    Alert(
        "ZayaHangSuspected",
        f"{series(SUSPECTED)} == 1",
        "1m",
        "warning",
        "nothing heard for ten times the usual step",
        "See whether an evaluation or a slow save explains it before a rank is blamed.",
    ),
    Alert(
        "ZayaTrainerGone",
        f"last_over_time({RUNNING}[15m]) == 1 unless {RUNNING}",
        "1m",
        "warning",
        "the endpoint of a run that had not ended is gone",
        "The job died, was requeued, or ended between two scrapes: its log and events.jsonl say which.",
    ),
    Alert(
        "ZayaLossNotFinite",
        f"{LOSS} != {LOSS} or abs({LOSS}) == Inf or increase({SKIPPED}[10m]) > 0",
        "0m",
        "critical",
        "the loss or the gradient is not finite",
        "See the report of ranks and parameters in the log; schedule.nan_policy decides what happens to the step.",
    ),
    Alert(
        "ZayaLossSpike",
        f"increase({series('zaya_train_loss_spikes_total')}[10m]) > 0",
        "0m",
        "warning",
        "the loss jumped far above the last ones",
        "Compare gradient norms and data around the iteration; go back to a checkpoint if it does not recover.",
    ),
    Alert(
        "ZayaCheckpointTooOld",
        f"({BEHIND} > 2.5 * {INTERVAL} and {INTERVAL} > 0) or (time() - {SAVED_AT} > 21600 and {RUNNING} == 1)",
        "0m",
        "critical",
        "too much work would be lost: no checkpoint for 2.5 save intervals, or for six hours",
        "Look for failed saves and at the file system; a file SAVE in the run folder asks for a save now.",
    ),
    Alert(
        "ZayaCheckpointFailed",
        f"increase({series('zaya_checkpoint_failures_total')}[1h]) > 0",
        "0m",
        "warning",
        "a checkpoint could not be written",
        "The log has the reason: quota, full disk, file server. Earlier steps are valid.",
    ),
    Alert(
        "ZayaExpertCollapse",
        f"{series('zaya_moe_layer_load_entropy_ratio')} < 0.5 or {series('zaya_moe_layer_dead_experts')} > 0",
        "15m",
        "warning",
        "a layer uses few of its experts",
        "See optimizer.moe_router_bias_update_rate, and the history of the layer's load in the report.",
    ),
    Alert(
        "ZayaMfuDrop",
        f"avg_over_time({FLOPS}[10m]) < 0.8 * quantile_over_time(0.5, {FLOPS}[6h])",
        "10m",
        "warning",
        "model FLOP/s (and MFU) fell by a fifth below the usual",
        "Look at the straggler, at waits for data, at clocks and temperatures of the accelerators.",
    ),
    Alert(
        "ZayaStraggler",
        f"{series('zaya_train_busy_slowest_seconds')} > 1.3 * {BUSY}",
        "10m",
        "warning",
        "one rank computes much longer than the median",
        "zaya_train_slowest_rank names it; drain its node if preflight finds it slow as well.",
    ),
    Alert(
        "ZayaDataWait",
        f"{series('zaya_train_data_wait_seconds')} > 0.1 * {BUSY}",
        "10m",
        "warning",
        "steps wait for samples",
        "Raise data.num_workers, or move the data to faster storage.",
    ),
    Alert(
        "ZayaRestartLoop",
        f"max by ({JOB}) ({ATTEMPT}) - min by ({JOB}) (min_over_time({ATTEMPT}[1h])) >= 3",
        "0m",
        "critical",
        "the job restarted three times within an hour",
        "zaya_train_restarts tells the causes; the incident reports of the job folder tell more.",
    ),
    Alert(
        "ZayaTelemetryTrouble",
        f"{series('zaya_telemetry_sinks_in_trouble')} > 0",
        "0m",
        "info",
        "a consumer of the run's events failed or was too slow",
        "Training is not affected; the log names the sink and the reason.",
    ),
)


def rules() -> dict[str, Any]:
    """Return the rules as Prometheus reads them."""
    entries = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": alert.lasting,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": f"{{{{ $labels.run }}}} (job {{{{ $labels.job_id }}}}): {alert.summary}",
                "description": alert.action,
            },
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "zaya", "rules": entries}]}


def rules_file() -> str:
    """Return the text of `monitoring/alerts.yaml`."""
    head = "# Made by `zaya telemetry rules` from megatron_zaya/telemetry/alerts.py; a test keeps it up to date.\n"
    return head + yaml.safe_dump(rules(), sort_keys=False, width=120)
