"""What torch's CPU allocator says about the same run with real tensors: the reference for the dry run's tracker.

Run: `python -m tests.plan.allocator RUN_FILE WORLD RANK [overrides]` prints JSON. A process of its own: the profiler
has to start before anything is allocated, and torch must not have run other models.
"""

from __future__ import annotations

import json
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_zaya.config import load_config
from megatron_zaya.plan.dryrun.run import dry_run


def allocator_peaks(run_file: str, world_size: int, rank: int, overrides: list[str]) -> dict[str, int]:
    """Return the bytes that the allocator held at most, in the whole run and after the first optimizer step."""
    config = load_config(run_file, overrides)
    marks: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        dry_run(config, world_size, rank, device=torch.device("cpu"), track=False)
    live = peak = 0
    for event in sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        peak = max(peak, live)
    del marks
    return {"peak_bytes": peak, "left_bytes": live}


if __name__ == "__main__":
    print(json.dumps(allocator_peaks(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
