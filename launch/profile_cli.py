"""`zaya profile`: run a few steps under torch's profiler and lay the planner's prediction beside what was measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_zaya.config import ConfigError, RunConfig, load_config

if TYPE_CHECKING:
    from megatron_zaya.telemetry.profile import Summary

RunFile = Annotated[Path, typer.Argument(help="Run file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, applied in order.")]
GIB = 1 << 30


def short_run(config: RunConfig, warmup: int, steps: int, ranks: list[int]) -> list[str]:
    """Return the overrides that make a run a short one of its own: no checkpoint is read or written."""
    return [
        f"run.name={config.run.name}-profile",
        "phases=[]",
        f"schedule.train_iters={warmup + steps}",
        "schedule.lr_warmup_iters=0",
        "schedule.lr_decay_iters=null",
        "schedule.eval_interval=0",
        "checkpoint.load=null",
        "checkpoint.load_iteration=null",
        "checkpoint.continue_from=null",
        "checkpoint.save_interval=0",
        "checkpoint.save_at_end=false",
        "telemetry.loss_curve=false",
        f"profile.profile_step_start={warmup}",
        f"profile.profile_step_end={warmup + steps}",
        f"profile.profile_ranks={ranks}",
    ]


def profile(
    run_file: RunFile,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Ranks on this machine, one per accelerator.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are recorded.")] = 3,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 2,
    ranks: Annotated[list[int] | None, typer.Option("--rank", help="Ranks to record; may be repeated.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Also write the allocator's history.")] = False,
    accelerator: Annotated[str | None, typer.Option(help="Compare with the plan for it; default: this one.")] = None,
) -> None:
    """Profile a few steps of a run: trace, communication that is not hidden, memory, and the plan beside it."""
    from launch.local import run_ranks
    from megatron_zaya.preconditions import check_run
    from megatron_zaya.telemetry.profile import read_summary

    chosen = ranks or [0]
    beyond = [rank for rank in chosen if rank >= nproc]
    if beyond:
        raise ConfigError(
            f"--rank {beyond[0]}: there are {nproc} ranks; name one from 0 to {nproc - 1}, or more --nproc"
        )
    given = list(overrides or ())
    given += short_run(load_config(run_file, given), warmup, steps, chosen)
    given.append(f"profile.record_memory_history={str(memory).lower()}")
    config = load_config(run_file, given)
    check_run(config, nproc)
    shutil.rmtree(config.run_dir, ignore_errors=True)
    status = run_ranks(run_file, given, nproc)
    if status:
        raise typer.Exit(status)
    for rank in chosen:
        show(config, read_summary(config.run_dir / "profile" / f"rank-{rank:05d}.json"), nproc, accelerator)
    typer.echo(f"traces: {config.run_dir / 'profile'} (open them at ui.perfetto.dev)")


def _accelerator_of(summary: Summary, asked: str | None) -> str:
    """Return the planner's name of the accelerator to compare with."""
    from megatron_zaya.plan.hardware import accelerators

    return asked or next((name for name in accelerators() if name in summary.device), "MI300X")


def show(config: RunConfig, summary: Summary, world_size: int, accelerator: str | None) -> None:
    """Print one rank's profile beside the plan."""
    from rich.console import Console
    from rich.table import Table

    from megatron_zaya.plan.hardware import Network
    from megatron_zaya.plan.hardware import accelerator as known
    from megatron_zaya.plan.price import price_own_layout, wanted_of
    from megatron_zaya.telemetry.profile import beside_plan

    device = known(_accelerator_of(summary, accelerator))
    plan = price_own_layout(config, wanted_of(config, world_size, device), device, Network.of(device))
    same = device.name in summary.device
    console: Any = Console(width=110, highlight=False)
    note = "" if same else f"; the plan is for {device.name}, so compare shares"
    title = f"rank {summary.rank}, {summary.steps} steps, {summary.step_s * 1e3:.1f} ms each, on {summary.device}{note}"
    table = Table("part", "forward ms", "backward ms", "measured ms", "share", "planned ms", "share", title=title)
    for row in beside_plan(summary, plan.time.parts):
        passes = summary.parts.get(row.part, {})
        cells = [f"{passes[name] * 1e3:.2f}" if name in passes else "" for name in ("forward", "backward")]
        figures = [f"{row.measured_s * 1e3:.2f}", f"{row.measured_share:.1%}"]
        table.add_row(row.part, *cells, *figures, f"{row.planned_s * 1e3:.3f}", f"{row.planned_share:.1%}")
    console.print(table)
    travel = summary.overlap
    hidden = travel.hidden_s / travel.communication_s if travel.communication_s else 0.0
    console.print(
        f"communication {travel.communication_s * 1e3:.2f} ms a step, {hidden:.0%} of it hidden, "
        f"{travel.exposed_s * 1e3:.2f} ms exposed",
        soft_wrap=True,
    )
    sizes = ", ".join(f"{name} {size / GIB:.3f} GiB" for name, size in summary.memory_bytes.items())
    console.print(
        f"memory: {sizes}; planned peak on {device.name} {plan.memory.worst.peak / GIB:.3f} GiB", soft_wrap=True
    )
