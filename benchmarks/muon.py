"""Distributed Muon: time and transient memory of ours beside gathering everything.

    python benchmarks/muon.py [--ranks 4] [--matrices 24] [--width 512] [--rounds 3] [--json]

Measured, on gloo ranks of this machine: one stack of square matrices in one gradient bucket, sharded in equal chunks.
`ours` is megatron_zaya's exchange; `all_gather` is the well-known way, written here: gather the whole bucket in bf16,
orthogonalise every matrix that touches the own chunk, keep the own part. Both give the same numbers (checked).
`allocated_mib` is what torch newly allocates during a step (largest over ranks, measured storage by storage); ours
also uses `borrowed_mib` of the gradient bucket, which holds nothing of meaning at that time.

Computed, for ZAYA1-8B as configs/zaya1_8b.yaml has it and pure data parallelism, with Megatron-Core's bucket rule:
optimizer state per rank, the transient of both ways, and its share of state plus transient.

`megatron_layer_wise` is Megatron-Core's own LayerWiseDistributedOptimizer on the same matrices as separate parameters:
each rank steps whole matrices, then all parameters are gathered into new buffers. It is timed over its whole step
(momentum, orthogonalisation, weights, gathering), so its seconds are not those of the exchange alone; what it
allocates is comparable. It distributes torch.optim.Muon: Megatron-Core's own Muon class needs the package
emerging_optimizers, which needs Python 3.12.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from live_memory import peak_bytes
from torch import Tensor

from megatron_zaya.config import load_config
from megatron_zaya.optim.exchange import Grid, ShardedOrthogonalizer
from megatron_zaya.optim.newton_schulz import orthogonalize
from megatron_zaya.optim.pieces import Slot, make_plan, workspaces
from megatron_zaya.optim.scratch import Scratch, largest_free_region
from megatron_zaya.optim.table import Row, optimizer_table

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5
MIB = 2**20


def gather_everything(bucket: Tensor, matrices: int, width: int, rank: int, ranks: int) -> None:
    """Replace this rank's chunk of the bucket by the orthogonalised update, the well-known way."""
    chunk = len(bucket) // ranks
    own = bucket[rank * chunk : (rank + 1) * chunk]
    everything = torch.empty(len(bucket), dtype=torch.bfloat16)
    dist.all_gather_into_tensor(everything.view(torch.uint8), own.bfloat16().view(torch.uint8))
    size = width * width
    for index in range(rank * chunk // size, min(matrices, -(-(rank + 1) * chunk // size))):
        result = orthogonalize(everything[index * size : (index + 1) * size].view(width, width), STEPS).flatten()
        start, stop = max(index * size, rank * chunk), min((index + 1) * size, (rank + 1) * chunk)
        own[start - rank * chunk : stop - rank * chunk].copy_(result[start - index * size : stop - index * size])


def megatron_layer_wise(matrices: int, width: int) -> tuple[Any, list[torch.nn.Parameter]]:
    """Return Megatron-Core's optimizer, and its parameters, equal on all ranks. Collective."""
    from megatron_zaya.compat import cpu

    cpu.install()
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.optimizer.optimizer import FP32Optimizer

    from megatron_zaya.config.sections import ParallelConfig
    from megatron_zaya.parallel.groups import build_process_groups

    groups = build_process_groups(ParallelConfig(), seed=1)
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(width, width, generator=generator)) for _ in range(matrices)]
    inner = torch.optim.Muon(parameters, lr=1e-3, ns_steps=STEPS)
    config = OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=0.0)
    wrapped = FP32Optimizer(inner, config, lambda optimizer, config=None: None)
    return LayerWiseDistributedOptimizer([wrapped], config, groups), parameters


def measure_layer_wise(optimizer: Any, parameters: list[torch.nn.Parameter], rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {"seconds": []}
    for number in range(rounds + 2):
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.main_grad = torch.randn(parameter.shape, generator=generator)
        dist.barrier()
        if number == 1:  # the first step makes the momenta, which are state
            momenta = [
                s["momentum_buffer"] for part in optimizer.chained_optimizers for s in part.optimizer.state.values()
            ]
            with peak_bytes([*parameters, *(parameter.main_grad for parameter in parameters), *momenta]) as live:
                optimizer.step()
            result["allocated"] = live.peak.total_bytes
            continue
        begin = time.perf_counter()
        optimizer.step()
        dist.barrier()
        if number:
            result["seconds"].append(time.perf_counter() - begin)
    return result


def measure_rank(rank: int, ranks: int, port: int, matrices: int, width: int, rounds: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    numel = -(-matrices * width * width // ranks) * ranks
    chunk = numel // ranks
    slots = [Slot("stack", (matrices, width, width), 0, numel)]
    plan = make_plan(slots, 1, ranks)
    grid = Grid(dist.group.WORLD, tuple(range(ranks)), 1, ranks, rank)
    ours = ShardedOrthogonalizer(plan, slots, grid, STEPS, torch.bfloat16)
    bucket = torch.empty(numel)
    scratch = Scratch(largest_free_region([bucket], rank, ranks), bucket.device)
    own = bucket[rank * chunk : (rank + 1) * chunk]
    start, stop = slots[0].owned(rank, ranks)

    def exchange() -> None:
        scratch.reset()
        ours([own[: stop - start]], scratch)

    ways: dict[str, Callable[[], None]] = {
        "ours": exchange,
        "all_gather": lambda: gather_everything(bucket, matrices, width, rank, ranks),
    }
    layer_wise, parameters = megatron_layer_wise(matrices, width)
    results: dict[str, Any] = {name: {"seconds": []} for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            bucket.copy_(torch.randn(numel, generator=torch.Generator().manual_seed(number)))
            dist.barrier()
            if number == 0:
                with peak_bytes([bucket]) as live:
                    way()
                results[name] |= {"allocated": live.peak.total_bytes, "chunk": own[: stop - start].clone()}
                continue
            begin = time.perf_counter()
            way()
            dist.barrier()
            results[name]["seconds"].append(time.perf_counter() - begin)
    results["megatron_layer_wise"] = measure_layer_wise(layer_wise, parameters, rounds)
    same = [torch.equal(results["ours"]["chunk"], results["all_gather"]["chunk"]), scratch.used_bytes]
    for name in ways:
        del results[name]["chunk"]
    Path(folder, str(rank)).write_text(json.dumps([results, same]))
    dist.destroy_process_group()


def measured(ranks: int, matrices: int, width: int, rounds: int) -> dict[str, Any]:
    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        mp.spawn(measure_rank, (ranks, port, matrices, width, rounds, folder), nprocs=ranks)
        collected = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(ranks)]
    if not all(same for _, (same, _) in collected):
        raise SystemExit("the two ways disagree")
    figures: dict[str, Any] = {
        name: {
            "allocated_mib": round(max(results[name]["allocated"] for results, _ in collected) / MIB, 3),
            "seconds": round(statistics.median(collected[0][0][name]["seconds"]), 4),
        }
        for name in ("ours", "all_gather", "megatron_layer_wise")
    }
    figures["ours"]["borrowed_mib"] = round(max(used for _, (_, used) in collected) / MIB, 2)
    state = 8 * matrices * width * width / ranks / MIB
    return {"ranks": ranks, "matrices": matrices, "width": width, "state_per_rank_mib": round(state, 2), **figures}


def released_parameters() -> list[Row]:
    return optimizer_table(load_config(ROOT / "configs" / "zaya1_8b.yaml", ["optimizer.optimizer=muon"]))


def buckets(rows: list[Row], dp_size: int) -> list[tuple[Row, Slot]]:
    """Place parameters as Megatron-Core's buffers do: reversed, aligned to 64, in buckets of 1M elements per rank."""
    limit, placed, current, position = max(40_000_000, 1_000_000 * dp_size), [], [], 0
    for number, row in enumerate(reversed(rows), start=1):
        position = -(-position // 64) * 64
        current.append((row, position))
        position += row.numel
        if position >= limit or number == len(rows):
            numel = -(-position // math.lcm(dp_size, 128)) * math.lcm(dp_size, 128)
            placed += [(r, Slot(r.name, r.shape, start, numel, row_parts=r.rule.row_parts)) for r, start in current]
            current, position = [], 0
    return placed


def computed(dp_size: int, rows: list[Row]) -> dict[str, Any]:
    muon = sum(row.numel for row in rows if row.rule.algorithm == "muon")
    total = sum(row.numel for row in rows)
    state = (8 * muon + 12 * (total - muon)) / dp_size
    needed = free = 0.0
    waves, spans = 0, 1
    for expert in (False, True):
        placed = buckets([row for row in rows if row.is_expert == expert], dp_size)
        region = max(slot.bucket_numel for _, slot in placed) * (dp_size - 1) // dp_size
        plan = make_plan([slot for row, slot in placed if row.rule.algorithm == "muon"], 1, dp_size)
        most = 2 * max(needed.numel for needed in workspaces(plan, dp_size))
        # Before or after the own chunk: at least half of what is not its own, in fp32.
        needed, free = max(needed, most), max(free, max(0, most - 4 * region // 2))
        waves, spans = max(waves, len(plan.waves)), max(spans, *(len(m.pieces) for m in plan.matrices))
    gathered, layer_wise = 2 * muon, 2 * total
    return {
        "data_parallel_size": dp_size,
        "state_per_rank_mib": round(state / MIB, 1),
        "ours": {
            "working_mib": round(needed / MIB, 1),
            "allocated_mib": round(free / MIB, 1),
            "share_of_optimizer_memory": round(free / (free + state), 4),
            "waves": waves,
            "most_ranks_a_matrix_spans": spans,
        },
        "all_gather": {
            "allocated_mib": round(gathered / MIB, 1),
            "share_of_optimizer_memory": round(gathered / (gathered + state), 4),
        },
        "megatron_layer_wise": {  # by its code: bf16 parameters of all ranks in new buffers
            "allocated_mib": round(layer_wise / MIB, 1),
            "share_of_optimizer_memory": round(layer_wise / (layer_wise + state), 4),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--matrices", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows = released_parameters()
    result = {
        "benchmark": "muon",
        "measured": measured(arguments.ranks, arguments.matrices, arguments.width, arguments.rounds),
        "zaya1_8b": [computed(size, rows) for size in (8, 128, 1024)],
        "emerging_optimizers": "installed" if find_spec("emerging_optimizers") else "not installed",
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for name in ("ours", "all_gather", "megatron_layer_wise"):
        figures = result["measured"][name]
        print(f"{name:19} allocates {figures['allocated_mib']:9.2f} MiB   {figures['seconds']:.3f} s")
    for row in result["zaya1_8b"]:
        print(row)


if __name__ == "__main__":
    main()
