"""Switch files in the run folder, for whoever cannot send a signal: STOP saves and ends the run, SAVE saves now.

Rank 0 looks after every step; what it finds takes effect on all ranks after the next one, when they agree on it.
"""

from __future__ import annotations

import signal
from pathlib import Path

from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.state import TrainingJob


class SwitchFiles(Callback):
    """Looks for `STOP` and `SAVE`, and removes what it has obeyed."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def after_step(self, job: TrainingJob) -> None:
        """Ask for what the files ask for."""
        if self.rank:
            return
        if self._taken("STOP"):
            job.stop_signal = job.stop_signal or signal.SIGTERM
        if self._taken("SAVE"):
            job.save_asked = True

    def _taken(self, name: str) -> bool:
        try:
            (self.folder / name).unlink()
        except FileNotFoundError:
            return False
        return True
