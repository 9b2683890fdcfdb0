"""Tokens per second of one training step: ours and transformers' ZayaForCausalLM, side by side.

    python benchmarks/train_step.py                       both models, a table
    python benchmarks/train_step.py --model small --json  one JSON object on standard output

A step is forward, backward and torch.optim.AdamW, without clipping. Both sides get the same architecture, weights,
batch, loss and optimizer settings; their first losses must agree, or the benchmark stops.

How to read it. The steps alternate in one process (ours, theirs, theirs, ours, ...), so that whatever else the
machine does falls on both; `ratio` is the median over rounds of (their time / our time) and is the figure to trust
on a noisy machine, `ratio_quartiles` its spread. Tokens per second are batch * seq / median step time and depend on
the machine. The peer runs at its best: each of transformers' expert implementations is tried first and the fastest
one is measured (`experts`), with torch's fused attention (sdpa). On both sides the model is not compiled. Use
`--threads 1` to compare two versions of the code.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_zaya.compat import cpu, quiet_megatron
from megatron_zaya.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[1]
EXPERT_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
ADAMW = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
BATCHED_LIMIT_BYTES = 4 << 30
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


@dataclass(frozen=True)
class Case:
    """One architecture and its default size: small enough that both models take under 3 minutes on 2 cores."""

    file: str
    batch: int
    seq: int
    steps: int


CASES = {
    "small": Case("smoke_cpu.yaml", batch=4, seq=256, steps=20),
    "100m": Case("zaya_100m.yaml", batch=2, seq=1024, steps=12),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*CASES, "all"], default="all")
    parser.add_argument("--steps", type=int, help="measured rounds, one step of each side per round")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seq", type=int, help="sequence length in tokens")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the run file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args(argv)


class Side:
    """One implementation with its optimizer."""

    def __init__(self, model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.loss_of = model, loss_of
        self.optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Run one training step and return its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(tokens, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def timed_step(self, tokens: Tensor, labels: Tensor) -> float:
        """Return the seconds of one step."""
        if tokens.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.step(tokens, labels)
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def build_sides(config: RunConfig, pg_collection: Any, device: torch.device) -> tuple[Side, Side]:
    """Return ours and transformers' model with equal weights: our initialisation, through the conversion table."""
    from transformers import ZayaForCausalLM

    from megatron_zaya.convert.in_memory import to_hf
    from megatron_zaya.model.init import initialise
    from megatron_zaya.model.transformer_config import DTYPES

    sys.path.insert(0, str(ROOT))  # for the tests' model builders, when run as a script
    from tests.model.small import hf_config, our_model

    dtype = DTYPES[config.run.precision]
    ours = our_model(config, pg_collection, dtype).to(device).train()
    initialise(ours, ours.config, config.run.seed)
    theirs = ZayaForCausalLM(hf_config(config)).to(device=device, dtype=dtype).train()
    theirs.set_attn_implementation("sdpa")
    state = {ours.global_name(name): tensor for name, tensor in ours.state_dict().items() if tensor is not None}
    missing = theirs.load_state_dict(to_hf(state, config.model), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing  # tied

    def their_loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return theirs(tokens, labels=labels, shift_labels=labels, use_cache=False).loss

    return Side(ours, lambda tokens, labels: ours(tokens, labels=labels).mean()), Side(theirs, their_loss)


def batched_experts_bytes(config: RunConfig, tokens: int) -> int:
    """Return what transformers' "batched_mm" keeps for the backward pass: a copy of its expert for each token."""
    model = config.model
    bytes_per_value = 2 if config.run.precision == "bf16" else 4
    return tokens * model.num_layers * 3 * model.moe_ffn_hidden_size * model.hidden_size * bytes_per_value


def fastest_experts(
    theirs: Side, batch: tuple[Tensor, Tensor], config: RunConfig
) -> tuple[str, dict[str, float | None]]:
    """Select transformers' fastest expert implementation here; return it and each one's best step time.

    None stands for one that fails here, or whose memory would be out of all proportion.
    """
    tried: dict[str, float | None] = {}
    for name in EXPERT_IMPLEMENTATIONS:
        tried[name] = None
        if name == "batched_mm" and batched_experts_bytes(config, batch[0].numel()) > BATCHED_LIMIT_BYTES:
            continue
        theirs.model.set_experts_implementation(name)
        try:
            tried[name] = min(theirs.timed_step(*batch) for _ in range(3))
        except (RuntimeError, NotImplementedError):
            continue
    best = min((seconds, name) for name, seconds in tried.items() if seconds is not None)[1]
    theirs.model.set_experts_implementation(best)
    return best, tried


def check_first_loss(ours: Side, theirs: Side, batch: tuple[Tensor, Tensor], precision: str) -> dict[str, float]:
    """Run step 1 of both and return its losses; they must agree, or the two sides do different work."""
    theirs.model.set_experts_implementation("eager")
    a, b = ours.step(*batch).item(), theirs.step(*batch).item()
    difference = abs(a / b - 1)
    if difference > LOSS_TOLERANCE[precision]:
        sys.exit(f"the first losses differ: ours {a:.6f}, transformers' {b:.6f}; the work is not the same")
    return {"ours": a, "transformers": b, "relative_difference": difference}


def summary(times: list[float], tokens: int) -> dict[str, float]:
    quartiles = statistics.quantiles(times, n=4)
    return {
        "tokens_per_s": tokens / statistics.median(times),
        "median_step_s": statistics.median(times),
        "step_s_quartiles": [quartiles[0], quartiles[2]],
    }


def measure(case: Case, options: argparse.Namespace, pg_collection: Any, device: torch.device) -> dict[str, Any]:
    """Return the figures of one architecture."""
    precision = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    config = load_config(ROOT / "configs" / case.file, [f"run.precision={precision}", *options.set])
    size, seq = options.batch or case.batch, options.seq or case.seq
    ours, theirs = build_sides(config, pg_collection, device)
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(0, config.model.vocab_size, (size, seq + 1), generator=generator).to(device)
    batch = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()

    losses = check_first_loss(ours, theirs, batch, precision)
    experts, tried = fastest_experts(theirs, batch, config)
    for _ in range(3):  # as warm as theirs
        ours.timed_step(*batch)
    times: dict[Side, list[float]] = {ours: [], theirs: []}
    for round_ in range(options.steps or case.steps):
        for side in (ours, theirs) if round_ % 2 == 0 else (theirs, ours):
            times[side].append(side.timed_step(*batch))
    ratios = [b / a for a, b in zip(times[ours], times[theirs], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "parameters": sum(p.numel() for p in ours.model.parameters()),
        "batch": size,
        "seq": seq,
        "dtype": precision,
        "steps": len(ratios),
        "loss": losses,
        "ours": summary(times[ours], size * seq),
        "transformers": summary(times[theirs], size * seq) | {"experts": experts, "experts_step_s": tried},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['machine']['device']}, {result['machine']['threads']} threads, torch {result['versions']['torch']}")
    print(f"{'model':6} {'batch':>9} {'dtype':5} {'ours tok/s':>11} {'theirs tok/s':>13} {'ratio':>6}  quartiles")
    for name, figures in result["models"].items():
        low, high = figures["ratio_quartiles"]
        print(
            f"{name:6} {figures['batch']:>3} x{figures['seq']:>4} {figures['dtype']:5} "
            f"{figures['ours']['tokens_per_s']:11.0f} {figures['transformers']['tokens_per_s']:13.0f} "
            f"{figures['ratio']:6.2f}  {low:.2f}-{high:.2f}   theirs: {figures['transformers']['experts']} experts; "
            f"first loss {figures['loss']['ours']:.5f} and {figures['loss']['transformers']:.5f}"
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    quiet_megatron()
    cpu.install()
    if options.device == "cuda" and not cpu.has_accelerator():
        sys.exit("--device cuda: torch sees no accelerator; use --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    from megatron_zaya.config.sections import ParallelConfig
    from megatron_zaya.parallel.groups import build_process_groups

    device = cpu.device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        pg_collection = build_process_groups(ParallelConfig(), seed=1234)
        names = list(CASES) if options.model == "all" else [options.model]
        result = {
            "benchmark": "train_step",
            "machine": describe_machine(device),
            "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")},
            "models": {name: measure(CASES[name], options, pg_collection, device) for name in names},
        }
    finally:
        torch.distributed.destroy_process_group()
    print(json.dumps(result)) if options.json else print_table(result)
    return result


if __name__ == "__main__":
    main()
