"""RunConfig: the whole tree, the checks that need more than one section, and derived sizes."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megatron_zaya.config.errors import ConfigError
from megatron_zaya.config.sections import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunSection,
    ScheduleConfig,
    Section,
    TelemetryConfig,
)


class RunConfig(Section):
    """Everything that decides what a run computes. The resolved tree is written into the run folder."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelConfig = Field(default_factory=ModelConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.dir.format(name=self.run.name))

    @property
    def checkpoint_dir(self) -> Path:
        """Where this run saves."""
        return self.run_dir / "checkpoints"

    def data_parallel_size(self, world_size: int) -> int:
        """Return the data-parallel size that ``world_size`` ranks leave.

        Raises:
            ConfigError: the world does not divide, or the global batch does not.
        """
        p = self.parallel
        model_ranks = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
        if world_size % model_ranks:
            raise ConfigError(
                f"parallel: {world_size} ranks cannot be divided by tensor x pipeline x context = "
                f"{model_ranks}; change --nproc (or the number of nodes) or the parallel sizes"
            )
        data_parallel = world_size // model_ranks
        per_step = self.schedule.micro_batch_size * data_parallel
        if self.schedule.global_batch_size % per_step:
            raise ConfigError(
                f"schedule.global_batch_size={self.schedule.global_batch_size} must be a multiple of "
                f"micro_batch_size x data-parallel size = {self.schedule.micro_batch_size} x {data_parallel} = "
                f"{per_step}"
            )
        return data_parallel
