"""Step time and peak memory of every proved layout beside data parallelism of the same world size.

    python benchmarks/layouts.py                          every layout on 2, 4 and 8 ranks, a table
    python benchmarks/layouts.py --only tp2,pp2 --json    one JSON object on standard output

A step is a whole training step of the smoke model (configs/smoke_cpu.yaml, shortened): micro-batches, gradient
reduction, clipping, optimizer, balancing. Ranks are gloo processes with one thread each.

How to read it. The layouts of one world size take turns, round after round; `ratio` is the median over rounds of
(step time of the layout / step time of data parallelism in the same round). On fewer cores than ranks, and over gloo,
ratios say nothing about an accelerator: they are there so that a regression of one layout shows. `peak_bytes` is the
most that torch's CPU allocator held at once on any rank while the job was built and took one step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_zaya.data.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "configs" / "smoke_cpu.yaml"
SMALLER = [
    "data.seq_length=128",
    "schedule.global_batch_size=8",
    "schedule.micro_batch_size=1",
    "schedule.eval_interval=0",
    "telemetry.loss_curve=false",
    "model.num_attention_heads=8",  # so that tensor parallelism may go beyond the two key-value heads
    "model.kv_channels=16",
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="these layouts, and what they are compared to")
    parser.add_argument("--largest-world", type=int, default=8, metavar="RANKS", help="leave out larger worlds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each layout per round")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args(argv)


def selected(options: argparse.Namespace) -> dict[int, dict[str, dict]]:
    """Return the layouts to run by world size, data parallelism first."""
    from tests.distributed.layouts import LAYOUTS

    wanted = {name for name in options.only.split(",") if name}
    unknown = wanted - set(LAYOUTS)
    if unknown:
        sys.exit(f"--only: no layout is called {', '.join(sorted(unknown))}; there are {', '.join(LAYOUTS)}")
    worlds: dict[int, dict[str, dict]] = {}
    for name, (world, parallel) in LAYOUTS.items():
        if world <= options.largest_world and (not wanted or name in wanted):
            worlds.setdefault(world, {f"dp{world}": {}})[name] = parallel
    return worlds


def measure_rank(overrides: list[str], layouts: dict[str, dict], rounds: int, steps: int) -> dict[str, dict]:
    """Run on each rank: return for every layout its peak bytes, and its median step time in each round."""
    from launch.env import read_rank_env
    from megatron_zaya.config import load_config
    from megatron_zaya.train.setup import distributed_world
    from tests.plan.allocator import peak_bytes

    env = read_rank_env()
    configs = {
        name: load_config(RUN_FILE, [*overrides, *(f"parallel.{key}={value}" for key, value in parallel.items())])
        for name, parallel in layouts.items()
    }
    results: dict[str, dict] = {name: {"seconds": []} for name in layouts}
    with distributed_world(next(iter(configs.values())), env) as device:
        for name, config in configs.items():
            results[name]["peak_bytes"] = peak_bytes(lambda config=config: take_steps(config, env, device, 1))
        for _ in range(rounds):
            for name, config in configs.items():
                results[name]["seconds"].append(statistics.median(take_steps(config, env, device, steps)))
    return results


def take_steps(config: Any, env: Any, device: Any, count: int) -> list[float]:
    """Build the job, take one step more than ``count`` and return the seconds of each but the first."""
    import torch

    from megatron_zaya.train.setup import build_job, release_job
    from megatron_zaya.train.step import train_step

    job = build_job(config, env, device)
    seconds = []
    for _ in range(count + 1):
        torch.distributed.barrier()
        began = time.perf_counter()
        train_step(job)
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - began)
    release_job(job)
    return seconds[1:]


def compare(world: int, layouts: dict[str, dict], options: argparse.Namespace, prefix: Path) -> dict[str, Any]:
    """Return the figures of the layouts of one world size."""
    from tests.ranks import run_ranks

    overrides = [*SMALLER, f"data.data_path=[{prefix}]", f"run.dir={prefix.parent}/runs/{{name}}"]
    ranks = run_ranks(measure_rank, world, overrides, layouts, options.rounds, options.steps)
    alone = ranks[0][f"dp{world}"]
    figures = {}
    for name in layouts:
        mine = ranks[0][name]
        ratios = [a / b for a, b in zip(mine["seconds"], alone["seconds"], strict=True)]
        peak = max(rank[name]["peak_bytes"] for rank in ranks)
        figures[name] = {
            "world": world,
            "median_step_s": statistics.median(mine["seconds"]),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "peak_bytes": peak,
            "peak_ratio": peak / max(rank[f"dp{world}"]["peak_bytes"] for rank in ranks),
        }
    return figures


def print_table(result: dict[str, Any]) -> None:
    print(f"{'layout':28} {'ranks':>5} {'step':>9} {'of dp':>7}  {'range':12} {'peak':>10} {'of dp':>6}")
    for name, row in result["layouts"].items():
        low, high = row["ratio_range"]
        print(
            f"{name:28} {row['world']:>5} {row['median_step_s'] * 1e3:>6.0f} ms {row['ratio']:>6.2f}x  "
            f"{low:.2f} to {high:.2f} {row['peak_bytes'] / 2**20:>6.1f} MiB {row['peak_ratio']:>5.2f}x"
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    sys.path.insert(0, str(ROOT))  # the tests' ranks and layouts, when run as a script
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "text"
        prepare(["python-stdlib"], prefix, limit_documents=60, workers=1)
        worlds = selected(options)
        layouts: dict[str, Any] = {}
        for world in sorted(worlds):
            layouts |= compare(world, worlds[world], options, prefix)
    result = {
        "benchmark": "layouts",
        "machine": {"cores": len(os.sched_getaffinity(0))},
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "steps_per_round": options.steps,
        "rounds": options.rounds,
        "layouts": layouts,
    }
    print(json.dumps(result)) if options.json else print_table(result)
    return result


if __name__ == "__main__":
    main()
