"""The `zaya` command line. Every command checks its input first and answers a mistake with one message.

Exit status: 0 done, 2 the input cannot work, anything else is that of the job. Torch is imported by no command before
its input has been checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ckpt.errors import CheckpointError
from launch import ckpt_cli, convert_cli, job_cli, profile_cli, report_cli, telemetry_cli
from launch.errors import LaunchError
from launch.plan_cli import app as plan_app
from megatron_zaya.config import ConfigError, dump_config, json_schema, load_config
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.data.errors import DataError
from megatron_zaya.report.errors import ReportError
from topology.cli import app as topology_app
from topology.errors import TopologyError

USER_ERRORS = (ConfigError, ConvertError, DataError, CheckpointError, LaunchError, ReportError, TopologyError)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
config_app = typer.Typer(no_args_is_help=True, help="Run files: schema, resolved values.")
data_app = typer.Typer(no_args_is_help=True, help="Tokenised text.")
optimizer_app = typer.Typer(no_args_is_help=True, help="What trains which parameter.")
app.command()(job_cli.submit)
app.command()(job_cli.preflight)
app.command()(report_cli.report)
app.command()(report_cli.top)
app.command()(profile_cli.profile)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(convert_cli.app, name="convert")
app.add_typer(optimizer_app, name="optimizer")
app.add_typer(topology_app, name="topology")
app.add_typer(plan_app, name="plan")
app.add_typer(ckpt_cli.app, name="ckpt")
app.add_typer(telemetry_cli.app, name="telemetry")

RunFile = Annotated[Path, typer.Argument(help="Run file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, applied in order.")]


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Ranks on this machine, one per accelerator.")] = 1,
) -> None:
    """Train on this machine: check the run, then start its ranks with torchrun."""
    from launch.local import run_ranks
    from megatron_zaya.preconditions import check_run

    check_run(load_config(run_file, overrides or ()), nproc)
    raise typer.Exit(run_ranks(run_file, overrides or [], nproc))


@app.command()
def doctor() -> None:
    """Say what this machine and environment can do, and what follows from it."""
    from rich.console import Console
    from rich.table import Table

    from megatron_zaya.compat.capabilities import detect

    table = Table("what", "", "found", "consequence")
    for row in detect():
        table.add_row(row.name, "yes" if row.available else "no", row.detail, row.consequence)
    Console().print(table)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a run file."""
    print(json.dumps(json_schema(), indent=2))


@config_app.command("show")
def config_show(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print the resolved run file: every default and override filled in."""
    print(dump_config(load_config(run_file, overrides or ())), end="")


@optimizer_app.command("table")
def optimizer_table(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print each parameter of the run's model: its shape, its optimizer, and why. Builds no weights."""
    config = load_config(run_file, overrides or ())
    from megatron_zaya.compat import quiet_megatron

    quiet_megatron()
    from megatron_zaya.optim import table

    print(table.text(table.optimizer_table(config)), end="")


@app.command()
def phases(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print the phases of a run: length, sequence, positions, learning rate, batch, layout, data."""
    from rich.console import Console
    from rich.table import Table

    from megatron_zaya.config.phases import phase_configs

    config = load_config(run_file, overrides or ())
    table = Table("phase", "tokens", "iterations", "sequence", "RoPE base", "lr", "batch", "layout", "data")
    for phase in phase_configs(config):
        s, o, p = phase.schedule, phase.optimizer, phase.parallel
        sizes = {"TP": p.tensor_model_parallel_size, "PP": p.pipeline_model_parallel_size}
        sizes |= {"CP": p.context_parallel_size, "EP": p.expert_model_parallel_size}
        ramp = f" from {s.rampup_batch_size[0]}" if s.rampup_batch_size else ""
        table.add_row(
            phase.run_dir.name,
            f"{s.train_samples * phase.data.seq_length / 1e9:,.1f}B",
            f"{s.train_iters:,}",
            f"{phase.data.seq_length:,}",
            f"{phase.model.rotary_base:,.0f}",
            f"{o.lr:g} to {o.min_lr:g}, {s.lr_decay_style}",
            f"{s.global_batch_size:,}{ramp}",
            " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "DP only",
            " ".join(phase.data.data_path),
        )
    Console(width=160).print(table)


@data_app.command("prepare")
def data_prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Text files, folders, .jsonl or .jsonl.gz; python-stdlib is Python's own source."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Prefix of the .bin/.idx pair to write.")],
    tokenizer: Annotated[str, typer.Option(help='"byte", or a folder with a tokenizer.json.')] = "byte",
    suffix: Annotated[list[str] | None, typer.Option(help="Take only files that end so; may be repeated.")] = None,
    json_key: Annotated[str, typer.Option(help="Field of a .jsonl line that holds the text.")] = "text",
    workers: Annotated[int | None, typer.Option(min=1, help="Encoding processes; default: one per CPU.")] = None,
    limit_documents: Annotated[int | None, typer.Option(min=1, help="Stop after this many documents.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing pair.")] = False,
) -> None:
    """Turn text into Megatron's .bin/.idx format, one document per file or line."""
    from megatron_zaya.data.prepare import prepare

    report = prepare(
        inputs,
        output,
        tokenizer,
        suffixes=suffix or (),
        json_key=json_key,
        workers=workers,
        limit_documents=limit_documents,
        overwrite=overwrite,
    )
    print(report.summary())


@data_app.command("pack")
def data_pack(
    prefix: Annotated[Path, typer.Argument(help="Prefix of a .bin/.idx pair of documents.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Prefix of the .bin/.idx pair to write.")],
    seq_length: Annotated[int, typer.Option(min=2, help="Tokens of a window: data.seq_length of the run.")],
    tokenizer: Annotated[str, typer.Option(help='"byte", or a folder with a tokenizer.json.')] = "byte",
    reasoning_begin: Annotated[str, typer.Option(help="Text before the reasoning, for example <think>.")] = "",
    reasoning_end: Annotated[str, typer.Option(help="Text after the reasoning, for example </think>.")] = "",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing pair.")] = False,
) -> None:
    """Pack whole documents into windows (best fit); trim the reasoning of those that are too long, keep the answer."""
    from megatron_zaya.data.packing import pack

    report = pack(
        prefix,
        output,
        seq_length,
        tokenizer,
        reasoning_begin=reasoning_begin,
        reasoning_end=reasoning_end,
        overwrite=overwrite,
    )
    print(report.summary())


def main() -> None:
    """Run the command line; a user's mistake becomes one message and exit status 2."""
    try:
        app()
    except USER_ERRORS as error:
        typer.echo(f"zaya: {error}", err=True)
        raise SystemExit(2) from None
