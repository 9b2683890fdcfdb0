"""Checkpoints: ours against torch DCP, Megatron-Core's torch_dist and safetensors, on the same disk in the same run.

    python benchmarks/checkpoint.py                    a table (2 gloo ranks, 0.71 GB each, about 4,000 small tensors)
    python benchmarks/checkpoint.py --json             one JSON object on standard output
    python benchmarks/checkpoint.py --gigabytes 0.1 --only ours,dcp_sync     something small

The state is that of data parallelism with a sharded optimizer: bf16 weights on both ranks, fp32 master and moments
split along the first dimension. Every save follows a change of all tensors. The methods take turns, round after round;
figures are medians over rounds of the slowest rank, the first round (start-up of writers) is left out.

stall      seconds for which the call holds training up
durable    seconds until every byte is on the disk (files and folders are synced for methods that do not)
cpu        processor seconds of both ranks and all their helpers
load       seconds to fill the same layout, the page cache emptied of the files before
reshard    the same on one rank, which wants everything
limits     in each round: O_DIRECT writes and reads of the same bytes by both ranks at once; memmove of the bytes that
           ours stages, by both ranks at once, into memory that is there
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BIG_SHAPE, SMALL, SMALL_NUMEL = (1024, 1536), 2000, 512
BLOCK = 4 << 20
GOALS = {
    "stall / memcpy bound": (1.25, "at most"),
    "stall of dcp_async / ours": (4.0, "at least"),
    "durable: share of raw write": (0.85, "at least"),
    "durable of mcore_fully_parallel / ours": (3.0, "at least"),
    "cpu seconds per GB": (0.6, "at most"),
    "load: share of raw read": (0.8, "at least"),
    "load of dcp_sync / ours": (2.5, "at least"),
    "reshard: share of raw read": (0.7, "at least"),
    "reshard of dcp_sync / ours": (2.5, "at least"),
}


def make_state(rank: int, ranks: int, gigabytes: float) -> dict[str, tuple[Any, int | None]]:
    """Return name -> (tensor of this rank, dimension along which ranks split it or None)."""
    import torch

    numel = BIG_SHAPE[0] * BIG_SHAPE[1]
    count = max(1, round(gigabytes * 1e9 / (numel * (2 + 12 / 2))))
    state: dict[str, tuple[Any, int | None]] = {}
    for i in range(count):
        state[f"weight.{i}"] = (torch.randn(BIG_SHAPE).bfloat16(), None)
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            state[f"{kind}.{i}"] = (torch.randn(BIG_SHAPE[0] // ranks, BIG_SHAPE[1]), 0)
    for i in range(SMALL):
        state[f"small.{i}"] = (torch.randn(SMALL_NUMEL // ranks), 0)
        state[f"norm.{i}"] = (torch.randn(SMALL_NUMEL), None)
    for key, (tensor, split) in state.items():
        if split is None:  # replicas are equal
            torch.manual_seed(hash_of(key))
            tensor.copy_(torch.randn(tensor.shape))
    return state


def hash_of(key: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(key)) % (1 << 31)


def change(state: dict) -> None:
    for tensor, _ in state.values():
        tensor.add_(1.0)


def whole_shape(tensor: Any, split: int | None, ranks: int) -> tuple[int, ...]:
    return tuple(n * ranks if axis == split else n for axis, n in enumerate(tensor.shape))


class World:
    """What every method needs to know about this rank."""

    def __init__(self, rank: int, ranks: int, folder: Path) -> None:
        self.rank, self.ranks, self.folder = rank, ranks, folder


def fsync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


class Method:
    """One way to save and load. ``save`` returns (stall, durable) in seconds of this rank."""

    def __init__(self, world: World) -> None:
        self.world = world

    def save(self, state: dict, path: Path) -> tuple[float, float]:
        raise NotImplementedError

    def load(self, state: dict, path: Path) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """End helpers."""

    def blocking(self, path: Path, call: Callable[[], Any]) -> tuple[float, float]:
        """Time a call that blocks; the first rank then syncs what the method did not."""
        import torch

        start = time.monotonic()
        call()
        stall = time.monotonic() - start
        torch.distributed.barrier()
        if self.world.rank == 0:
            fsync_tree(path)
        torch.distributed.barrier()
        return stall, time.monotonic() - start


class Ours(Method):
    def __init__(self, world: World) -> None:
        from ckpt.checkpointer import Checkpointer

        super().__init__(world)
        self.checkpointer = Checkpointer(world.folder / "ours")
        self.number = 0

    def shards(self, state: dict) -> list:
        from ckpt.shard import Shard

        shards = []
        for key, (tensor, split) in state.items():
            shape = whole_shape(tensor, split, self.world.ranks)
            offset = tuple(n * self.world.rank if axis == split else 0 for axis, n in enumerate(tensor.shape))
            copies = (self.world.rank, self.world.ranks) if split is None else (0, 1)
            shards.append(Shard(key, tensor, shape, offset, tuple(tensor.shape), None, *copies))
        return shards

    def save(self, state: dict, path: Path) -> tuple[float, float]:
        import torch

        self.number = int(path.name.split("_")[-1])
        shards = self.shards(state)
        start = time.monotonic()
        save = self.checkpointer.save(self.number, shards)
        stall = time.monotonic() - start
        self.checkpointer.wait(120)
        torch.distributed.barrier()
        assert save.error is None, save.error
        return stall, time.monotonic() - start

    def load(self, state: dict, path: Path) -> None:
        report = self.checkpointer.load(self.shards(state), int(path.name.split("_")[-1]))
        assert not report.missing and not report.unexpected

    def close(self) -> None:
        self.checkpointer.close()


class Dcp(Method):
    asynchronous = False

    def __init__(self, world: World) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(world)
        self.mesh = init_device_mesh("cpu", (world.ranks,))
        self.stager = DefaultStager(StagingOptions(False, False, False, False)) if self.asynchronous else None

    def described(self, state: dict) -> dict:
        from torch.distributed.tensor import DTensor, Shard

        return {
            key: tensor if split is None else DTensor.from_local(tensor, self.mesh, [Shard(split)], run_check=False)
            for key, (tensor, split) in state.items()
        }

    def save(self, state: dict, path: Path) -> tuple[float, float]:
        import torch
        import torch.distributed.checkpoint as dcp

        described = self.described(state)
        if not self.asynchronous:
            return self.blocking(path, lambda: dcp.save(described, checkpoint_id=path))
        start = time.monotonic()
        future = dcp.async_save(described, checkpoint_id=path, async_stager=self.stager)
        stall = time.monotonic() - start
        getattr(future, "upload_completion", future).result()
        torch.distributed.barrier()
        return stall, time.monotonic() - start

    def load(self, state: dict, path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(self.described(state), checkpoint_id=path)

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class DcpAsync(Dcp):
    asynchronous = True


class Mcore(Method):
    fully_parallel = asynchronous = False

    def __init__(self, world: World) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        super().__init__(world)
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
        self.strategy = FullyParallelSaveStrategyWrapper(strategy, None, True) if self.fully_parallel else strategy
        self.queue = AsyncCallsQueue() if self.asynchronous else None

    def described(self, state: dict) -> dict:
        from megatron.core.dist_checkpointing import ShardedTensor

        described = {}
        for key, (tensor, split) in state.items():
            offsets = [] if split is None else [(split, self.world.rank, self.world.ranks)]
            replica = self.world.rank if split is None else 0
            described[key] = ShardedTensor.from_rank_offsets(key, tensor, *offsets, replica_id=replica)
        return described

    def save(self, state: dict, path: Path) -> tuple[float, float]:
        import torch
        from megatron.core import dist_checkpointing

        if self.world.rank == 0:
            path.mkdir(parents=True)
        torch.distributed.barrier()
        described, options = self.described(state), {"sharded_strategy": self.strategy}
        if self.queue is None:
            return self.blocking(path, lambda: dist_checkpointing.save(described, str(path), **options))
        start = time.monotonic()
        request = dist_checkpointing.save(described, str(path), async_sharded_save=True, **options)
        self.queue.schedule_async_request(request)
        stall = time.monotonic() - start
        self.queue.maybe_finalize_async_calls(blocking=True)
        if self.world.rank == 0:
            fsync_tree(path)
        torch.distributed.barrier()
        return stall, time.monotonic() - start

    def load(self, state: dict, path: Path) -> None:
        from megatron.core import dist_checkpointing

        dist_checkpointing.load(self.described(state), str(path))

    def close(self) -> None:
        if self.queue is not None:
            self.queue.close()


class McoreAsync(Mcore):
    asynchronous = True


class McoreFullyParallel(Mcore):
    fully_parallel = True


class Safetensors(Method):
    """One file a rank with all that it holds: no deduplication, no other layout."""

    def save(self, state: dict, path: Path) -> tuple[float, float]:
        from safetensors.torch import save_file

        path.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor for key, (tensor, _) in state.items()}
        return self.blocking(path, lambda: save_file(tensors, path / f"{self.world.rank}.safetensors"))

    def load(self, state: dict, path: Path) -> None:
        from safetensors.torch import load_file

        if self.world.ranks == 1:
            raise NotImplementedError("files of another layout")
        loaded = load_file(path / f"{self.world.rank}.safetensors")
        for key, (tensor, _) in state.items():
            tensor.copy_(loaded[key])


METHODS = {
    "ours": Ours,
    "dcp_sync": Dcp,
    "dcp_async": DcpAsync,
    "mcore_sync": Mcore,
    "mcore_async": McoreAsync,
    "mcore_fully_parallel": McoreFullyParallel,
    "safetensors": Safetensors,
}


# ---------------------------------------------------------------- limits of the machine


def raw_write(path: Path, size: int) -> float:
    """Return the seconds to write and sync ``size`` bytes past the page cache."""
    buffer = mmap.mmap(-1, BLOCK)
    buffer.write(os.urandom(1 << 16) * (BLOCK >> 16))
    start = time.monotonic()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    for _ in range(-(-size // BLOCK)):
        os.write(fd, buffer)
    os.fsync(fd)
    os.close(fd)
    return time.monotonic() - start


def raw_read(path: Path) -> float:
    buffer = mmap.mmap(-1, BLOCK)
    start = time.monotonic()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)
    return time.monotonic() - start


def memcpy(size: int, buffers: tuple[Any, Any]) -> float:
    """Return the seconds to copy ``size`` bytes from one part of memory to another, both there."""
    source, target = buffers
    start = time.monotonic()
    ctypes.memmove(target.data_ptr(), source.data_ptr(), size)
    return time.monotonic() - start


def cpu_seconds() -> float:
    """Processor seconds of this process and of all its descendants, living and gone."""
    import psutil

    gone = resource.getrusage(resource.RUSAGE_CHILDREN)
    me = psutil.Process()
    total = gone.ru_utime + gone.ru_stime
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


# ---------------------------------------------------------------- the run, on each rank


def slowest(value: float) -> float:
    import torch

    tensor = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor.item()


def total(value: float) -> float:
    import torch

    tensor = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(tensor)
    return tensor.item()


def timed_load(method: Method, state: dict, path: Path) -> float | None:
    import torch

    if method.world.rank == 0:
        drop_from_cache(path)
    torch.distributed.barrier()
    start = time.monotonic()
    try:
        method.load(state, path)
    except NotImplementedError:
        return None
    return slowest(time.monotonic() - start)


def limits(world: World, unique: int, staged: int, buffers: tuple[Any, Any]) -> dict[str, float]:
    import torch

    path = world.folder / f"raw{world.rank}"
    torch.distributed.barrier()
    write_s = slowest(raw_write(path, unique // world.ranks))
    torch.distributed.barrier()
    read_s = slowest(raw_read(path))
    torch.distributed.barrier()
    copy_s = min(slowest(memcpy(staged, buffers)) for _ in range(3))
    path.unlink()
    return {"write_s": write_s, "read_s": read_s, "memcpy_s": copy_s}


def measure_saves(folder: str, names: list[str], rounds: int, gigabytes: float) -> dict[str, Any]:
    """Run on each rank of the first world: saves, and loads of the same layout."""
    world, state, total_bytes, unique = start_world(folder, gigabytes)
    import torch

    methods = {name: METHODS[name](world) for name in names}
    staged = int(slowest(unique / world.ranks))
    buffers = torch.ones(staged, dtype=torch.uint8), torch.zeros(staged, dtype=torch.uint8)
    figures: dict[str, list] = {name: [] for name in names}
    bounds = []
    for number in range(rounds + 1):
        bound = limits(world, unique, staged, buffers)
        for name, method in methods.items():
            path = world.folder / name / f"iter_{number:07d}"
            change(state)
            torch.distributed.barrier()
            cpu = cpu_seconds()
            stall, durable = method.save(state, path)
            figure = {"stall_s": slowest(stall), "durable_s": slowest(durable), "cpu_s": total(cpu_seconds() - cpu)}
            if number:
                figure["load_s"] = timed_load(method, state, path)
                figures[name].append(figure)
            torch.distributed.barrier()
            if world.rank == 0 and number:
                shutil.rmtree(world.folder / name / f"iter_{number - 1:07d}")
        if number:
            bounds.append(bound)
        print(f"round {number} of {rounds}", file=sys.stderr) if world.rank == 0 else None
    for method in methods.values():
        method.close()
    return {"figures": figures, "bounds": bounds, "bytes_per_rank": total_bytes, "bytes_unique": unique}


def measure_resharded(folder: str, names: list[str], rounds: int, gigabytes: float) -> dict[str, Any]:
    """Run on the only rank of the second world: load everything that the first world saved last."""
    world, state, _, _ = start_world(folder, gigabytes)
    methods = {name: METHODS[name](world) for name in names}
    figures: dict[str, list] = {name: [] for name in names}
    raw = []
    for _ in range(rounds):
        path = world.folder / "raw"
        raw_write(path, sum(t.numel() * t.element_size() for t, _ in state.values()))
        raw.append(raw_read(path))
        for name, method in methods.items():
            figures[name].append(timed_load(method, state, max((world.folder / name).glob("iter_*"))))
    for method in methods.values():
        method.close()
    return {"figures": figures, "raw_read_s": raw}


def start_world(folder: str, gigabytes: float) -> tuple[World, dict, int, int]:
    import torch

    from launch.env import read_rank_env
    from megatron_zaya.compat import cpu

    cpu.install()
    env = read_rank_env()
    torch.distributed.init_process_group("gloo", rank=env.rank, world_size=env.world_size)
    world = World(env.rank, env.world_size, Path(folder))
    state = make_state(env.rank, env.world_size, gigabytes)
    sizes = {key: tensor.numel() * tensor.element_size() for key, (tensor, _) in state.items()}
    unique = sum(n * (1 if state[key][1] is None else env.world_size) for key, n in sizes.items())
    return world, state, sum(sizes.values()), unique


# ---------------------------------------------------------------- the report


def median(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.median(values) if values else None


def summarise(first: dict, second: dict, names: list[str]) -> dict[str, Any]:
    unique, bounds = first["bytes_unique"], first["bounds"]
    bound = {key: statistics.median(b[key] for b in bounds) for key in bounds[0]}
    raw_one = statistics.median(second["raw_read_s"])
    methods = {}
    for name in names:
        rows = first["figures"][name]
        reshard = [value for value in second["figures"][name] if value is not None]
        methods[name] = {key: median(rows, key) for key in ("stall_s", "durable_s", "cpu_s", "load_s")} | {
            "reshard_s": statistics.median(reshard) if reshard else None,
            "rounds": rows,
        }
    ours = methods["ours"]

    def ratio(method: str, key: str) -> float | None:
        other = methods.get(method, {}).get(key)
        return None if other is None else other / ours[key]

    reached = {
        "stall / memcpy bound": ours["stall_s"] / bound["memcpy_s"],
        "stall of dcp_async / ours": ratio("dcp_async", "stall_s"),
        "durable: share of raw write": bound["write_s"] / ours["durable_s"],
        "durable of mcore_fully_parallel / ours": ratio("mcore_fully_parallel", "durable_s"),
        "cpu seconds per GB": ours["cpu_s"] / (unique / 1e9),
        "load: share of raw read": bound["read_s"] / ours["load_s"],
        "load of dcp_sync / ours": ratio("dcp_sync", "load_s"),
        "reshard: share of raw read": raw_one / ours["reshard_s"],
        "reshard of dcp_sync / ours": ratio("dcp_sync", "reshard_s"),
    }
    goals = {}
    for name, value in reached.items():
        goal, sense = GOALS[name]
        met = None if value is None else (value <= goal if sense == "at most" else value >= goal)
        goals[name] = {"reached": value, "goal": f"{sense} {goal}", "met": met}
    return {"methods": methods, "limits": bound | {"read_one_rank_s": raw_one}, "goals": goals}


def print_table(result: dict[str, Any]) -> None:
    columns = ("stall_s", "durable_s", "cpu_s", "load_s", "reshard_s")
    print(f"{'':22}" + "".join(f"{c:>12}" for c in columns))
    for name, figures in result["methods"].items():
        cells = ("-" if figures[c] is None else f"{figures[c]:.3f}" for c in columns)
        print(f"{name:22}" + "".join(f"{cell:>12}" for cell in cells))
    print("limits:", ", ".join(f"{key} {value:.3f}" for key, value in result["limits"].items()))
    for name, goal in result["goals"].items():
        value = "-" if goal["reached"] is None else f"{goal['reached']:.2f}"
        verdict = {True: "reached", False: "NOT reached", None: "not measured"}[goal["met"]]
        print(f"{name:42} {value:>8}   goal: {goal['goal']:14} {verdict}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.71, help="state of a rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(METHODS), metavar="NAME,NAME", help="these methods; ours always")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary folder here")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(argv)
    names = ["ours", *(name for name in options.only.split(",") if name != "ours")]
    if unknown := set(names) - set(METHODS):
        sys.exit(f"--only: no method is called {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    from tests.ranks import run_ranks

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix="bench-checkpoint-") as folder:
        arguments = (folder, names, options.rounds, options.gigabytes)
        first = run_ranks(measure_saves, 2, *arguments)[0]
        second = run_ranks(measure_resharded, 1, *arguments)[0]
    import torch

    result = {
        "benchmark": "checkpoint",
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "load_average_at_start": load},
        "load_average_at_end": os.getloadavg()[0],
        "versions": {"torch": torch.__version__},
        "rounds": options.rounds,
        "bytes_per_rank": first["bytes_per_rank"],
        "bytes_unique": first["bytes_unique"],
    } | summarise(first, second, names)
    print(json.dumps(result)) if options.json else print_table(result)


if __name__ == "__main__":
    main()
