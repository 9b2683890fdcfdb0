"""From the section `telemetry` of a run to its sinks. Called on the first rank."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_zaya.config import RunConfig
from megatron_zaya.telemetry.console import PlainConsole
from megatron_zaya.telemetry.curve import LossCurveSink
from megatron_zaya.telemetry.jsonl import JsonlSink
from megatron_zaya.telemetry.live import LiveConsole
from megatron_zaya.telemetry.stream import Sink
from megatron_zaya.telemetry.trackers import MlflowSink, TensorBoardSink, WandbSink


def _prometheus(config: RunConfig, job_labels: Mapping[str, str]) -> Sink:
    from megatron_zaya.telemetry.prometheus import PrometheusSink, TextfileSink  # an HTTP server: only where asked for

    telemetry, labels = config.telemetry, {"run": config.run.name, **job_labels}
    if telemetry.prometheus == "http":
        return PrometheusSink(labels, telemetry.prometheus_host, telemetry.prometheus_port)
    return TextfileSink(labels, Path(str(telemetry.prometheus_textfile_dir)), telemetry.prometheus_textfile_interval_s)


def build_sinks(config: RunConfig, job_labels: Mapping[str, str]) -> list[Sink]:
    """Return the sinks of a run.

    Args:
        config: the run; its folder exists.
        job_labels: the job as the scheduler names it, for Prometheus.
    """
    telemetry, folder = config.telemetry, config.run_dir
    live = telemetry.live == "on" or (telemetry.live == "auto" and sys.stdout.isatty())
    sinks: list[Sink] = [LiveConsole() if live else PlainConsole(telemetry.log_interval)]
    sinks.append(JsonlSink(folder / "metrics.jsonl"))
    if telemetry.loss_curve:
        sinks.append(LossCurveSink(folder / "metrics.jsonl", folder / "loss_curve.png"))
    if telemetry.prometheus != "off":
        sinks.append(_prometheus(config, job_labels))
    if telemetry.tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    resolved = config.model_dump(mode="json")
    if telemetry.wandb != "off":
        sinks.append(WandbSink(folder, telemetry.wandb_project, config.run.name, telemetry.wandb, resolved))
    if telemetry.mlflow_tracking_uri is not None:
        uri, experiment = telemetry.mlflow_tracking_uri, telemetry.mlflow_experiment
        sinks.append(MlflowSink(uri, experiment, config.run.name, resolved))
    return sinks
