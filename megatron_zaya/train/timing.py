"""How long a rank computes in a step before it waits for the others: what tells a slow rank from its victims.

All ranks of a synchronous step take equally long. The time until a rank's gradients are ready to be reduced is its own
(plus that of its tensor- and pipeline-parallel neighbours). On an accelerator it is measured by events on the stream
and read a step later, so that nothing waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class BusyTimer:
    """Measures from `start` to `stop`; `seconds` is the last finished measurement."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.seconds = 0.0
        self._begin: float | torch.cuda.Event = 0.0
        self._pending: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begin a step."""
        if self._pending is not None and self._pending[1].query():
            self.seconds = self._pending[0].elapsed_time(self._pending[1]) / 1e3
        self._begin = self._now()

    def stop(self) -> None:
        """The gradients of this rank are there."""
        end = self._now()
        if self.on_device:
            self._pending = (self._begin, end)
        else:
            self.seconds = end - self._begin

    def before(self, function: Callable) -> Callable:
        """Return ``function`` with `stop` in front of it."""

        def timed(*args, **kwargs):
            self.stop()
            return function(*args, **kwargs)

        return timed
