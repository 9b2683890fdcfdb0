"""`zaya submit` and `zaya preflight`: a run file becomes a job, nodes are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path, typer.Argument(help="Run file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, applied in order, after the plan.")]


def submit(
    run_file: RunFile,
    overrides: Overrides = None,
    plan: Annotated[Path | None, typer.Option(help="Plan (YAML) laid over the run file.")] = None,
    site: Annotated[Path | None, typer.Option(help="Site file (YAML); see slurm/sites/.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes that train; default: the plan's.")] = None,
    spares: Annotated[int, typer.Option(min=0, help="Nodes more, to replace those that fail.")] = 0,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks per node; default: the site's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print everything, write and submit nothing.")] = False,
    local: Annotated[bool, typer.Option("--local", help="The same job on this machine, without Slurm.")] = False,
    in_allocation: Annotated[
        bool, typer.Option("--in-allocation", help="Start in the Slurm allocation that this shell is in.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Ranks only say who they are; nothing is trained.")
    ] = False,
    drill: Annotated[str, typer.Option(help="Fail on purpose, such as 'crash:rank=1,iteration=3'.")] = "",
) -> None:
    """Render a self-contained launch folder for a run, and submit it to Slurm."""
    from launch.submit import Request, prepare
    from launch.submit import submit as hand_to_slurm
    from launch.supervise.controller import supervise
    from launch.supervise.slurm import allocation

    allocated = allocation() if in_allocation else []
    request = Request(
        run_file,
        overrides or [],
        plan_file=plan,
        site_file=site,
        nodes=nodes,
        spares=spares,
        ranks_per_node=nproc,
        rehearse=rehearse,
        drill=drill,
        local=local,
        allocated=allocated,
    )
    submission = prepare(request)
    if dry_run:
        typer.echo(submission.show(), nl=False)
        return
    submission.write()
    typer.echo(f"zaya: launch folder {submission.folder}")
    if local or in_allocation:
        raise typer.Exit(supervise(submission.folder, local))
    typer.echo(f"zaya: submitted job {hand_to_slurm(submission)}; events in {submission.folder}/events.jsonl")


def preflight(
    site: Annotated[Path, typer.Option(help="Site file (YAML) with a preflight section.")],
    out: Annotated[Path, typer.Option(help="Folder of the verdicts.")] = Path("preflight"),
    tier: Annotated[int, typer.Option(min=1, max=2, help="1: each node alone; 2: measure, too.")] = 1,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks per node of tier 2; default: the site's.")] = None,
) -> None:
    """Check the nodes of this allocation, or this machine; exit status 1 when a node is not fit."""
    from launch.preflight.run import preflight as check
    from launch.site import load_site

    outcome = check(load_site(site), out, tier, nproc)
    for host in outcome.passed:
        typer.echo(f"pass {host}")
    for host, reasons in sorted(outcome.failed.items()):
        for reason in reasons:
            typer.echo(f"FAIL {host}: {reason}")
    if outcome.failed:
        typer.echo(f"zaya: leave them out with --exclude=$(cat {out / 'fail.txt'})")
    raise typer.Exit(1 if outcome.failed else 0)
