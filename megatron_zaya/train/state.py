"""Where a run stands, and everything its steps need, built once by setup.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_zaya.config import RunConfig
from megatron_zaya.optim.balancing import BiasBalancer
from megatron_zaya.parallel.pipeline import ZayaP2PCommunicator
from megatron_zaya.telemetry.heartbeat import Heartbeat
from megatron_zaya.telemetry.stream import EventStream
from megatron_zaya.train.timing import StepTimer


@dataclass
class TrainState:
    """The cursor of a run; saved with every checkpoint."""

    iteration: int = 0
    consumed_samples: int = 0
    data_fingerprint: str = ""
    """Identity of the sample order, so that a resume with other data is noticed."""
    skipped_steps: int = 0
    """Steps that were left out because their loss or gradient was not finite."""
    balancing_updates: int = 0
    """Updates of the balancing biases."""


@dataclass
class TrainingJob:
    """One rank's view of the run."""

    config: RunConfig
    device: torch.device
    pg_collection: ProcessGroupCollection
    model: list[DistributedDataParallel]
    """One entry per virtual pipeline stage of this rank."""
    p2p: ZayaP2PCommunicator
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    balancer: BiasBalancer
    train_data: list[Iterator[dict[str, torch.Tensor]]]
    """The same batches once for each entry of ``model``."""
    valid_dataset: Any
    state: TrainState
    events: EventStream
    resumed_from: str | None = None
    attempt: int = 0
    """Of a supervised job; 0 is its first start."""
    stop_signal: int = 0
    """Number of the signal that asked for a stop; 0 if none."""
    save_asked: bool = False
    """A wish of this rank alone, such as a switch file that it found; the next step tells the others."""
    save_agreed: bool = False
    """Some rank wished it before the last step, and all ranks know: save now."""
    skipped_in_a_row: int = 0
    """Steps without a finite loss since the last good one."""
    heartbeat: Heartbeat = field(default_factory=lambda: Heartbeat(None))
    timer: StepTimer = field(default_factory=lambda: StepTimer(torch.device("cpu")))
    data_wait_s: float = 0.0
    """How long this rank waited for samples in the step at hand."""
    peak_tflops: float | None = None
    """Of one accelerator; None if it is not known."""
    parameters: tuple[int, int] = field(default=(0, 0))
    """Parameters of the whole model: all, and active per token without the embedding."""
    optimizer_summary: str = ""
    """What goes to which optimizer, in one line."""

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different sequences."""
        return self.pg_collection.dp.size()

    @property
    def health_due(self) -> bool:
        """Whether the last step is one whose health is reported. All ranks agree."""
        every, done = self.config.telemetry.health_interval, self.state.iteration
        return done % every == 0 or done in (1, self.config.schedule.train_iters)

    @property
    def num_microbatches(self) -> int:
        """Forward passes of the next optimizer step on this rank."""
        return self.global_batch_size // (self.config.schedule.micro_batch_size * self.data_parallel_size)

    @property
    def global_batch_size(self) -> int:
        """Samples of the next optimizer step over all ranks."""
        return self.config.schedule.batch_size_at(self.state.consumed_samples)
