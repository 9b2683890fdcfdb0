"""How long a rank computes in a step before it waits for the others: what tells a slow rank from its victims.

All ranks of a synchronous step take equally long. The time until a rank's gradients are ready to be reduced is its own
(plus that of its tensor- and pipeline-parallel neighbours); what follows is the part of the reduction that nothing
hides. On an accelerator both are measured by events on the stream and read a step later: nothing waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class StepTimer:
    """Three marks in a step: its start, gradients complete, gradients reduced. Holds the last finished measurement."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.busy_s = 0.0
        """From the start until the gradients of this rank were complete."""
        self.grad_sync_s = 0.0
        """From there until they were reduced."""
        self._marks: list = []

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        if len(self._marks) < 3 or (self.on_device and not self._marks[2].query()):
            return
        if self.on_device:
            spans = [a.elapsed_time(b) / 1e3 for a, b in zip(self._marks, self._marks[1:], strict=False)]
        else:
            spans = [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]
        self.busy_s, self.grad_sync_s = spans

    def start(self) -> None:
        """Begin a step."""
        self._read()
        self._marks = [self._now()]

    def around(self, reduction: Callable) -> Callable:
        """Return the function that reduces gradients, with a mark before and after it."""

        def timed(*args, **kwargs):
            self._marks[1:] = [self._now()]
            result = reduction(*args, **kwargs)
            self._marks.append(self._now())
            if not self.on_device:
                self._read()
            return result

        return timed
