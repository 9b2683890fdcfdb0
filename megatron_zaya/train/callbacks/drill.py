"""Fire drills: a fault on purpose, so that the way back is known before it is needed.

`zaya submit --drill 'crash:rank=1,iteration=3'`, several separated by `;`. Every drill happens in one attempt only
(`attempt=0` unless given), after the given iteration:

    crash   an exception in user code          kill    SIGKILL, as by the kernel when memory runs out
    hang    the rank sleeps for ever           stop    SIGSTOP: it does not even answer
    slow    every micro-batch comes `seconds=0.2` late from then on
    nan     a weight becomes NaN
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_zaya.config.errors import ConfigError
from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.state import TrainingJob

KINDS = ("crash", "kill", "hang", "stop", "slow", "nan")


@dataclass(frozen=True)
class Drill:
    """One fault."""

    kind: str
    rank: int
    iteration: int
    attempt: int = 0
    seconds: float = 0.2


def parse_drills(text: str) -> list[Drill]:
    """Read `kind:key=value,...;...`.

    Raises:
        ConfigError: an unknown kind or key, or no number.
    """
    drills = []
    for part in filter(None, (item.strip() for item in text.split(";"))):
        kind, _, settings = part.partition(":")
        try:
            values = dict(item.split("=") for item in settings.split(","))
            if kind not in KINDS:
                raise ValueError(f"kinds are {', '.join(KINDS)}")
            seconds = float(values.pop("seconds", 0.2))
            drills.append(Drill(kind, seconds=seconds, **{key: int(value) for key, value in values.items()}))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"drill {part!r}: {error}; write crash:rank=1,iteration=3") from None
    return drills


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
