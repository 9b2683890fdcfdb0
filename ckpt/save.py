"""One save under way, as the training loop sees it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Save:
    """What became of a save. The rank that commits (the first) knows about the step, the others about their part."""

    iteration: int
    size: int
    """Bytes of this rank's file."""
    save_id: str = ""
    """Differs for any two saves, equal on all ranks."""
    stall_s: float = 0.0
    """Seconds for which the call held training up."""
    waited_s: float = 0.0
    """Seconds of them spent waiting for the save before; 0 is normal."""
    local_s: float | None = None
    """Seconds until this rank's file was safe on the node's own disk; None while it is not, or without such a tier."""
    part_s: float | None = None
    """Seconds until this rank's file was safe on the disk; None while it is not."""
    durable_s: float | None = None
    """Seconds until the step was complete and safe; None while it is not. Known on the committing rank."""
    path: Path | None = None
    error: str | None = None
    """Why there is no step; None if all is well so far."""
    commits: bool = False
    """Whether this rank commits."""
    started: float = field(default_factory=time.monotonic)
    reported: bool = False

    @property
    def done(self) -> bool:
        """Whether nothing more will happen to this save, good or bad, that this rank hears of."""
        return self.error is not None or (self.durable_s if self.commits else self.part_s) is not None

    @property
    def holds_arena(self) -> bool:
        """Whether the staging memory is still needed for this save."""
        return not self.done and self.part_s is None and self.local_s is None

    @property
    def failed(self) -> bool:
        """Whether there will be no step."""
        return self.error is not None
