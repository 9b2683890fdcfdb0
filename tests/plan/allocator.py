"""What torch's CPU allocator says about the same run with real tensors: the reference for the dry run's tracker.

Run: `python -m tests.plan.allocator RUN_FILE WORLD RANK [overrides]` prints the peak in bytes. A process of its own:
the count has to start before anything is allocated, and torch must not have run other models.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from megatron_zaya.compat import cpu
from megatron_zaya.config import load_config
from megatron_zaya.parallel.groups import release_process_groups
from megatron_zaya.plan.dryrun.live_bytes import LiveBytes
from megatron_zaya.plan.dryrun.observer import Observer
from megatron_zaya.plan.dryrun.run import _construct_and_step, default_skip_share, dry_run, local_experts
from megatron_zaya.plan.dryrun.shapes import ForcedRouting


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most bytes that the allocator held during ``run`` above those before, whichever threads freed them.

    The profiler sees only threads that carry its state. Gloo's workers drop it before they let go of a collective's
    tensors: when a worker is the last to do so, no event tells of the free, and a sum over the events counts the buffer
    for ever. But every event also has the allocator's own total, which is right while the allocator counts in all
    threads. It does so for a report of its own, which is switched on here and stays below the level that is printed.
    """
    libc10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    counts_always = ctypes.c_bool.in_dll(libc10, "FLAGS_caffe2_report_cpu_memory_usage")
    counts_always.value = True
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    counts_always.value = False
    events = list(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    first = min(events, key=lambda event: event.start_time_ns).extra_fields
    before = first.total_allocated - first.alloc_size
    return max(event.extra_fields.total_allocated for event in events) - before


def _allocations(events: list[Any]) -> Iterator[Any]:
    """Yield the allocations and frees among ``events`` and below them."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event
        yield from _allocations(event.children)


def peak_of_blocks_freed_elsewhere(blocks: int, block_bytes: int) -> int:
    """Return the peak of blocks that another thread frees, each before the next is made."""

    def run() -> None:
        for _ in range(blocks):
            held = [torch.empty(block_bytes, dtype=torch.uint8)]
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join()

    return peak_bytes(run)


def allocator_peak(run_file: str, world_size: int, rank: int, overrides: list[str]) -> int:
    """Return the peak of the whole run in the fake world, in bytes."""
    config = load_config(run_file, overrides)
    return peak_bytes(lambda: dry_run(config, world_size, rank, device=torch.device("cpu"), track=False))


class _RealWorld(Observer):
    """Forces the routing and lets real collectives do what they do."""

    def _collective(self, function, args, kwargs):
        return function(*args, **kwargs)


def gloo_peak(run_file: str, overrides: list[str]) -> int:
    """Return the peak of this rank of a real gloo world, in bytes."""
    config = load_config(run_file, overrides)
    cpu.install()
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    routing = ForcedRouting(config.model.num_moe_experts + 1, local_experts(config, rank), default_skip_share(config))
    device = torch.device("cpu")
    with _RealWorld(routing, None, device) as observer:
        peak = peak_bytes(lambda: _construct_and_step(config, observer, LiveBytes(), device))
    release_process_groups()
    torch.distributed.destroy_process_group()
    return peak


if __name__ == "__main__":
    print(allocator_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
