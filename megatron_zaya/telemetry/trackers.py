"""Trackers of experiments: TensorBoard, Weights & Biases, MLflow. Each needs its package, which is asked for by name.

All show the tracked rows of the metrics' table, with equal names. A run that goes on from a checkpoint continues its
curves; steps that are done again replace the earlier ones where the tracker can.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_zaya.telemetry.events import Event, RunStarted
from megatron_zaya.telemetry.metrics import curves, iteration_of

if TYPE_CHECKING:
    from megatron_zaya.config.sections import TelemetryConfig


def missing_packages(telemetry: TelemetryConfig) -> list[str]:
    """Return what the configured trackers lack, one sentence each with the remedy."""
    wanted = {
        "tensorboard": (telemetry.tensorboard, "tensorboard", "telemetry.tensorboard=false"),
        "wandb": (telemetry.wandb != "off", "wandb", "telemetry.wandb=off"),
        "mlflow": (telemetry.mlflow_tracking_uri is not None, "mlflow", "telemetry.mlflow_tracking_uri=null"),
    }
    return [
        f"telemetry asks for {module}, which is not installed: pip install 'megatron-zaya[{extra}]', or set {off}"
        for module, (asked, extra, off) in wanted.items()
        if asked and find_spec(module) is None
    ]


class Tracker:
    """What the trackers share: an event becomes the curves of its iteration."""

    def handle(self, event: Event, when: float) -> None:
        """Log the curves of an event."""
        if isinstance(event, RunStarted):
            self.begin(event)
        iteration, values = iteration_of(event), curves(event)
        if values and iteration is not None:
            self.log(values, iteration, when)

    def begin(self, event: RunStarted) -> None:
        """Learn where the run stands."""

    def log(self, values: dict[str, float], iteration: int, when: float) -> None:
        """Add a point to each curve."""
        raise NotImplementedError


class TensorBoardSink(Tracker):
    """Event files in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def open(self) -> None:
        """Nothing yet: `begin` says from where on earlier curves are overwritten."""

    def begin(self, event: RunStarted) -> None:
        """Open a file whose steps replace those after the checkpoint."""
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self.writer = SummaryWriter(str(self.folder), purge_step=event.iteration + 1, flush_secs=30)

    def log(self, values: dict[str, float], iteration: int, when: float) -> None:
        """Add a point to each curve, all in one record: a tenth of the work of one for each."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.file_writer.add_summary(Summary(value=points), iteration, when)

    def close(self) -> None:
        """Flush."""
        if self.writer is not None:
            self.writer.close()


class WandbSink(Tracker):
    """A run of Weights & Biases; "offline" writes below ``folder`` for `wandb sync`."""

    def __init__(self, folder: Path, project: str, name: str, mode: str, config: dict[str, Any]) -> None:
        self.settings = dict(project=project, name=name, mode=mode, config=config, dir=str(folder))

    def open(self) -> None:
        """Begin a run."""
        import wandb

        self.run: Any = wandb.init(**self.settings)
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")

    def log(self, values: dict[str, float], iteration: int, when: float) -> None:
        """Add a point to each curve."""
        self.run.log({**values, "iteration": iteration})

    def close(self) -> None:
        """End the run."""
        self.run.finish()


class MlflowSink(Tracker):
    """A run of MLflow at ``tracking_uri``: a server, or `sqlite:///` or `file:` for this machine."""

    def __init__(self, tracking_uri: str, experiment: str, name: str, config: dict[str, Any]) -> None:
        self.tracking_uri, self.experiment, self.name, self.config = tracking_uri, experiment, name, config

    def open(self) -> None:
        """Begin a run."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client: Any = MlflowClient(self.tracking_uri)
        known = self.client.get_experiment_by_name(self.experiment)
        experiment_id = known.experiment_id if known else self.client.create_experiment(self.experiment)
        self.run_id: str = self.client.create_run(experiment_id, run_name=self.name).info.run_id
        sections = {name: values for name, values in self.config.items() if isinstance(values, dict)}
        for section, values in sections.items():  # a call takes 100 parameters at most
            params = [Param(f"{section}.{key}", str(value)) for key, value in values.items()]
            self.client.log_batch(self.run_id, params=params)

    def log(self, values: dict[str, float], iteration: int, when: float) -> None:
        """Add a point to each curve."""
        from mlflow.entities import Metric

        points = [Metric(name, value, int(when * 1e3), iteration) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=points)

    def close(self) -> None:
        """End the run."""
        self.client.set_terminated(self.run_id)
