"""Lets the faults of a fire drill happen; `megatron_zaya/config/drill.py` says which there are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from megatron_zaya.config.drill import Drill, parse_drills
from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.state import TrainingJob


def _late(data: Iterator[Any], seconds: float) -> Iterator[Any]:
    for batch in data:
        time.sleep(seconds)
        yield batch


class Drills(Callback):
    """Lets the faults of this rank and attempt happen."""

    def __init__(self, text: str, rank: int, attempt: int) -> None:
        self.own = [drill for drill in parse_drills(text) if (drill.rank, drill.attempt) == (rank, attempt)]

    def after_step(self, job: TrainingJob) -> None:
        """Fail when it is time."""
        for drill in self.own:
            if drill.iteration == job.state.iteration:
                self._fail(drill, job)

    def _fail(self, drill: Drill, job: TrainingJob) -> None:
        if drill.kind == "slow":
            job.train_data = [_late(data, drill.seconds) for data in job.train_data]
        if drill.kind == "nan":
            next(job.model[0].parameters()).data.view(-1)[0] = float("nan")
        if drill.kind == "crash":
            raise RuntimeError(f"drill: rank {drill.rank} crashes after iteration {drill.iteration}")
        if drill.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if drill.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        while drill.kind == "hang":
            time.sleep(1.0)
