"""The trackers of experiments, each read back with its own package; those that are not installed are named."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest

from megatron_zaya.config.sections import TelemetryConfig
from megatron_zaya.telemetry.events import MoeHealth
from megatron_zaya.telemetry.metrics import curves
from megatron_zaya.telemetry.stream import EventStream
from megatron_zaya.telemetry.trackers import MlflowSink, TensorBoardSink, WandbSink, missing_packages
from tests.telemetry.test_sinks import EVENTS, START, step

HEALTH = MoeHealth(40, [[1.5, 0.5], [1.0, 1.0]], [0.5, 0.0], [0.8, 1.0], [0, 0], [0.1, 0.2])


def feed(sink, events=(*EVENTS, HEALTH)) -> None:
    stream = EventStream([sink])
    for event in events:
        stream.emit(event)
    runner = stream.runners[0]
    stream.close(timeout_s=120)
    assert not runner.failed


def test_curves_have_the_names_of_the_table():
    assert curves(step(1))["train/loss"] == 2.5
    assert curves(HEALTH)["moe/layer_load_violation/0"] == 0.5
    assert "train/mfu_ratio" not in curves(step(1)), "what is not known is not drawn"
    assert curves(replace(step(1), loss=float("nan"))).get("train/loss") is None


def test_tensorboard_shows_the_curves_of_all_lives_of_a_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    feed(TensorBoardSink(tmp_path))
    feed(TensorBoardSink(tmp_path), [replace(START, iteration=30), *(step(i, 1.0) for i in range(31, 36))])
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    losses = {point.step: point.value for point in accumulator.Scalars("train/loss")}
    assert losses == pytest.approx({i: 5.0 - i / 20 if i <= 30 else 1.0 for i in range(1, 36)})
    assert accumulator.Scalars("train/step_duration_seconds")[0].value == 0.25


def test_wandb_writes_an_offline_run(tmp_path):
    pytest.importorskip("wandb")
    feed(WandbSink(tmp_path, "zaya", "test", "offline", {"run": {"seed": 1}}))
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"moe/layer_load_violation" in record.read_bytes()


def test_mlflow_keeps_curves_and_parameters(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    feed(MlflowSink(uri, "zaya", "test", {"run": {"seed": 7}}))
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("zaya").experiment_id])
    assert (run.info.status, run.data.params["run.seed"]) == ("FINISHED", "7")
    losses = [point.value for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert losses == [5.0 - i / 20 for i in range(1, 41)]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_tracker_without_its_package_is_refused_with_the_remedy():
    (reason,) = missing_packages(TelemetryConfig(wandb="offline"))
    assert "pip install 'megatron-zaya[wandb]'" in reason
    assert "telemetry.wandb=off" in reason
    assert missing_packages(TelemetryConfig()) == []
