"""Records some steps with torch's profiler: a trace to look at, and a summary that `zaya profile` prints.

A window of iterations and a list of ranks are configured (`profile`). Ranges named after the parts of the model mark
the forward passes; an operation of the backward pass belongs to the part whose forward operation has its number.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_zaya.config import RunConfig
from megatron_zaya.telemetry.events import Profiled
from megatron_zaya.telemetry.profile import Overlap, Span, Summary, overlap, write_summary
from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.state import TrainingJob

RANGE = "zaya: "
BACKWARD = "autograd::engine::evaluate_function"
COMMUNICATION = ("nccl", "gloo:")
"""How the names of collectives begin: kernels of NCCL and RCCL, calls of gloo."""
HOST = torch.autograd.DeviceType.CPU


def parts_of(model: list[Any]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (part, module) of everything that is timed; inside another part, the inner one counts."""
    for chunk in model:
        stage = chunk.module
        if stage.pre_process:
            yield "embedding", stage.embedding
        for layer in stage.layers:
            yield "attention", layer.self_attention
            yield "core attention", layer.self_attention.core_attention
            yield "experts", layer.mlp
            yield "router", layer.mlp.router
            for norm in (layer.input_layernorm, layer.pre_mlp_layernorm, layer.attention_residual, layer.mlp_residual):
                yield "norms and residuals", norm
        if stage.post_process:
            yield "norms and residuals", stage.final_layernorm
            yield "head", stage.output_layer


@contextlib.contextmanager
def marked(job: TrainingJob) -> Iterator[None]:
    """Name the parts of the model, the reduction of gradients and the optimizer's step in the profile of the block."""
    open_ranges: list[Any] = []

    def enter(part: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            open_ranges.append(record_function(RANGE + part))
            open_ranges[-1].__enter__()

        return hook

    def leave(*args: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    def named(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(RANGE + part):
                return function(*args, **kwargs)

        return call

    hooks = []
    for part, module in parts_of(job.model):
        hooks += [module.register_forward_pre_hook(enter(part)), module.register_forward_hook(leave, always_call=True)]
    transformer = job.model[0].config
    finalize, step = transformer.finalize_model_grads_func, job.optimizer.step
    transformer.finalize_model_grads_func = named("gradient reduction", finalize)
    job.optimizer.step = named("optimizer", step)
    try:
        yield
    finally:
        transformer.finalize_model_grads_func = finalize
        del job.optimizer.step
        for hook in hooks:
            hook.remove()


class Attribution:
    """Finds the part that an event of the profiler belongs to."""

    def __init__(self, events: list[Any]) -> None:
        self.by_number: dict[int, str] = {}
        """Autograd's number of a forward operation: its part."""
        for event in events:
            if event.sequence_nr >= 0 and event.sequence_nr not in self.by_number:
                part = _forward_part(event)
                if part is not None:
                    self.by_number[event.sequence_nr] = part

    def of(self, event: Any) -> tuple[str, str] | None:
        """Return (part, "forward" or "backward"), or None outside of every part."""
        part, again = None, False
        while event is not None:
            if event.name.startswith(RANGE):
                part = part or event.name.removeprefix(RANGE)
            elif event.name.startswith(BACKWARD):
                again = True
                part = part or self._part_of_node(event)
            event = event.cpu_parent
        return (part, "backward" if again else "forward") if part is not None else None

    def _part_of_node(self, event: Any) -> str | None:
        if "AccumulateGrad" in event.name:
            return "gradient accumulation"
        return self.by_number.get(event.sequence_nr)


def _forward_part(event: Any) -> str | None:
    """Return the part whose forward pass, first or repeated, did the event; None for operations of a backward pass."""
    while event is not None and not event.name.startswith(BACKWARD):
        if event.name.startswith(RANGE):
            return event.name.removeprefix(RANGE)
        event = event.cpu_parent
    return None


def part_seconds(events: list[Any], on_device: bool, steps: int) -> dict[str, dict[str, float]]:
    """Return seconds per step of each part, forward and backward: each event's own time, its children's apart."""
    on_host = [event for event in events if event.device_type == HOST]  # kernels count with what started them
    attribution, seconds = Attribution(on_host), {}
    for event in on_host:
        place = attribution.of(event)
        if place is None:
            continue
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        passes = seconds.setdefault(place[0], {"forward": 0.0, "backward": 0.0})
        passes[place[1]] += own / 1e6 / steps
    return seconds


def measured_overlap(events: list[Any], on_device: bool, steps: int) -> Overlap:
    """Return how far communication hides behind computing: of kernels on an accelerator, of operations otherwise."""
    travelling: list[Span] = []
    working: list[Span] = []
    for event in events:
        is_kernel = event.device_type != HOST
        if is_kernel != on_device or (is_kernel and event.is_user_annotation):
            continue
        span = (event.time_range.start / 1e6, event.time_range.end / 1e6)
        if event.name.lower().startswith(COMMUNICATION):
            travelling.append(span)
        elif is_kernel or event.name.startswith("aten::"):
            working.append(span)
    return overlap(travelling, working, steps)


def memory_of(job: TrainingJob) -> dict[str, int]:
    """Return bytes of this rank by what they hold."""
    states = [value for group in _optimizer_states(job.optimizer) for value in group.values()]
    buffers = [buffer for chunk in job.model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    sizes = {
        "parameters": sum(p.numel() * p.element_size() for chunk in job.model for p in chunk.parameters()),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer state": sum(v.numel() * v.element_size() for v in states if isinstance(v, torch.Tensor)),
        "host resident": psutil.Process().memory_info().rss,
    }
    if torch.cuda.is_available():
        sizes["device peak"] = torch.cuda.max_memory_allocated()
    return sizes


def _optimizer_states(optimizer: Any) -> Iterator[dict[str, Any]]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from part.optimizer.state.values()


class Profile(Callback):
    """Profiles this rank while the steps of the window run."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.wanted, self.rank = config.profile, rank
        self.folder = config.run_dir / "profile"
        self.running = contextlib.ExitStack()
        self.profiler: profile | None = None
        self.began = 0.0

    def after_step(self, job: TrainingJob) -> None:
        """Begin or end when the window does."""
        done = job.state.iteration
        if done == self.wanted.profile_step_start:
            self._begin(job)
        if done == self.wanted.last_iteration:
            self._end(job)

    def at_end(self, job: TrainingJob) -> None:
        """A run that ends within the window keeps what there is of it."""
        self._end(job)

    def _begin(self, job: TrainingJob) -> None:
        if self.rank not in self.wanted.profile_ranks:
            return
        on_device = job.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_device else [])
        if self.wanted.record_memory_history and on_device:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self.profiler = self.running.enter_context(profile(activities=activities, record_shapes=True))
        self.running.enter_context(marked(job))
        self.first, self.began = job.state.iteration + 1, time.perf_counter()

    def _end(self, job: TrainingJob) -> None:
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        on_device, steps = job.device.type == "cuda", job.state.iteration + 1 - self.first
        if on_device:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - self.began
        self.running.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = self.folder / f"rank-{self.rank:05d}"
        profiler.export_chrome_trace(f"{stem}.trace.json.gz")
        if self.wanted.record_memory_history and on_device:
            torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        events = list(profiler.events())
        summary = Summary(
            rank=self.rank,
            first_iteration=self.first,
            steps=steps,
            device=torch.cuda.get_device_name(job.device) if on_device else "CPU",
            step_s=elapsed / steps,
            parts=part_seconds(events, on_device, steps),
            overlap=measured_overlap(events, on_device, steps),
            memory_bytes=memory_of(job),
        )
        write_summary(summary, stem.with_suffix(".json"))
        exposed = summary.overlap.exposed_s
        job.events.emit(Profiled(job.state.iteration, self.first, str(self.folder), summary.step_s, exposed))
