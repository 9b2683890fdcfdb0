"""What torch's CPU allocator says about the same run with real tensors: the reference for the dry run's tracker.

Run: `python -m tests.plan.allocator RUN_FILE WORLD RANK [overrides]` prints JSON. A process of its own: the profiler
has to start before anything is allocated, and torch must not have run other models.
"""

from __future__ import annotations

import json
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_zaya.compat import cpu
from megatron_zaya.config import load_config
from megatron_zaya.parallel.groups import release_process_groups
from megatron_zaya.plan.dryrun.live_bytes import LiveBytes
from megatron_zaya.plan.dryrun.observer import Observer
from megatron_zaya.plan.dryrun.run import _construct_and_step, default_skip_share, dry_run, local_experts
from megatron_zaya.plan.dryrun.shapes import ForcedRouting


def held_bytes(profiler: profile) -> dict[str, int]:
    """Return the most bytes that the allocator held, and those that it held at the end."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return {"peak_bytes": peak, "left_bytes": live}


def allocator_peaks(run_file: str, world_size: int, rank: int, overrides: list[str]) -> dict[str, int]:
    """Return what the allocator held in the whole run, in the fake world."""
    config = load_config(run_file, overrides)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        dry_run(config, world_size, rank, device=torch.device("cpu"), track=False)
    return held_bytes(profiler)


class _RealWorld(Observer):
    """Forces the routing and lets real collectives do what they do."""

    def _collective(self, function, args, kwargs):
        return function(*args, **kwargs)


def gloo_peaks(run_file: str, overrides: list[str]) -> dict[str, int]:
    """Return what the allocator held on this rank of a real gloo world."""
    config = load_config(run_file, overrides)
    cpu.install()
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    routing = ForcedRouting(config.model.num_moe_experts + 1, local_experts(config, rank), default_skip_share(config))
    device = torch.device("cpu")
    observer = _RealWorld(routing, None, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, observer:
        _construct_and_step(config, observer, LiveBytes(), device)
    peaks = held_bytes(profiler)
    release_process_groups()
    torch.distributed.destroy_process_group()
    return peaks


if __name__ == "__main__":
    print(json.dumps(allocator_peaks(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
