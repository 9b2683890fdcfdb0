"""`zaya convert`: weights from and for other programs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Weights from and for other programs.")

Output = Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads; default: one per CPU, at most 8.")]
FileSize = Annotated[float, typer.Option("--max-file-gb", min=0.001, help="Largest file to write, in GB.")]
Iteration = Annotated[int | None, typer.Option(min=0, help="Which step; default: the newest.")]
Rounding = Annotated[bool, typer.Option("--rounding", help="Allow types that lose bits, such as fp32 to bf16.")]
State = Annotated[
    bool, typer.Option("--state", help="Optimizer, balancing, random state and counters too: a run can go on from it.")
]
Carry = Annotated[
    Path | None, typer.Option(help="Folder with tokenizer and generation files; default: those that came in.")
]


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told of bytes written just now and in all; a bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda size, total: bar.update(task, advance=size, total=total)


def _workers(wanted: int | None) -> int:
    return wanted or min(os.cpu_count() or 1, 8)


@app.command("from-hf")
def from_hf(
    source: Annotated[Path, typer.Argument(help="Model folder: config.json and safetensors.")],
    run_file: Annotated[Path, typer.Argument(help="Run file (YAML) that shall load it.")],
    output: Output,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, applied in order.")] = None,
    workers: Workers = None,
    max_file_gb: FileSize = 4.0,
    rounding: Rounding = False,
) -> None:
    """Make a checkpoint of a model folder, in transformers' or in the original alternating layout."""
    from megatron_zaya.config import load_config
    from megatron_zaya.convert import commands

    config = load_config(run_file, overrides or ())
    with _progress("from-hf") as progress:
        options = commands.Options(_workers(workers), int(max_file_gb * 1e9), rounding, progress)
        written = commands.from_hf(source, config, output, options)
    print(f"{output}: {written / 1e9:.3f} GB; train with checkpoint.load={output} checkpoint.load_optimizer=false")


def _export(
    layout: str, source: Path, output: Path, iteration: int | None, workers: int | None, size: float, carry: Path | None
) -> None:
    from megatron_zaya.convert import commands

    with _progress(f"to {layout}") as progress:
        options = commands.Options(_workers(workers), int(size * 1e9), progress=progress)
        written = commands.to_hf(source, output, options, layout, iteration, carry)
    print(f"{output}: {written / 1e9:.3f} GB")


Source = Annotated[Path, typer.Argument(help="Run folder, its checkpoint folder, or one step; of any layout.")]


@app.command("to-hf")
def to_hf(
    source: Source,
    output: Output,
    iteration: Iteration = None,
    workers: Workers = None,
    max_file_gb: FileSize = 4.0,
    carry: Carry = None,
) -> None:
    """Make a model folder for transformers of a checkpoint."""
    _export("transformers", source, output, iteration, workers, max_file_gb, carry)


@app.command("to-original")
def to_original(
    source: Source,
    output: Output,
    iteration: Iteration = None,
    workers: Workers = None,
    max_file_gb: FileSize = 4.0,
    carry: Carry = None,
) -> None:
    """Make a model folder in the original alternating layout of a checkpoint."""
    _export("original", source, output, iteration, workers, max_file_gb, carry)


@app.command("from-torch-dist")
def from_torch_dist(
    source: Annotated[Path, typer.Argument(help="Folder of one iteration that Megatron-Core wrote, in any layout.")],
    run_file: Annotated[Path, typer.Argument(help="Run file (YAML) that shall load it.")],
    output: Output,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, applied in order.")] = None,
    workers: Workers = None,
    max_file_gb: FileSize = 4.0,
    rounding: Rounding = False,
    state: State = False,
) -> None:
    """Make a checkpoint of a Megatron torch_dist checkpoint of this model."""
    from megatron_zaya.config import load_config
    from megatron_zaya.convert import commands

    config = load_config(run_file, overrides or ())
    with _progress("from-torch-dist") as progress:
        options = commands.Options(_workers(workers), int(max_file_gb * 1e9), rounding, progress)
        written = commands.from_torch_dist(source, config, output, options, state)
    weights_only = "" if state else " checkpoint.load_optimizer=false"
    print(f"{output}: {written / 1e9:.3f} GB; train with checkpoint.load={output}{weights_only}")


@app.command("to-torch-dist")
def to_torch_dist(source: Source, output: Output, iteration: Iteration = None, state: State = False) -> None:
    """Make a Megatron torch_dist checkpoint of a checkpoint."""
    from megatron_zaya.convert import commands

    with _progress("to-torch-dist") as progress:
        written = commands.to_torch_dist(source, output, commands.Options(1, progress=progress), iteration, state)
    print(f"{output}: {written / 1e9:.3f} GB")


@app.command("verify")
def verify(
    a: Annotated[Path, typer.Argument(help="Checkpoint (ours or torch_dist), or model folder.")],
    b: Annotated[Path, typer.Argument(help="The other; the layouts may differ.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest |a - b| of a tensor, relative to its largest |a|; 0: equal bits.")
    ] = 0.0,
    any_dtype: Annotated[bool, typer.Option("--any-dtype", help="Compare values of different types.")] = False,
    logits: Annotated[
        bool, typer.Option(help="Compare logits too, where transformers is installed; needs both models in memory.")
    ] = True,
    report: Annotated[Path | None, typer.Option(help="Report file (JSON) to write.")] = None,
) -> None:
    """Compare two sets of weights; exit status 1 if anything differs."""
    from megatron_zaya.convert.folders import write_json
    from megatron_zaya.convert.verify import verify as compare

    with _progress("verify") as progress:
        outcome = compare(a, b, tolerance, any_dtype, logits, progress)
    if report is not None:
        write_json(report, outcome.as_json())
    print(outcome.summary())
    raise typer.Exit(0 if outcome.equal else 1)
