"""Tokens per second of one training step: ours and transformers' ZayaForCausalLM, side by side.

    python benchmarks/train_step.py                       both models, a table
    python benchmarks/train_step.py --model small --json  one JSON object on standard output

A step is forward, backward and torch.optim.AdamW, without clipping. Both sides get the same architecture, weights,
batch, loss and optimizer settings; their first losses must agree, or the benchmark stops.

How to read it. Each side has a process of its own, as its users have it, so that neither finds memory that the other
left behind: transformers is started plainly, ours as our training starts, which on a CPU tells the C library's
allocator to keep freed memory (megatron_zaya/compat/host_memory.py). The sides take turns of one or more steps, in
another order each round, so that whatever else the machine does falls on all; `ratio` is the median over rounds of
(their time / our time) and is the figure to trust on a noisy machine, `ratio_quartiles` its spread. On a CPU a third
process runs transformers with our setting of the allocator: `ratio_same_allocator` is what is left of the ratio then,
the part that is the model's; a fourth runs ours without its compiled operations, as it is where no C compiler was at
hand (megatron_zaya/model/fused.py): `ratio_not_compiled`. Tokens per second are batch * seq / median step time and
depend on the machine. The peer runs at its best: each of transformers' expert implementations is tried first and the
fastest one is measured (`experts`), with torch's fused attention (sdpa). On no side is the model compiled. Use
`--threads 1` to compare two versions of the code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from megatron_zaya.compat.host_memory import keep_freed_memory
from megatron_zaya.config import RunConfig, load_config
from megatron_zaya.model import fused

ROOT = Path(__file__).resolve().parents[1]
# transformer_config has the same table, but importing it would bring Megatron into the peer's process.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS, OURS_PLAIN, THEIRS, THEIRS_TUNED = "ours", "ours_not_compiled", "transformers", "transformers_same_allocator"
EXPERT_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
ADAMW = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
BATCHED_LIMIT_BYTES = 4 << 30
OTHER_RATIOS = ("ratio_same_allocator", "ratio_not_compiled")
WEIGHTS = "model.safetensors"
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


@dataclass(frozen=True)
class Case:
    """One architecture and its default size: small enough that both models take some minutes on 2 cores."""

    file: str
    batch: int
    seq: int
    rounds: int
    steps: int
    """Steps of a side in a round: enough that the change of process at its beginning does not count."""


CASES = {
    "small": Case("smoke_cpu.yaml", batch=4, seq=256, rounds=20, steps=8),
    "100m": Case("zaya_100m.yaml", batch=2, seq=1024, rounds=10, steps=2),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*CASES, "all"], default="all")
    parser.add_argument("--rounds", type=int, help="measured rounds; in each, every side has its turn")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seq", type=int, help="sequence length in tokens")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the run file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Run:
    """What every side is given."""

    config: RunConfig
    device: torch.device
    size: int
    seq: int
    threads: int | None
    folder: Path
    """Where ours leaves its weights for the others."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return DTYPES[self.config.run.precision]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return tokens and labels [size, seq]; equal in every process."""
        generator = torch.Generator().manual_seed(1)
        stream = torch.randint(0, self.config.model.vocab_size, (self.size, self.seq + 1), generator=generator)
        stream = stream.to(self.device)
        return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()

    def batched_experts_bytes(self) -> int:
        """Return what transformers' "batched_mm" keeps for the backward pass: a copy of its expert for each token."""
        model = self.config.model
        values = self.size * self.seq * model.num_layers * 3 * model.moe_ffn_hidden_size * model.hidden_size
        return values * self.dtype.itemsize


class Side:
    """One implementation with its optimizer and its batch; what the parent process calls by name."""

    def __init__(self, model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], run: Run) -> None:
        self.model, self.loss_of, self.run = model, loss_of, run
        self.batch = run.batch()
        self.optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(self) -> float:
        """Run one training step and return its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(*self.batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def timed_steps(self, steps: int) -> float:
        """Return the seconds per step of ``steps`` steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def use_experts(self, name: str) -> None:
        """Select transformers' implementation of the experts."""
        self.model.set_experts_implementation(name)

    def fastest_experts(self) -> tuple[str, dict[str, float | None]]:
        """Select transformers' fastest expert implementation here; return it and each one's best step time.

        None stands for one that fails here, or whose memory would be out of all proportion.
        """
        tried: dict[str, float | None] = {}
        for name in EXPERT_IMPLEMENTATIONS:
            tried[name] = None
            if name == "batched_mm" and self.run.batched_experts_bytes() > BATCHED_LIMIT_BYTES:
                continue
            self.use_experts(name)
            try:
                tried[name] = min(self.timed_steps(1) for _ in range(3))
            except (RuntimeError, NotImplementedError):
                continue
        best = min((seconds, name) for name, seconds in tried.items() if seconds is not None)[1]
        self.use_experts(best)
        return best, tried


@contextlib.contextmanager
def our_side(run: Run, compiled: bool) -> Iterator[Side]:
    """Build ours as our training does, and leave its weights and configuration in transformers' format."""
    from megatron_zaya.compat import cpu, quiet_megatron

    quiet_megatron()
    if cpu.install():
        keep_freed_memory()
    from megatron_zaya.config.sections import ParallelConfig
    from megatron_zaya.convert.in_memory import to_hf
    from megatron_zaya.model.init import initialise
    from megatron_zaya.parallel.groups import build_process_groups

    if not compiled:
        fused.LIBRARY = None
    sys.path.insert(0, str(ROOT))  # for the tests' model builders, when run as a script
    from tests.model.small import hf_config, our_model

    backend = "nccl" if run.device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        pg_collection = build_process_groups(ParallelConfig(), seed=1234)
        ours = our_model(run.config, pg_collection, run.dtype).to(run.device).train()
        initialise(ours, ours.config, run.config.run.seed)
        state = {ours.global_name(name): tensor for name, tensor in ours.state_dict().items() if tensor is not None}
        state = {name: tensor.contiguous() for name, tensor in to_hf(state, run.config.model).items()}
        safetensors.torch.save_file(state, run.folder / WEIGHTS)
        hf_config(run.config).save_pretrained(run.folder)
        yield Side(ours, lambda tokens, labels: ours(tokens, labels=labels).mean(), run)
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def their_side(run: Run) -> Iterator[Side]:
    """Build transformers' model with the weights that `our_side` left, in a process that has nothing of ours."""
    from transformers import ZayaConfig, ZayaForCausalLM

    theirs = ZayaForCausalLM(ZayaConfig.from_pretrained(run.folder)).to(run.device, run.dtype).train()
    theirs.set_attn_implementation("sdpa")
    missing = theirs.load_state_dict(safetensors.torch.load_file(run.folder / WEIGHTS), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing  # tied
    theirs.set_experts_implementation("eager")

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        return theirs(tokens, labels=labels, shift_labels=labels, use_cache=False).loss

    yield Side(theirs, loss_of, run)


def serve(connection: Connection, name: str, run: Run) -> None:
    """Run side ``name`` in this process: answer each (method, arguments) with its result until None comes."""
    if run.threads:
        torch.set_num_threads(run.threads)
    if name == THEIRS_TUNED:
        keep_freed_memory()
    with our_side(run, name == OURS) if name in (OURS, OURS_PLAIN) else their_side(run) as side:
        connection.send("ready")
        while (call := connection.recv()) is not None:
            method, arguments = call
            connection.send(getattr(side, method)(*arguments))


class Worker:
    """The process of one side."""

    def __init__(self, name: str, run: Run) -> None:
        self.name = name
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, name, run), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def __call__(self, method: str, *arguments: Any) -> Any:
        self.connection.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            sys.exit(f"the process of {self.name} ended (exit status {self.process.exitcode}); see above for why")

    def close(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.connection.send(None)
        self.process.join()


def check_first_loss(workers: dict[str, Worker], precision: str) -> dict[str, float]:
    """Run step 1 of every side and return its losses; they must agree, or the sides do different work."""
    losses = {name: worker("step") for name, worker in workers.items()}
    difference = max(abs(losses[OURS] / loss - 1) for loss in losses.values())
    if difference > LOSS_TOLERANCE[precision]:
        sys.exit(f"the first losses differ: {losses}; the work is not the same")
    return losses | {"relative_difference": difference}


def summary(times: list[float], tokens: int) -> dict[str, float]:
    quartiles = statistics.quantiles(times, n=4)
    return {
        "tokens_per_s": tokens / statistics.median(times),
        "median_step_s": statistics.median(times),
        "step_s_quartiles": [quartiles[0], quartiles[2]],
    }


def alternate(workers: dict[str, Worker], rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the step times of each side; another one begins each round."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    names = list(workers)
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(workers[name]("timed_steps", steps))
    return times


def ratio_of(times: list[float], ours: list[float], suffix: str = "") -> dict[str, Any]:
    ratios = [b / a for a, b in zip(ours, times, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {f"ratio{suffix}": statistics.median(ratios), f"ratio{suffix}_quartiles": [quartiles[0], quartiles[2]]}


def measure(case: Case, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the figures of one architecture."""
    precision = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    config = load_config(ROOT / "configs" / case.file, [f"run.precision={precision}", *options.set])
    size, seq = options.batch or case.batch, options.seq or case.seq
    names = [OURS, OURS_PLAIN, THEIRS, THEIRS_TUNED] if device.type == "cpu" else [OURS, THEIRS]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run = Run(config, device, size, seq, options.threads, Path(folder))
        workers = {}
        for name in names:  # one after the other: ours leaves its weights for theirs
            workers[name] = Worker(name, run)
            stack.callback(workers[name].close)
        losses = check_first_loss(workers, precision)
        experts, tried = workers[THEIRS]("fastest_experts")
        if THEIRS_TUNED in workers:
            workers[THEIRS_TUNED]("use_experts", experts)
        for name in names:
            workers[name]("timed_steps", 3)
        times = alternate(workers, options.rounds or case.rounds, case.steps)
        parameters = workers[OURS]("parameters")
    sides = {name: summary(times[name], size * seq) for name in names}
    sides[THEIRS] |= {"experts": experts, "experts_step_s": tried}
    figures = {"parameters": parameters, "batch": size, "seq": seq, "dtype": precision, "rounds": len(times[OURS])}
    figures |= {"loss": losses} | sides | ratio_of(times[THEIRS], times[OURS])
    if device.type == "cpu":
        figures |= ratio_of(times[THEIRS_TUNED], times[OURS], "_same_allocator")
        figures |= ratio_of(times[THEIRS], times[OURS_PLAIN], "_not_compiled")
    return figures


def describe_machine(device: torch.device) -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "compiled_operations": fused.LIBRARY is not None,
        "system": platform.system(),
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['machine']['device']}, {result['machine']['threads']} threads, torch {result['versions']['torch']}")
    print(f"{'model':6} {'batch':>9} {'dtype':5} {'ours tok/s':>11} {'theirs tok/s':>13} {'ratio':>6}  quartiles")
    for name, figures in result["models"].items():
        low, high = figures["ratio_quartiles"]
        other = [f"{figures[name]:.2f}" if name in figures else "-" for name in OTHER_RATIOS]
        print(
            f"{name:6} {figures['batch']:>3} x{figures['seq']:>4} {figures['dtype']:5} "
            f"{figures['ours']['tokens_per_s']:11.0f} {figures['transformers']['tokens_per_s']:13.0f} "
            f"{figures['ratio']:6.2f}  {low:.2f}-{high:.2f}   "
            f"same allocator: {other[0]}   not compiled: {other[1]}   "
            f"theirs: {figures['transformers']['experts']} experts; "
            f"first loss {figures['loss']['ours']:.5f} and {figures['loss']['transformers']:.5f}"
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no accelerator; use --device cpu")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    names = list(CASES) if options.model == "all" else [options.model]
    result = {
        "benchmark": "train_step",
        "machine": describe_machine(device),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")},
        "models": {name: measure(CASES[name], options, device) for name in names},
    }
    print(json.dumps(result)) if options.json else print_table(result)
    return result


if __name__ == "__main__":
    main()
