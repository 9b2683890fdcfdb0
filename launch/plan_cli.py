"""`zaya plan`: will it fit, how fast will it be, which layout is best, and is that so? Torch only in `dryrun`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from megatron_zaya.config import ConfigError, RunConfig, load_config

if TYPE_CHECKING:
    from megatron_zaya.plan.hardware import Accelerator, Network
    from megatron_zaya.plan.memory import Allowances
    from megatron_zaya.plan.search import Candidate, Wanted
    from megatron_zaya.plan.validate import Comparison

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Memory, time, layouts."
)
RunFile = Annotated[Path, typer.Argument(help="Run file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, applied in order.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Whole nodes of the job.")]
World = Annotated[int | None, typer.Option("--world-size", min=1, help="Ranks of the job, instead of --nodes.")]
AcceleratorName = Annotated[str, typer.Option("--accelerator", help="MI300X, MI355X, A100, H100, ...")]
Cluster = Annotated[Path | None, typer.Option(help="Cluster file whose fabric prices collectives.")]
Skew = Annotated[float, typer.Option(min=1.0, help="Load of the busiest expert rank over the mean.")]
NicsDown = Annotated[int, typer.Option(min=0, max=7, help="NICs of a node that are down.")]
MemoryGib = Annotated[float | None, typer.Option(help="Memory of an accelerator, GiB; default: its own.")]
Allowance = Annotated[
    list[str] | None, typer.Option(help="What no shape shows: driver=1.5, collectives=2, workspace=0.25 (GiB).")
]
Probability = Annotated[float, typer.Option(help="Least probability that counts as a fit.")]


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=190)


@dataclass
class Question:
    """What is asked of plans: the run, the machine, the margins. The fields are options of `search` and of `check`."""

    run_file: RunFile
    overrides: Overrides = None
    nodes: Nodes = None
    world_size: World = None
    accelerator: AcceleratorName = "MI300X"
    cluster: Cluster = None
    skew: Skew = 1.0
    nics_down: NicsDown = 0
    memory_gib: MemoryGib = None
    allowance: Allowance = None
    probability: Probability = 0.95
    as_json: AsJson = False

    def machine(self) -> tuple[Accelerator, Network]:
        """Return the accelerator and the network between them."""
        from megatron_zaya.plan.hardware import Network, accelerator

        device, fabric = accelerator(self.accelerator), None
        if self.memory_gib is not None:
            device = replace(device, memory_bytes=int(self.memory_gib * 2**30))
        if self.cluster is not None:
            from topology.build import load_fabric
            from topology.errors import TopologyError

            try:
                fabric = load_fabric(self.cluster)
            except TopologyError as error:
                raise ConfigError(str(error)) from None
        return device, Network.of(device, fabric, self.nics_down)

    def config(self) -> RunConfig:
        """Return the run."""
        return load_config(self.run_file, self.overrides or ())

    def wanted(self, device: Accelerator) -> Wanted:
        """Return what is planned for."""
        from megatron_zaya.plan.price import wanted_of

        if (self.nodes is None) == (self.world_size is None):
            raise ConfigError("say how large the job is: --nodes, or --world-size")
        world_size = self.world_size if self.world_size is not None else (self.nodes or 1) * device.per_node
        config = self.config()
        wanted = wanted_of(config, world_size, device, self.skew, self.probability)
        return replace(wanted, allowances=_with_allowances(wanted.allowances, self.allowance))


def _answers(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Question` in place of its first parameter."""
    hints = get_type_hints(Question, include_extras=True)
    shared = [field.replace(annotation=hints[name]) for name, field in signature(Question).parameters.items()]
    own = list(signature(command, eval_str=True).parameters.values())[1:]

    @wraps(command)
    def run(**options: Any) -> None:
        question = Question(**{option.name: options.pop(option.name) for option in shared})
        command(question, **options)

    run.__signature__ = Signature([*shared, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in (*shared, *own)}
    return run


def _with_allowances(allowances: Allowances, given: list[str] | None) -> Allowances:
    known = {"driver": "driver_bytes", "collectives": "collectives_bytes", "workspace": "workspace_bytes"}
    changes = {}
    for text in given or ():
        name, _, value = text.partition("=")
        try:
            changes[known[name]] = float(value) * 2**30
        except (KeyError, ValueError):
            raise ConfigError(f"--allowance {text!r}: write NAME=GiB with one of {', '.join(known)}") from None
    return replace(allowances, **changes)


@app.command("search")
@_answers
def plan_search(
    question: Question,
    choose: Annotated[int, typer.Option(min=1, help="Which plan of the ranking to explain and write.")] = 1,
    explain: Annotated[bool, typer.Option("--explain", help="Memory and time of the chosen plan in detail.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the chosen plan: a .png or .html file.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the chosen plan here (YAML).")] = None,
) -> None:
    """Search every legal layout for a run's model, sequence length and global batch."""
    from megatron_zaya.plan import report
    from megatron_zaya.plan.search import price_all_ranks, search

    device, network = question.machine()
    wanted = question.wanted(device)
    found = search(wanted, device, network)
    if not found.best:
        reasons = "".join(f"\n  {count:,} rejected: {reason}" for reason, count in found.rejected.most_common())
        raise ConfigError(f"no plan of {found.considered:,} fits {wanted.world_size} x {device.name}:{reasons}")
    chosen = price_all_ranks(found.best[min(choose, len(found.best)) - 1], wanted)
    if question.as_json:
        typer.echo(json.dumps({**report.found_record(found), "chosen": report.candidate_record(chosen)}, indent=1))
    else:
        console = _console()
        report.show_found(console, found)
        if explain:
            report.show_memory(console, chosen.memory, device.memory_bytes)
            report.show_time(console, chosen.time)
    if picture is not None:
        _draw(found, chosen, wanted, device, network, picture)
    if out is not None:
        size = f"{wanted.world_size} x {device.name}, sequences of {wanted.seq_length}"
        comments = [f"plan of `zaya plan search` for {question.run_file.name} on {size}"]
        out.write_text(report.plan_file(chosen, comments, device.per_node), encoding="utf-8")


def _draw(found: Any, chosen: Candidate, wanted: Wanted, device: Accelerator, network: Network, path: Path) -> None:
    from megatron_zaya.plan.layer_time import stage_times
    from megatron_zaya.plan.pictures import draw
    from megatron_zaya.plan.pipeline_time import timeline
    from megatron_zaya.plan.step_time import hop_time_s

    layout, batch = chosen.layout, chosen.batch
    times = stage_times(wanted.model, layout, batch, device, network, wanted.options, wanted.assume)
    hop = hop_time_s(wanted.model, layout, batch, network, wanted.precision)
    shown = min(batch.microbatches(layout), 3 * layout.pp)
    draw(found, chosen, timeline(layout, shown, times, hop), device.memory_bytes, path)


@app.command("check")
@_answers
def plan_check(question: Question) -> None:
    """Say whether a run file's own layout fits, with the margin. Exit status 1 when it does not."""
    from megatron_zaya.plan import report
    from megatron_zaya.plan.price import price_own_layout

    device, network = question.machine()
    plan = price_own_layout(question.config(), question.wanted(device), device, network)
    fits = plan.fit_probability >= question.probability
    margin = device.memory_bytes - plan.memory_bytes
    if question.as_json:
        record = {"fits": fits, "margin_bytes": margin, "capacity_bytes": device.memory_bytes}
        typer.echo(json.dumps({**record, **report.candidate_record(plan)}, indent=1))
    else:
        console = _console()
        report.show_memory(console, plan.memory, device.memory_bytes)
        report.show_time(console, plan.time)
        verdict = "fits" if fits else "does NOT fit"
        console.print(
            f"{plan.layout.describe()} {verdict} on {device.name}: margin {margin / 2**30:.1f} of "
            f"{device.memory_bytes / 2**30:.1f} GiB, probability {plan.fit_probability:.3f}"
        )
    raise typer.Exit(0 if fits else 1)


@app.command("dryrun")
def plan_dryrun(
    run_file: RunFile,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Ranks of the job.")] = 1,
    rank: Annotated[list[int] | None, typer.Option(help="Ranks to run; default: one of each pipeline stage.")] = None,
    skew: Skew = 1.0,
    as_json: AsJson = False,
) -> None:
    """Run the real model and training step of chosen ranks at the level of shapes, without memory or other ranks."""
    config = load_config(run_file, overrides or ())
    from megatron_zaya.plan.layout import check_layout

    check_layout(config, world_size)
    from megatron_zaya.compat import quiet_megatron

    quiet_megatron()
    from megatron_zaya.plan.dryrun.run import dry_run

    per_stage = world_size // config.parallel.pipeline_model_parallel_size
    ranks = rank or list(range(0, world_size, per_stage))
    records = []
    for number in ranks:
        run = dry_run(config, world_size, number, skew=skew)
        records.append({**run.as_record(), "model": _modelled(config, world_size, skew, number // per_stage)})
        if not as_json:
            _show_dry_run(records[-1])
    if as_json:
        typer.echo(json.dumps(records, indent=1))


def _modelled(config: RunConfig, world_size: int, skew: float, pp_rank: int) -> dict[str, float]:
    """Return what the memory model says of the same rank."""
    from megatron_zaya.plan.memory import stage_memory
    from megatron_zaya.plan.price import options_of
    from megatron_zaya.plan.shape import batch_of, layout_of, model_of, precision_of

    layout, batch = layout_of(config, world_size), batch_of(config)
    options, precision = options_of(config, skew), precision_of(config)
    stage = stage_memory(model_of(config), layout, batch, pp_rank, precision=precision, options=options)
    return {"construction": stage.construction_peak, "step": stage.step_peak, "optimizer_step": stage.optimizer_peak}


def _show_dry_run(record: dict[str, Any]) -> None:
    from rich.table import Table

    console = _console()
    table = Table("peak", "GiB", "memory model", "by category, GiB", "moment", title=f"rank {record['rank']}")
    for name in ("construction", "step", "optimizer_step"):
        peak, modelled = record[name], record["model"][name]
        parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in peak["by_category"].items())
        error = f"{modelled / 2**30:.3f} ({modelled / peak['total_bytes'] - 1:+.2%})"
        table.add_row(name.replace("_", " "), f"{peak['total_bytes'] / 2**30:.3f}", error, parts, peak["moment"])
    console.print(table)
    calls = Table("collective", "bytes", "calls", "ranks", title="collectives of a step")
    for call in record["collectives"]:
        ranks = call["ranks"]
        shown = ", ".join(map(str, ranks[:4])) + (f", ... ({len(ranks)})" if len(ranks) > 4 else "")
        calls.add_row(call["op"], f"{call['size_bytes']:,}", str(call["calls"]), shown)
    console.print(calls)
    flops = sum(record["flops"].values())
    console.print(
        f"{record['parameters']:,} parameters, {flops:.4g} matrix operations a step; the dry run took "
        f"{record['wall_s']:.1f} s and {record['process_peak_bytes'] / 2**30:.2f} GiB"
    )


@app.command("validate")
def plan_validate(
    points: Annotated[
        Path | None, typer.Option(help="Published points (YAML); default: those of calibration, and those held out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold memory and time against published measurements: every error with its sign."""
    from megatron_zaya.plan.validate import FITTED, HELD_OUT, POINTS, compare, summary

    seen, held_out = compare(points or POINTS), [] if points else compare(HELD_OUT)
    if as_json:
        record, others = (
            {"points": [c.as_record() for c in part], "summary": summary(part)} for part in (seen, held_out)
        )
        typer.echo(json.dumps({**record, "held_out": others, "fitted_parameters": FITTED}, indent=1))
        return
    _show_comparisons(seen, "published points")
    if held_out:
        _show_comparisons(held_out, "published points that no parameter has seen")
    _console().print(f"{len(FITTED)} parameters were fitted: {'; '.join(FITTED)}")


def _show_comparisons(comparisons: list[Comparison], title: str) -> None:
    """Print every error with its sign, and their size."""
    from rich.table import Table

    from megatron_zaya.plan.validate import summary

    table = Table("point", "quantity", "measured", "predicted", "error", "source", title=title)
    for c in comparisons:
        table.add_row(c.point, c.quantity, f"{c.measured:,.2f}", f"{c.predicted:,.2f}", f"{c.error:+.1%}", c.source)
    console = _console()
    console.print(table)
    for name, value in summary(comparisons).items():
        console.print(f"{name.replace('_', ' ')}: {value:.1%}")
