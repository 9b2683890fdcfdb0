"""RunConfig: the whole tree, and where the run lies on disk."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

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
