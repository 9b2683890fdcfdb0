"""The Grafana dashboard, written against the table of metrics; `monitoring/grafana_dashboard.json` is made from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_zaya.telemetry.alerts import series
from megatron_zaya.telemetry.metrics import SUSPECTED

SELECTOR = '{run=~"$run", job_id=~"$job_id"}'
GRID, STAT_HEIGHT, PANEL_HEIGHT = 24, 4, 8


def of(name: str, suffix: str = "") -> str:
    """Return the chosen runs' series of a metric."""
    return series(name, SELECTOR, suffix)


def gpu(name: str) -> str:
    """Return the chosen jobs' series of AMD's device metrics exporter, whose sites may set a prefix."""
    return f'{{__name__=~"(amd_)?{name}", job_id=~"$job_id"}}'


@dataclass(frozen=True)
class Panel:
    """One panel: pairs of query and legend."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8
    log: bool = False


RUN = "{{run}}"
RATE = "[$__rate_interval]"
STEP = "zaya_train_step_duration_seconds"
STEP_RATE = f"sum by (run, le) (rate({of(STEP, '_bucket')}{RATE}))"
LEFT = f"({of('zaya_train_target_iterations')} - {of('zaya_train_iteration')})"
MEAN_STEP = f"rate({of(STEP, '_sum')}{RATE}) / rate({of(STEP, '_count')}{RATE})"
POWER = f"sum by (job_id) ({gpu('gpu_package_power')})"


def _stat(title: str, unit: str, query: str) -> Panel:
    return Panel(title, unit, ((query, RUN),), "stat", 3)


def _curve(title: str, unit: str, *queries: tuple[str, str], log: bool = False) -> Panel:
    return Panel(title, unit, queries, log=log)


def _by_host(title: str, unit: str, operation: str, name: str) -> Panel:
    return _curve(title, unit, (f"{operation} by (hostname) ({gpu(name)})", "{{hostname}}"))


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Now",
        (
            _stat("Progress", "percentunit", f"{of('zaya_train_iteration')} / {of('zaya_train_target_iterations')}"),
            _stat("Time left", "s", f"{LEFT} * {MEAN_STEP}"),
            _stat("Loss", "none", of("zaya_train_loss")),
            _stat("Tokens/s", "short", of("zaya_train_tokens_per_second")),
            _stat("MFU", "percentunit", of("zaya_train_mfu_ratio")),
            _stat("Since the last step", "s", f"time() - {of('zaya_train_last_step_timestamp_seconds')}"),
            _stat("Age of the checkpoint", "s", f"time() - {of('zaya_checkpoint_last_timestamp_seconds')}"),
            _stat("Hang suspected", "bool_yes_no", of(SUSPECTED)),
        ),
    ),
    (
        "Learning",
        (
            _curve(
                "Loss", "none", (of("zaya_train_loss"), f"{RUN} training"),
                (of("zaya_train_validation_loss"), f"{RUN} held-out"),
            ),
            _curve("Gradient norm", "none", (of("zaya_train_grad_norm"), RUN), log=True),
            _curve("Learning rate", "sci", (of("zaya_train_learning_rate"), RUN)),
            _curve("Tokens trained on", "short", (of("zaya_train_consumed_tokens"), RUN)),
            _curve("Batch", "short", (of("zaya_train_batch_samples"), RUN)),
            _curve(
                "Skipped steps and spikes", "none",
                (f"increase({of('zaya_train_skipped_steps_total')}{RATE})", f"{RUN} skipped"),
                (f"increase({of('zaya_train_loss_spikes_total')}{RATE})", f"{RUN} spikes"),
            ),
        ),
    ),
    (
        "Speed",
        (
            _curve(
                "Step", "s", (f"histogram_quantile(0.5, {STEP_RATE})", f"{RUN} median"),
                (f"histogram_quantile(0.99, {STEP_RATE})", f"{RUN} 99 %"), (MEAN_STEP, f"{RUN} mean"),
            ),
            _curve("Tokens/s", "short", (f"rate({of('zaya_train_tokens_total')}{RATE})", RUN)),
            _curve("Model FLOP/s per accelerator", "flops", (of("zaya_train_model_flops_per_second"), RUN)),
            _curve(
                "Waits in a step", "s", (of("zaya_train_data_wait_seconds"), f"{RUN} samples"),
                (of("zaya_train_grad_sync_seconds"), f"{RUN} gradients"),
            ),
            _curve(
                "Computing in a step", "s", (of("zaya_train_busy_median_seconds"), f"{RUN} median rank"),
                (of("zaya_train_busy_slowest_seconds"), f"{RUN} slowest rank"),
            ),
            _curve("Slowest rank", "none", (of("zaya_train_slowest_rank"), RUN)),
        ),
    ),
    (
        "Experts",
        (
            _curve("Load violation by layer", "none", (of("zaya_moe_layer_load_violation"), "layer {{layer}}")),
            _curve("Entropy by layer", "percentunit", (of("zaya_moe_layer_load_entropy_ratio"), "layer {{layer}}")),
            _curve("Skipping by layer", "percentunit", (of("zaya_moe_layer_skip_ratio"), "layer {{layer}}")),
            _curve("Dead experts by layer", "none", (of("zaya_moe_layer_dead_experts"), "layer {{layer}}")),
            _curve("Busiest expert, even shares", "none", (of("zaya_moe_max_expert_load"), RUN)),
            _curve(
                "Skipped tokens, dead experts", "none", (of("zaya_moe_skip_ratio"), f"{RUN} skipped share"),
                (of("zaya_moe_dead_experts"), f"{RUN} dead experts"),
            ),
        ),
    ),
    (
        "Checkpoints, memory, restarts",
        (
            _curve(
                "Save", "s", (of("zaya_checkpoint_stall_seconds"), f"{RUN} training held up"),
                (of("zaya_checkpoint_durable_seconds"), f"{RUN} until safe"),
            ),
            _curve(
                "Iterations that would be lost", "none",
                (f"{of('zaya_train_iteration')} - {of('zaya_checkpoint_last_iteration')}", RUN),
            ),
            _curve(
                "Saves", "none", (of("zaya_checkpoint_saves_total"), f"{RUN} safe"),
                (of("zaya_checkpoint_failures_total"), f"{RUN} failed"),
            ),
            _curve(
                "Memory of the fullest rank", "bytes", (of("zaya_train_device_memory_peak_bytes"), f"{RUN} allocated"),
                (of("zaya_train_device_memory_reserved_bytes"), f"{RUN} reserved"),
                (of("zaya_train_host_memory_bytes"), f"{RUN} host"),
            ),
            _curve("Attempt", "none", (of("zaya_train_attempt"), RUN)),
            _curve(
                "Restarts by cause", "none",
                (f"sum by (category) ({of('zaya_train_restarts')}) or on() vector(0)", "{{category}}"),
            ),
        ),
    ),
    (
        "Accelerators (AMD device metrics exporter)",
        (
            _by_host("Busy", "percent", "avg", "gpu_gfx_activity"),
            _curve("Power", "watt", (POWER, "job {{job_id}}")),
            _by_host("Hottest junction", "celsius", "max", "gpu_junction_temperature"),
            _by_host("Video memory, fullest", "decmbytes", "max", "gpu_used_vram"),
            _by_host("Uncorrectable errors", "none", "sum", "gpu_ecc_uncorrect_total"),
            _curve(
                "Tokens per joule", "none",
                (f"sum by (job_id) ({of('zaya_train_tokens_per_second')}) / {POWER}", "job {{job_id}}"),
            ),
        ),
    ),
)  # fmt: skip

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    stat = panel.kind == "stat"
    targets = [
        {"datasource": DATASOURCE, "expr": query, "legendFormat": legend, "refId": chr(ord("A") + place)}
        | ({"instant": True} if stat else {})
        for place, (query, legend) in enumerate(panel.queries)
    ]
    custom = {"lineWidth": 1, "scaleDistribution": {"type": "log", "log": 10} if panel.log else {"type": "linear"}}
    defaults: dict[str, Any] = {"unit": panel.unit, "custom": {} if stat else custom}
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}}
    if stat:
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "textMode": "auto"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": STAT_HEIGHT if stat else PANEL_HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def _panels() -> list[dict[str, Any]]:
    """Return rows and panels, laid out from the top left."""
    result: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROWS:
        position = {"x": 0, "y": y, "w": GRID, "h": 1}
        number = len(result) + 1
        result.append(
            {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": position, "panels": []}
        )
        x, y = 0, y + 1
        for panel in panels:
            if x + panel.width > GRID:
                x, y = 0, y + result[-1]["gridPos"]["h"]
            result.append(_panel(panel, len(result) + 1, x, y))
            x += panel.width
        y += result[-1]["gridPos"]["h"]
    return result


def _variable(name: str, label: str) -> dict[str, Any]:
    query = f"label_values({series('zaya_train_iteration')}, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "title": "ZAYA training",
        "uid": "zaya-training",
        "tags": ["zaya"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, _variable("run", "Run"), _variable("job_id", "Job")]},
        "panels": _panels(),
    }


def dashboard_file() -> str:
    """Return the text of `monitoring/grafana_dashboard.json`."""
    return json.dumps(dashboard(), indent=1) + "\n"
