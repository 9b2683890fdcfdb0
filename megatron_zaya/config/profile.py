"""The section `profile` of a run file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from megatron_zaya.config.sections import Section


class ProfileConfig(Section):
    """Which steps are profiled (`zaya profile` sets this); traces and summaries go to `profile/` in the run folder."""

    profile_step_start: PositiveInt | None = None
    """Recording begins after this iteration; None records nothing."""
    profile_step_end: PositiveInt | None = None
    """The last iteration that is recorded; None: three after the start."""
    profile_ranks: Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(default=[0])
    record_memory_history: bool = False
    """Also write the allocator's history for pytorch.org/memory_viz (on an accelerator)."""

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        start, end = self.profile_step_start, self.profile_step_end
        if end is not None and (start is None or end <= start):
            raise ValueError(f"profile_step_end={end} must be above profile_step_start={start}")
        return self

    @property
    def last_iteration(self) -> int | None:
        """The last iteration that is recorded; None if none is."""
        if self.profile_step_start is None:
            return None
        return self.profile_step_end or self.profile_step_start + 3
