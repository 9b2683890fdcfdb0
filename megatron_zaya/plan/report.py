"""What the planner found, as tables, plain data and plan files. Pure but for printing; rich is imported where used."""

from __future__ import annotations

from typing import Any

import yaml

from megatron_zaya.plan.memory import GIB, Memory, StageMemory
from megatron_zaya.plan.search import Candidate, Found
from megatron_zaya.plan.shape import Batch, Layout
from megatron_zaya.plan.step_time import StepTime


def plan_overrides(layout: Layout, batch: Batch) -> dict[str, Any]:
    """Return the sections of a run file that make it this plan."""
    parallel: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vp if layout.vp > 1 else None,
        "context_parallel_size": layout.cp,
        "cp_comm_type": layout.cp_comm_type,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "moe_token_dispatcher_type": layout.dispatcher,
        "sequence_parallel": layout.sequence_parallel and layout.tp > 1,
        "use_distributed_optimizer": layout.use_distributed_optimizer,
        "overlap_grad_reduce": layout.overlap_grad_reduce,
        "overlap_param_gather": layout.overlap_param_gather,
        "ddp_bucket_size": layout.bucket_elements,
        "recompute_granularity": None if layout.recompute == "none" else layout.recompute,
    }
    if layout.recompute == "selective":
        parallel["recompute_modules"] = list(layout.recompute_modules)
    return {
        "parallel": parallel,
        "schedule": {"micro_batch_size": batch.micro_batch_size, "global_batch_size": batch.global_batch_size},
        "data": {"seq_length": batch.seq_length},
    }


def plan_file(candidate: Candidate, comments: list[str], per_node: int) -> str:
    """Return the plan as YAML that `zaya submit --plan` and `zaya topology` read; predictions are comments."""
    layout = candidate.layout
    sizes = {"nodes": layout.world_size // per_node, "gpus": per_node} if layout.world_size >= per_node else {}
    sizes = sizes or {"world_size": layout.world_size}
    lines = [*comments, *_summary(candidate)]
    body = yaml.safe_dump({**sizes, **plan_overrides(layout, candidate.batch)}, sort_keys=False)
    return "".join(f"# {line}\n" for line in lines) + body


def _summary(candidate: Candidate) -> list[str]:
    time, worst = candidate.time, candidate.memory.worst
    return [
        f"predicted: {time.step_s * 1e3:.0f} ms a step, {time.tokens_per_gpu_s:,.0f} tokens/s per GPU, "
        f"{time.tflops:.0f} TFLOP/s per GPU (MFU {time.mfu:.1%})",
        f"predicted: {worst.peak / GIB:.1f} GiB live at the peak ({worst.moment}) + {worst.allowance / GIB:.1f} GiB "
        f"allowances (unverified) on the worst rank; fits with probability {candidate.fit_probability:.3f}",
    ]


def stage_record(stage: StageMemory) -> dict[str, Any]:
    """Return one pipeline rank's memory as plain data, bytes."""
    return {
        **stage.__dict__,
        "step_peak": stage.step_peak,
        "peak": stage.peak,
        "total": stage.total,
    }


def time_record(time: StepTime) -> dict[str, Any]:
    """Return the step time as plain data."""
    return {
        "step_s": time.step_s,
        "tokens_per_gpu_s": time.tokens_per_gpu_s,
        "tflops_per_gpu": time.tflops,
        "mfu": time.mfu,
        "parts_s": dict(time.parts),
    }


def candidate_record(candidate: Candidate) -> dict[str, Any]:
    """Return a plan with its predictions as plain data."""
    return {
        "plan": candidate.layout.describe(),
        **plan_overrides(candidate.layout, candidate.batch),
        "fit_probability": candidate.fit_probability,
        "memory": [stage_record(stage) for stage in candidate.memory.stages],
        "time": time_record(candidate.time),
    }


def found_record(found: Found) -> dict[str, Any]:
    """Return the outcome of a search as plain data."""
    return {
        "considered": found.considered,
        "rejected": dict(found.rejected),
        "best": [candidate_record(candidate) for candidate in found.best],
        "front": [candidate_record(candidate) for candidate in found.front],
    }


def describe(candidate: Candidate) -> str:
    """Return the plan on one line."""
    layout = candidate.layout
    modules = f" ({', '.join(layout.recompute_modules)})" if layout.recompute == "selective" else ""
    return layout.describe() + modules


def show_found(console: Any, found: Found) -> None:
    """Print the ranking, the front and the reasons of rejection."""
    from rich.table import Table

    for title, rows in (("fastest plans that fit", found.best), ("front of memory against time", found.front)):
        table = Table(
            "", "plan", "micro-batch", "ms/step", "tokens/s/GPU", "MFU", "GiB (worst rank)", "fits", title=title
        )
        for number, c in enumerate(rows, start=1):
            table.add_row(
                str(number),
                describe(c),
                str(c.batch.micro_batch_size),
                f"{c.time.step_s * 1e3:.0f}",
                f"{c.time.tokens_per_gpu_s:,.0f}",
                f"{c.time.mfu:.1%}",
                f"{c.memory_bytes / GIB:.1f}",
                f"{c.fit_probability:.3f}",
            )
        console.print(table)
    console.print(f"{found.considered:,} plans considered")
    for reason, count in found.rejected.most_common():
        console.print(f"  {count:,} rejected: {reason}")


def show_memory(console: Any, memory: Memory, capacity_bytes: float) -> None:
    """Print what every pipeline rank needs."""
    from rich.table import Table

    table = Table(title=f"memory of each pipeline rank, GiB (capacity {capacity_bytes / GIB:.1f})")
    columns = ("rank", "parameters", "gradients", "optimizer", "activations", "transient", "boundary", "in flight")
    for column in (*columns, "construction", "step", "optimizer step", "allowances", "total", "moment"):
        table.add_column(column)
    for s in memory.stages:
        parts = (s.parameters, s.gradients, s.optimizer, s.activations, s.transient, s.boundary)
        peaks = (s.construction_peak, s.step_peak, s.optimizer_peak, s.allowance, s.total)
        table.add_row(
            str(s.pp_rank),
            *(f"{part / GIB:.2f}" for part in parts),
            f"{s.microbatches_in_flight:g}",
            *(f"{peak / GIB:.2f}" for peak in peaks),
            s.moment,
        )
    console.print(table)
    worst = memory.worst
    modules = sorted(worst.by_module.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in modules)
    console.print(f"activations of rank {worst.pp_rank} by module, GiB: {listed}")
    console.print(f"checkpoint staging on the host: {memory.staging_host_bytes / GIB:.2f} GiB per rank")
    console.print("allowances (driver, communication library, workspace, fragmentation) are not verified: set them")


def show_time(console: Any, time: StepTime) -> None:
    """Print where the time of a step goes."""
    from rich.table import Table

    table = Table("where", "ms", "share", title=f"step of {time.step_s * 1e3:.1f} ms")
    for name, seconds in sorted(time.parts.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / time.step_s:.1%}")
    console.print(table)
    console.print(
        f"{time.tokens_per_gpu_s:,.0f} tokens/s per GPU, {time.tflops:.1f} TFLOP/s per GPU, MFU {time.mfu:.1%}"
    )
