"""What these ranks achieve, alone and together: `python -m megatron_zaya.preflight.measure OUT.json`, one per device.

    gemm_tflops            square matrix product, bf16 (fp32 on a CPU)
    memory_gbs             copy within device memory, read plus written
    node.all_reduce        ranks of one node                 rail.all_reduce   the same local rank of all nodes
    rail.send_recv         to the same rank of the next node, one pair after the other
    world.all_reduce, world.all_to_all

Collectives are in bus bandwidth (GB/s), as rccl-tests and `zaya topology` print it. On CPU ranks everything runs with
gloo and small sizes, so that the path itself is tested without accelerators.
"""

from __future__ import annotations

import datetime
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.agreement import agree, gather_facts
from launch.env import LaunchError, RankContext, read_rank_env
from megatron_zaya.compat import cpu, import_megatron
from topology.cost import bus_factor

ROUNDS = 5


class Bench:
    """Timing on this rank's device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self.size_bytes = 1 << 28 if self.gpu else 1 << 20

    def seconds(self, function: Callable[[], Any]) -> float:
        """Median time of ``function``, after one round to warm up."""
        times = []
        for _ in range(ROUNDS + 1):
            self._synchronize()
            start = time.perf_counter()
            function()
            self._synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def _synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def buffer(self, ranks: int = 1) -> torch.Tensor:
        """A buffer whose length ``ranks`` divides."""
        return torch.zeros(self.size_bytes // 4 // ranks * ranks, device=self.device)

    def gemm_tflops(self) -> float:
        """One large product."""
        size = 8192 if self.gpu else 384
        a = torch.randn(size, size, device=self.device, dtype=torch.bfloat16 if self.gpu else torch.float32)
        return 2 * size**3 / self.seconds(lambda: a @ a) / 1e12

    def memory_gbs(self) -> float:
        """One large copy."""
        source = self.buffer()
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source)) / 1e9

    def all_reduce(self, group: dist.ProcessGroup) -> float:
        """Bus bandwidth of an all-reduce."""
        buffer, ranks = self.buffer(), group.size()
        return buffer.nbytes * bus_factor("all_reduce", ranks) / self.seconds(
            lambda: dist.all_reduce(buffer, group=group)
        ) / 1e9  # fmt: skip

    def all_to_all(self, group: dist.ProcessGroup) -> float:
        """Bus bandwidth of an all-to-all."""
        ranks = group.size()
        send = self.buffer(ranks)
        receive = torch.empty_like(send)
        seconds = self.seconds(lambda: dist.all_to_all_single(receive, send, group=group))
        return send.nbytes * (ranks - 1) / ranks / seconds / 1e9

    def send_recv(self, source: int, target: int, rank: int) -> float | None:
        """Bandwidth from one rank to another; known to the receiver."""
        buffer = self.buffer()
        if rank == source:
            self.seconds(lambda: dist.send(buffer, target))
        elif rank == target:
            return buffer.nbytes / self.seconds(lambda: dist.recv(buffer, source)) / 1e9
        return None


def _pairs(context: RankContext, bench: Bench) -> dict[str, float]:
    """Bandwidth from this node to the next on this rank's rail; even nodes send first, then odd ones."""
    nodes, per_node = context.nodes, context.local_world_size
    found = {}
    for parity in (0, 1):
        for node in range(parity, nodes, 2):
            source, target = (n * per_node + context.local_rank for n in (node, (node + 1) % nodes))
            value = bench.send_recv(source, target, context.rank)
            if value is not None:
                found[context.host_of(source)] = value
    return found


def measure(context: RankContext, device: torch.device) -> dict[str, Any]:
    """Return the figures of this rank. Collective."""
    bench, size, per_node = Bench(device), context.world_size, context.local_world_size
    figures: dict[str, Any] = {"gemm_tflops": bench.gemm_tflops(), "memory_gbs": bench.memory_gbs()}
    if per_node > 1:
        groups = [dist.new_group(list(range(first, first + per_node))) for first in range(0, size, per_node)]
        figures["node.all_reduce"] = bench.all_reduce(groups[context.node_rank])
    if context.nodes > 1:
        rails = [dist.new_group(list(range(local, size, per_node))) for local in range(per_node)]
        figures["rail.all_reduce"] = bench.all_reduce(rails[context.local_rank])
        figures["rail.send_recv_from"] = _pairs(context, bench)
    if size > 1:
        figures["world.all_reduce"] = bench.all_reduce(dist.group.WORLD)
        figures["world.all_to_all"] = bench.all_to_all(dist.group.WORLD)
    host = context.hosts[context.node_rank] if context.hosts else socket.gethostname()
    return {"rank": context.rank, "host": host, "rail": context.local_rank, "size_bytes": bench.size_bytes, **figures}


def main(argv: list[str]) -> int:
    """Measure, gather, write."""
    try:
        context = read_rank_env()
        context.bind()
        if context.nodes > 1:
            agree(context, gather_facts(context, {}))
    except LaunchError as error:
        print(f"zaya: {error}", file=sys.stderr)
        return 2
    import_megatron()
    cpu.install()
    if cpu.has_accelerator():
        torch.cuda.set_device(context.device_index)
    timeout = datetime.timedelta(seconds=300)
    backend = "nccl" if cpu.has_accelerator() else "gloo"
    store = dist.HashStore() if context.is_single else None
    dist.init_process_group(backend, store=store, rank=context.rank, world_size=context.world_size, timeout=timeout)
    figures = measure(context, cpu.device())
    everyone: list[Any] = [None] * context.world_size
    dist.all_gather_object(everyone, figures)
    if context.rank == 0:
        Path(argv[0]).write_text(json.dumps({"backend": backend, "ranks": everyone}, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
