"""RunConfig: the whole tree, and where the run lies on disk."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from megatron_zaya.config.phases import phase_configs
from megatron_zaya.config.profile import ProfileConfig
from megatron_zaya.config.sections import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PhaseConfig,
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
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    phases: list[PhaseConfig] = Field(default_factory=list)
    """Parts of the run, one after the other; empty: the run is one part (see config/phases.py)."""

    @model_validator(mode="after")
    def _check_phases(self) -> RunConfig:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phases have equal names: {names}")
        if self.phases:
            phase_configs(self)
        return self

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.dir.format(name=self.run.name))

    @property
    def checkpoint_dir(self) -> Path:
        """Where this run saves."""
        return self.run_dir / "checkpoints"

    @property
    def local_checkpoint_dir(self) -> Path | None:
        """Where this run saves first, on each node's own disk; None without that tier."""
        folder = self.checkpoint.local_dir
        return None if folder is None else Path(folder.format(name=self.run.name)) / "checkpoints"
