"""`zaya topology ...`: show, verify, cost, place, emit, whatif, lint, fit.

A user error ends with one line on stderr and exit status 2; an illegal plan or an error found by `lint`
with 1. Invariant: commands only parse options and print; what they print is computed elsewhere in this
package. Imports of the planners stay inside the commands, so `--help` is quick.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from topology.errors import TopologyError

if TYPE_CHECKING:
    from topology.cost import CostModel, GroupShape
    from topology.fabric import Fabric
    from topology.place import Placement
    from topology.plan import Plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Model a rails-only fabric: prove that a job cannot hang on it, price it, place it.",
)
P = ParamSpec("P")
Cluster = Annotated[Path, typer.Argument(help="cluster YAML, or a folder of discovery dumps")]
PlanFile = Annotated[Path, typer.Argument(help="plan YAML, or a run YAML with a `parallel:` section")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Fail = Annotated[
    list[str] | None,
    typer.Option("--fail", help="take out node=NAME, nic=NAME:INDEX, leaf=NAME or spine=NAME; repeatable"),
]


def user_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn a TopologyError into one line on stderr and exit status 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except TopologyError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None

    return wrapped


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.width = max(console.width, 130)  # tables stay whole in logs and pipes
    return console


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1))


def _fabric(path: Path, fail: list[str] | None = None) -> Fabric:
    """Load a cluster file or discover from a folder, then apply `--fail`."""
    from topology.whatif import damage, parse_failure

    if path.is_dir():
        from topology.discover import discover

        fabric = discover(path)
    else:
        from topology.build import load_fabric

        fabric = load_fabric(path)
    return damage(fabric, tuple(parse_failure(text) for text in fail or []))


def _plan(path: Path, fabric: Fabric) -> Plan:
    from topology.plan import load_plan

    return load_plan(path, fabric.world_size)


def parse_size(text: str) -> int:
    """Bytes from 4096, 64K, 8M or 1G (powers of two). Raises TopologyError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", text.strip(), re.I)
    if not match or float(match[1]) == 0:
        raise TopologyError("not a size", where="--bytes", value=text, remedy="write 4096, 64K, 8M or 1G")
    return int(float(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2].upper()])


@app.command()
@user_errors
def show(
    cluster: Cluster,
    switches: Annotated[bool, typer.Option("--switches", help="list every switch")] = False,
    fail: Fail = None,
    as_json: AsJson = False,
) -> None:
    """Describe a cluster: size, rails, rates, health, cabling."""
    from topology.cabling import check_cabling

    fabric = _fabric(cluster, fail)
    findings = check_cabling(fabric)
    if as_json:
        from topology.records import fabric_record

        _print_json(fabric_record(fabric, findings))
        return
    from topology.report import show_fabric

    show_fabric(_console(), fabric, findings, switches)


@app.command()
@user_errors
def verify(
    cluster: Cluster,
    plan: PlanFile,
    pxn: Annotated[bool | None, typer.Option("--pxn/--no-pxn", help="relay on or off; default: the cluster's")] = None,
    fail: Fail = None,
    as_json: AsJson = False,
) -> None:
    """Prove for every communicator of the plan that its ranks can talk. Exit status 1 when one cannot."""
    from topology.legality import nearest_legal_plan
    from topology.legality import verify as prove
    from topology.plan import require_world

    fabric = _fabric(cluster, fail)
    layout = _plan(plan, fabric)
    usable = fabric.usable_nodes
    require_world(layout, len(usable) * fabric.gpus_per_node)
    relay = fabric.spec.software.pxn if pxn is None else pxn
    verdicts = prove(fabric, layout, usable, relay)
    legal = all(v.legal for v in verdicts)
    better = None
    if not legal and any(v.status == 3 for v in verdicts) and layout.world_size <= 8192:
        better = nearest_legal_plan(fabric, layout, usable, relay)
    if as_json:
        from topology.records import verdict_record

        _print_json(verdict_record(layout, verdicts, better))
    else:
        from topology.report import show_verdicts

        console = _console()
        console.print(layout.describe())
        show_verdicts(console, verdicts)
        if better:
            console.print(f"nearest legal layout: {better.describe()}")
        console.print("legal: every pair of every communicator can talk" if legal else "ILLEGAL plan")
    raise typer.Exit(0 if legal else 1)


@app.command()
@user_errors
def cost(
    cluster: Cluster,
    plan: Annotated[Path | None, typer.Argument(help="price the step of this plan instead of one operation")] = None,
    op: Annotated[str, typer.Option(help="operation, or `all`")] = "all_reduce",
    nodes: Annotated[int, typer.Option(min=1, help="nodes in the group")] = 2,
    per_node: Annotated[int | None, typer.Option(min=1, help="ranks per node; default: all GPUs")] = None,
    sizes: Annotated[str, typer.Option("--bytes", help="sizes such as 1M,64M,1G")] = "1M,16M,64M,256M,1G,8G",
    topk: Annotated[int, typer.Option(min=1, help="experts per token (dispatch)")] = 8,
    node_limit: Annotated[int, typer.Option(min=0, help="most nodes per token (dispatch); 0: no limit")] = 4,
    skew: Annotated[float, typer.Option(min=1.0, help="busiest over mean load")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Predict the time of collectives, or of the communication of one step of a plan.

    For `dispatch` a size is the bytes of one rank's tokens, each counted once; the rate is the logical one
    (each token once per node it visits).
    """
    from topology.cost import OPS, CostModel, GroupShape, Routing

    fabric = _fabric(cluster)
    if plan is not None:
        _cost_of_plan(fabric, _plan(plan, fabric), as_json)
        return
    if op not in (*OPS, "all"):
        raise TopologyError("unknown operation", where="--op", value=op, remedy=f"use one of {', '.join(OPS)}")
    width = per_node or fabric.gpus_per_node
    if width > fabric.gpus_per_node or nodes * width < 2:
        raise TopologyError("no such group", value=f"{nodes} x {width}", remedy="at least 2 ranks, at most all GPUs")
    leaves = -(-nodes // fabric.spec.rails.nodes_per_leaf)
    shape = GroupShape(nodes, width, leaves if leaves > 1 else 0)
    routing = Routing(topk, node_limit or None, skew)
    model = CostModel.for_fabric(fabric)
    wanted = [parse_size(text) for text in sizes.split(",")]
    tables = {name: _cost_rows(model, name, shape, wanted, routing) for name in (OPS if op == "all" else (op,))}
    if as_json:
        _print_json({"nodes": nodes, "per_node": width, "operations": tables})
        return
    from topology.report import describe_shape, show_costs

    for name, rows in tables.items():
        show_costs(_console(), describe_shape(name, shape), rows)


def _cost_rows(model: CostModel, op: str, shape: GroupShape, sizes: list[int], routing: Any) -> list[dict[str, float]]:
    from topology.cost import bus_factor

    rows = []
    fast, slow = model.extremes()
    for size in sizes:
        seconds, low, high = (m.time(op, size, shape, routing) for m in (model, fast, slow))
        moved = size * bus_factor(op, shape.ranks)
        if op == "dispatch":
            moved = model.dispatch_logical_bytes(size, shape.nodes, routing)
        row = {"size_bytes": size, "time_us": seconds * 1e6, "low_us": low * 1e6, "high_us": high * 1e6}
        rows.append({**row, "bus_gb_per_s": moved / seconds / 1e9})
    return rows


def _cost_of_plan(fabric: Fabric, plan: Plan, as_json: bool) -> None:
    from topology.place import place as choose

    placement = choose(fabric, plan)
    if as_json:
        from topology.emit.bundle import as_record

        record = as_record(placement)
        _print_json({k: record[k] for k in ("predicted_communication_s", "bound_s", "flows")})
        return
    from topology.report import show_placement

    show_placement(_console(), placement)


def _placement(
    cluster: Path, plan: Path, fail: list[str] | None, shrink: bool, avoid: list[str] | None = None
) -> Placement:
    from topology.place import place as choose

    fabric = _fabric(cluster, fail)
    return choose(fabric, _plan(plan, fabric), shrink=shrink, avoid=tuple(avoid or ()))


Shrink = Annotated[bool, typer.Option("--shrink", help="lower the data parallel size when nodes are missing")]
Avoid = Annotated[list[str] | None, typer.Option("--avoid", help="healthy node to leave out; repeatable")]


@app.command()
@user_errors
def place(
    cluster: Cluster,
    plan: PlanFile,
    fail: Fail = None,
    shrink: Shrink = False,
    avoid: Avoid = None,
    as_json: AsJson = False,
) -> None:
    """Choose nodes and rank order for a plan; prints the bound beside the result."""
    placement = _placement(cluster, plan, fail, shrink, avoid)
    if as_json:
        from topology.emit.bundle import as_record

        _print_json(as_record(placement))
        return
    from topology.report import show_placement

    show_placement(_console(), placement)


@app.command()
@user_errors
def emit(
    cluster: Cluster,
    plan: PlanFile,
    out: Annotated[Path | None, typer.Option("--out", help="folder for all outputs")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="print this one output instead")] = None,
    fail: Fail = None,
    shrink: Shrink = False,
    avoid: Avoid = None,
) -> None:
    """Write Slurm topology, host files, environment, expected bandwidth and pictures of one placement."""
    from topology.emit.bundle import FORMATS, render, write_all

    if (out is None) == (kind is None):
        raise TopologyError("give either --out FOLDER or --kind NAME", remedy=f"kinds are {', '.join(FORMATS)}")
    placement = _placement(cluster, plan, fail, shrink, avoid)
    if kind is not None:
        typer.echo(render(placement, kind), nl=False)
    if out is not None:
        written, skipped = write_all(placement, out)
        for path in written:
            typer.echo(str(path))
        for reason in skipped:
            typer.echo(f"left out {reason}", err=True)


@app.command()
@user_errors
def whatif(
    cluster: Cluster,
    plan: PlanFile,
    fail: Fail = None,
    as_json: AsJson = False,
) -> None:
    """Say what still works after failures; without --fail, after one failure of each class."""
    from topology.place import place as choose
    from topology.whatif import parse_failure, single_failures, what_if

    fabric = _fabric(cluster)
    layout = _plan(plan, fabric)
    before = choose(fabric, layout)
    cases = [tuple(parse_failure(text) for text in fail)] if fail else single_failures(fabric)
    outcomes = [what_if(fabric, layout, case, before) for case in cases]
    if as_json:
        from topology.records import outcome_record

        _print_json([outcome_record(outcome) for outcome in outcomes])
    else:
        from topology.report import show_outcomes

        show_outcomes(_console(), outcomes)
    raise typer.Exit(0 if all(o.placement for o in outcomes) else 1)


@app.command()
@user_errors
def lint(
    logs: Annotated[list[Path], typer.Argument(help="output of a job run with NCCL_DEBUG=INFO")],
    cluster: Annotated[Path | None, typer.Option("--cluster", help="the cluster it ran on")] = None,
    as_json: AsJson = False,
) -> None:
    """Find cross-rail edges, relays, missing NICs, odd channels and version traps in NCCL/RCCL logs."""
    from topology.lint import lint as check
    from topology.lint import read_logs
    from topology.lint.rules import Expected

    expected = Expected()
    if cluster is not None:
        fabric = _fabric(cluster)
        expected = Expected(fabric.gpus_per_node, fabric.nics_per_node, not fabric.rails_meet)
    issues = check(read_logs(logs), expected)
    if as_json:
        from dataclasses import asdict

        _print_json([asdict(issue) for issue in issues])
    else:
        from topology.report import show_issues

        show_issues(_console(), issues)
    raise typer.Exit(1 if any(issue.severity == "error" for issue in issues) else 0)


@app.command()
@user_errors
def fit(
    cluster: Cluster,
    calibration: Annotated[Path | None, typer.Option(help="measured curves; default: the published ones")] = None,
    write: Annotated[bool, typer.Option("--write", help="store the result in the package's parameter file")] = False,
    as_json: AsJson = False,
) -> None:
    """Fit the cost model to calibration data; prints parameters and the error of every point."""
    from topology.cost import CostModel
    from topology.fit import evaluate, load_calibration, write_fitted
    from topology.fit import fit as solve
    from topology.parameters import CALIBRATION

    curves = load_calibration(calibration or CALIBRATION)
    model = solve(CostModel.for_fabric(_fabric(cluster)), curves)
    points = evaluate(model, curves)
    fitted = model.parameters.fitted.model_dump()
    if write:
        write_fitted(model.parameters)
    if as_json:
        from topology.records import fit_record

        _print_json(fit_record(fitted, points))
        return
    from topology.report import show_fit

    show_fit(_console(), fitted, points)
