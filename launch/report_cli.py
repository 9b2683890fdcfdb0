"""`zaya report` and `zaya top`: look at runs, afterwards and while they train. No torch, no job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; default: RUN/report, or report for several.")
    ] = None,
    accelerator: Annotated[str, typer.Option(help="What the plan is predicted for: MI300X, H100, ...")] = "MI300X",
) -> None:
    """Write a page about one run or several: a self-contained index.html, and its charts as PNG files."""
    from megatron_zaya.report.page import write_report

    page = write_report(runs, out or (runs[0] / "report" if len(runs) == 1 else Path("report")), accelerator)
    typer.echo(f"zaya: wrote {page} and {len(list(page.parent.glob('*.png')))} pictures beside it")


def top(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
) -> None:
    """Follow a run in the terminal: progress, loss, speed, experts, memory, checkpoints, incidents. Ctrl-C ends it."""
    from megatron_zaya.report.top import follow

    follow(run, interval, once)
