"""What watches over the numbers of a run: steps without a finite loss or gradient, and sudden jumps of the loss."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import torch

from megatron_zaya.train.errors import TrainingError
from megatron_zaya.train.state import TrainingJob

NAMED_PARAMETERS = 5


def leave_out(job: TrainingJob, what: str, local_loss_is_finite: bool) -> None:
    """Count a step that was left out. Collective, with equal ``what`` on all ranks; the parameters did not change.

    Args:
        job: the run.
        what: what is not finite, and its value.
        local_loss_is_finite: of the micro-batches of this rank.

    Raises:
        TrainingError: `schedule.nan_policy` does not let the step be left out, or not any more; names ranks and
            parameters.
    """
    schedule = job.config.schedule
    job.skipped_in_a_row += 1
    job.state.skipped_steps += 1
    if schedule.nan_policy == "skip" and job.skipped_in_a_row <= schedule.nan_limit:
        return
    before = f" ({schedule.nan_limit} steps before it were skipped)" if schedule.nan_policy == "skip" else ""
    raise TrainingError(
        f"iteration {job.state.iteration + 1}: {what}{before}; the parameters are those of the last good iteration. "
        f"{_culprits(job, local_loss_is_finite)}. Lower optimizer.lr, or look at the data of this step"
    )


def _culprits(job: TrainingJob, local_loss_is_finite: bool) -> str:
    """Say which ranks saw a loss, and which parameters have a gradient, that is not finite."""
    parameters = job.optimizer.parameters_without_finite_gradient()
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (local_loss_is_finite, parameters))
    loss = [rank for rank, (finite, _) in enumerate(found) if not finite]
    parts = [f"the loss of rank {', '.join(map(str, loss))} is not finite"] if loss else []
    for rank, (_, names) in enumerate(found):
        if names:
            more = f" and {len(names) - NAMED_PARAMETERS} more" if len(names) > NAMED_PARAMETERS else ""
            parts.append(f"rank {rank} owns gradients that are not: {', '.join(names[:NAMED_PARAMETERS])}{more}")
    return "; ".join(parts) or "no single rank's loss and no gradient by itself is at fault"


class SpikeDetector:
    """Finds losses far above those of the last steps, in units of their own spread (robust: median, mean deviation)."""

    def __init__(self, threshold: float, window: int) -> None:
        """Flag a loss ``threshold`` deviations above the median of the last ``window``; 0 flags nothing."""
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=window)

    def observe(self, loss: float) -> float | None:
        """Take the loss of a step; return how many deviations it is above the others if that is a spike."""
        spike = None
        if self.threshold and len(self.losses) == self.losses.maxlen:
            median = statistics.median(self.losses)
            # 1.4826 makes the median deviation that of a normal distribution; the floor is for losses that stand still.
            spread = 1.4826 * statistics.median(abs(value - median) for value in self.losses) + 1e-3 * abs(median)
            deviations = (loss - median) / spread if spread else 0.0
            spike = deviations if deviations > self.threshold else None
        if spike is None and math.isfinite(loss):
            self.losses.append(loss)
        return spike
