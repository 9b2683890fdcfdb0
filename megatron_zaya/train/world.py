"""What all ranks learn from each other at the end of a step: the load of the experts, and the figures of each rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor

from megatron_zaya.train.state import TrainingJob


@dataclass(frozen=True)
class WorldReport:
    """The wishes and waits of all ranks. Equal on all of them."""

    stop_signal: int
    """Of any rank that was asked to stop; 0 if none."""
    save_asked: bool
    data_wait_s: float
    """Of the rank that waited longest in this step; so are the next five."""
    grad_sync_s: float
    device_peak_bytes: int
    """Since the last report of health; 0 in steps between them."""
    device_reserved_bytes: int
    host_bytes: int
    busy_s: list[float]
    """By rank: from the start of the step until its gradients were complete."""


def _memory() -> list[int]:
    """Return bytes of this rank: allocated at the peak since the last call, reserved, and of the process."""
    host = psutil.Process().memory_info().rss
    if not torch.cuda.is_available():
        return [0, 0, host]
    device = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    torch.cuda.reset_peak_memory_stats()
    return [*device, host]


def gather_reports(job: TrainingJob) -> WorldReport:
    """Tell all ranks how this one is. Collective."""
    memory = _memory() if job.health_due else [0, 0, 0]
    own = [job.stop_signal, job.save_asked, job.data_wait_s, job.timer.grad_sync_s, *memory]
    busy = [0.0] * torch.distributed.get_world_size()
    busy[torch.distributed.get_rank()] = job.timer.busy_s
    report = torch.tensor([*map(float, own), *busy], dtype=torch.float64, device=job.device)
    torch.distributed.all_reduce(report, op=torch.distributed.ReduceOp.MAX)
    stop, save, wait, sync, peak, reserved, host, *busy = report.tolist()
    return WorldReport(int(stop), bool(save), wait, sync, int(peak), int(reserved), int(host), busy)


def gather_loads(job: TrainingJob, counts_LN: Tensor) -> np.ndarray:
    """Return the tokens per layer and class of the whole model, from those of this stage's layers. Collective."""
    every_LN = counts_LN.new_zeros(job.config.model.num_layers, counts_LN.shape[1])
    every_LN[job.balancer.layers] = counts_LN
    torch.distributed.all_reduce(every_LN, group=job.pg_collection.pp)
    return np.array(every_LN.tolist())
