"""Checkpoints: ours against torch DCP, Megatron-Core's torch_dist and safetensors, on the same disk in the same run.

    python benchmarks/checkpoint.py                    a table (2 gloo ranks, 0.71 GB each, about 4,000 small tensors)
    python benchmarks/checkpoint.py --json             one JSON object on standard output
    python benchmarks/checkpoint.py --gigabytes 0.1 --only ours,dcp_sync     something small

The state is that of data parallelism with a sharded optimizer: bf16 weights on both ranks, fp32 master and moments
split along the first dimension. Every save follows a second of rest and a change of all tensors. The methods take
turns, round after round; figures are medians over rounds of the slowest rank, the first round (start-up of writers) is
left out. When --budget seconds have passed the others' rounds end; how many each got is printed.

stall      seconds for which the call holds training up
durable    seconds until every byte is on the disk (files and folders are synced for methods that do not)
cpu        processor seconds of both ranks and all their helpers
load       seconds to fill the same layout, the page cache emptied of the files before
reshard    the same on one rank, which wants everything
limits     in each round: O_DIRECT writes and reads of the same bytes by both ranks at once, the reads into memory in
           small pages and in large ones (which direct input fills faster); one memmove of as many bytes as ours
           stages, by both ranks at once, into shared memory that is there, as every method's that leaves the writing to
           another process: as a save finds it, the source just changed and the target untouched since the round before
           (virtual machines may make idle memory slower), and warm, the best of three more
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OURS, RANKS = "ours", 2
REST_S = 1.0
NAMES = [OURS, "dcp_sync", "dcp_async", "mcore_sync", "mcore_async", "mcore_fully_parallel", "safetensors"]


def start_world(folder: str) -> Any:
    """Join the other ranks; return the World."""
    import torch

    from benchmarks.checkpointing.state import World
    from launch.env import read_rank_env
    from megatron_zaya.compat import cpu

    cpu.install()
    env = read_rank_env()
    torch.distributed.init_process_group("gloo", rank=env.rank, world_size=env.world_size)
    return World(env.rank, env.world_size, Path(folder))


def slowest(value: float) -> float:
    """Return the largest value of all ranks."""
    import torch

    tensor = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor.item()


def total(value: float) -> float:
    """Return the sum over all ranks."""
    import torch

    tensor = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(tensor)
    return tensor.item()


def timed_load(method: Any, state: dict, path: Path) -> float | None:
    """Return the seconds of a cold load; None where a method has no such load."""
    import torch

    from benchmarks.checkpointing.limits import drop_from_cache

    if method.world.rank == 0:
        drop_from_cache(path)
    torch.distributed.barrier()
    start = time.monotonic()
    try:
        method.load(state, path)
        seconds = slowest(time.monotonic() - start)
    except NotImplementedError:
        seconds = None
    if method.world.rank == 0:
        drop_from_cache(path)  # or the kernel looks for memory in the next method's time
    return seconds


def come_to_rest() -> None:
    """Let the disk and the kernel finish what the method before left behind: written pages, removed files."""
    os.sync()
    time.sleep(REST_S)


def measure_limits(world: Any, unique: int, source: Any, target: Any) -> dict[str, float]:
    """Return the seconds that the machine needs at least, with all ranks at once."""
    import torch

    from benchmarks.checkpointing.limits import memcpy, raw_read, raw_write

    path = world.folder / f"raw{world.rank}"
    torch.distributed.barrier()
    write_s = slowest(raw_write(path, unique // world.ranks))
    torch.distributed.barrier()
    read_s = slowest(raw_read(path))
    torch.distributed.barrier()
    read_large_pages_s = slowest(raw_read(path, large_pages=True))
    path.unlink()
    come_to_rest()
    source.add_(1)
    torch.distributed.barrier()
    memcpy_s, *warm = [slowest(memcpy(source, target)) for _ in range(4)]
    limits = {"write_s": write_s, "read_s": read_s, "read_large_pages_s": read_large_pages_s}
    return limits | {"memcpy_s": memcpy_s, "memcpy_warm_s": min(warm)}


def measure_saves(folder: str, names: list[str], rounds: int, big: int, budget_s: float) -> dict[str, Any]:
    """Run on each rank of the first world: saves, and loads of the same layout."""
    world, began = start_world(folder), time.monotonic()
    import torch

    from benchmarks.checkpointing.limits import cpu_seconds
    from benchmarks.checkpointing.methods import METHODS
    from benchmarks.checkpointing.state import change, make_state, sizes
    from ckpt.writer.arena import Arena

    state = make_state(world.ranks, big)
    held, unique = sizes(state, world.ranks)
    methods = {name: METHODS[name](world) for name in names}
    source, target = torch.ones(unique // world.ranks, dtype=torch.uint8), Arena.create(unique // world.ranks)
    figures: dict[str, list] = {name: [] for name in names}
    bounds = []
    for number in range(rounds + 1):
        bound = measure_limits(world, unique, source, target)
        if number:
            bounds.append(bound)
        for name, method in methods.items():
            late = slowest(time.monotonic() - began) > budget_s
            if name != OURS and late and number:
                continue
            path = world.folder / name / f"iter_{number:07d}"
            come_to_rest()
            change(state)
            torch.distributed.barrier()
            cpu = cpu_seconds()
            stall, durable = method.save(state, path)
            figure = {"stall_s": slowest(stall), "durable_s": slowest(durable), "cpu_s": total(cpu_seconds() - cpu)}
            if number:
                figure["load_s"] = timed_load(method, state, path)
                figures[name].append(figure)
            torch.distributed.barrier()
            if world.rank == 0:
                for older in sorted((world.folder / name).glob("iter_*"))[:-1]:
                    shutil.rmtree(older)
                print(f"round {number} of {rounds}: {name} {figure}", file=sys.stderr, flush=True)
    for method in methods.values():
        method.close()
    return {"figures": figures, "bounds": bounds, "bytes_per_rank": held, "bytes_unique": unique}


def measure_resharded(folder: str, names: list[str], rounds: int, big: int, budget_s: float) -> dict[str, Any]:
    """Run on the only rank of the second world: load everything that the first world saved last."""
    world, began = start_world(folder), time.monotonic()
    from benchmarks.checkpointing.limits import raw_read, raw_write
    from benchmarks.checkpointing.methods import METHODS
    from benchmarks.checkpointing.state import make_state, sizes

    state = make_state(1, big)
    methods = {name: METHODS[name](world) for name in names}
    figures: dict[str, list] = {name: [] for name in names}
    raw: list[tuple[float, float]] = []
    path = world.folder / "raw"
    raw_write(path, sizes(state, 1)[0])
    for _ in range(rounds):
        raw.append((raw_read(path), raw_read(path, large_pages=True)))
        for name, method in methods.items():
            if name == OURS or not figures[name] or time.monotonic() - began < budget_s:
                figures[name].append(timed_load(method, state, max((world.folder / name).glob("iter_*"))))
    for method in methods.values():
        method.close()
    return {"figures": figures, "raw_read_s": raw}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.71, help="state of a rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which the others get no more rounds")
    parser.add_argument("--only", default=",".join(NAMES), metavar="NAME,NAME", help="these methods; ours always")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary folder here")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(argv)
    names = [OURS, *(name for name in options.only.split(",") if name != OURS)]
    if unknown := set(names) - set(NAMES):
        sys.exit(f"--only: no method is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    from benchmarks.checkpointing.report import print_table, summarise
    from benchmarks.checkpointing.state import count_big
    from tests.ranks import run_ranks

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    load, began = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix="bench-checkpoint-") as folder:
        arguments = (folder, names, options.rounds, count_big(RANKS, options.gigabytes))
        (first, *_) = run_ranks(measure_saves, RANKS, *arguments, options.budget)
        (second,) = run_ranks(measure_resharded, 1, *arguments, options.budget / 3)
    import torch

    result = {
        "benchmark": "checkpoint",
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "load_average_at_start": load},
        "load_average_at_end": os.getloadavg()[0],
        "seconds": time.monotonic() - began,
        "versions": {"torch": torch.__version__},
        "bytes_per_rank": first["bytes_per_rank"],
        "bytes_unique": first["bytes_unique"],
    } | summarise(first, second, names)
    print(json.dumps(result)) if options.json else print_table(result)


if __name__ == "__main__":
    main()
