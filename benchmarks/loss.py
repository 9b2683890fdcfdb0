"""Peak memory and time of the head and its loss at a vocabulary of 262,272: whole logits beside blocks.

    python benchmarks/loss.py [--tokens 512] [--hidden 256] [--workspace-mib 32] [--threads 1] [--json]

Three ways, same inputs, forward and backward: torch (F.cross_entropy of the fp32 logits), Megatron-Core (its column
parallel product and vocab-parallel cross-entropy), and ours for each workspace size. Peak memory is what is allocated
beyond inputs, measured storage by storage; it always holds the gradients of x and of the weight. With it come the
largest errors of loss and gradients against fp64, relative to the largest value. `planned` is arithmetic for the
released model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from live_memory import peak_bytes
from torch import Tensor

from megatron_zaya.compat import cpu, quiet_megatron
from megatron_zaya.model.loss import head_loss

VOCABULARY = 262_272


def inputs(tokens: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 1, hidden, generator=generator).requires_grad_()
    weight = (torch.randn(VOCABULARY, hidden, generator=generator) * 0.02).requires_grad_()
    return x, weight, torch.randint(0, VOCABULARY, (tokens, 1), generator=generator)


def measure(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int, hidden: int) -> dict[str, Any]:
    x, weight, labels = inputs(tokens, hidden)
    with peak_bytes([x, weight, labels]) as live:
        loss = loss_of(x, weight, labels)
        loss.sum().backward()
    result = {"peak_mib": live.peak.total_bytes / 2**20, "loss": loss.detach().flatten()}
    result |= {"x": x.grad, "weight": weight.grad}
    x, weight, labels = inputs(tokens, hidden)
    start = time.perf_counter()
    loss_of(x, weight, labels).sum().backward()
    return result | {"seconds": time.perf_counter() - start}


def torch_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.T).flatten(0, 1), labels.flatten(), reduction="none")


def run(tokens: int, hidden: int, workspaces_mib: list[int]) -> dict[str, Any]:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_zaya.config.sections import ParallelConfig
    from megatron_zaya.parallel.groups import build_process_groups, release_process_groups

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    group = build_process_groups(ParallelConfig(), seed=0).tp
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "torch": torch_loss,
        "megatron_core": lambda x, weight, labels: vocab_parallel_cross_entropy(x @ weight.T, labels),
    }
    for mib in workspaces_mib:
        ways[f"blocks_{mib}_mib"] = lambda x, weight, labels, mib=mib: head_loss(x, weight, labels, mib * 2**20, group)
    measured = {name: measure(way, tokens, hidden) for name, way in ways.items()}
    x, weight, labels = inputs(tokens, hidden)
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = head_loss(x, weight, labels, 64 * 2**20, group)
    loss.sum().backward()
    exact = {"loss": loss.detach().flatten(), "x": x.grad, "weight": weight.grad}
    figures = {}
    for name, result in measured.items():
        errors = {
            f"{what}_error": ((result[what] - value).abs().max() / value.abs().max()).item()
            for what, value in exact.items()
        }
        figures[name] = {"peak_mib": round(result["peak_mib"], 1), "seconds": round(result["seconds"], 2), **errors}
    release_process_groups()
    torch.distributed.destroy_process_group()
    logits = 4 * 4096 * VOCABULARY / 2**30
    planned = {"tokens": 4096, "fp32_logits_gib": round(logits, 2), "blocks_256_mib_gib": 0.25}
    size = {"vocabulary": VOCABULARY, "tokens": tokens, "hidden": hidden, "threads": torch.get_num_threads()}
    return {"benchmark": "loss", **size, "ways": figures, "planned": planned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--workspace-mib", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    quiet_megatron()
    cpu.install()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = run(arguments.tokens, arguments.hidden, arguments.workspace_mib)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, figures in result["ways"].items():
        print(f"{name:20} peak {figures['peak_mib']:8.1f} MiB   {figures['seconds']:6.2f} s")


if __name__ == "__main__":
    main()
