"""`zaya ckpt ...`: ls, info, verify, diff, prune, reshard, bench. No job and, but for bench, no torch is needed."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ckpt.errors import CheckpointError
from ckpt.steps import PARTIAL, check_step, find_step, step_folders

app = typer.Typer(no_args_is_help=True, help="Checkpoints: list, look into, verify, compare, prune, rewrite, measure.")

Where = Annotated[Path, typer.Argument(help="Run folder, its checkpoint folder, or one step.")]
Iteration = Annotated[int | None, typer.Option("--iteration", help="Step; default: the newest.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _folder(path: Path, iteration: int | None) -> Path:
    root, found = find_step(path, iteration)
    return step_folders(root)[found]


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _layout(layout: dict[str, Any], ranks: int) -> str:
    short = {"tensor": "tp", "pipeline": "pp", "context": "cp", "expert": "ep", "data": "dp"}
    names = {f"{long}_model_parallel_size": name for long, name in short.items()}
    names |= {"context_parallel_size": "cp", "data_parallel_size": "dp"}
    sizes = [f"{name}{layout[key]}" for key, name in names.items() if layout.get(key, 1) not in (1, None)]
    return f"{ranks} ranks" + (f", {' '.join(sizes)}" if sizes else "")


def _summary(folder: Path, iteration: int) -> dict[str, Any]:
    try:
        manifest = check_step(folder)
    except CheckpointError as error:
        return {"iteration": iteration, "folder": str(folder), "valid": False, "reason": str(error)}
    return {
        "iteration": iteration,
        "folder": str(folder),
        "valid": True,
        "bytes": manifest.size,
        "tensors": len(manifest.tensors),
        "age_s": time.time() - manifest.created,
        "score": manifest.score,
        "ranks": manifest.world_size,
        "layout": manifest.layout,
    }


@app.command("ls")
def ls(path: Where, as_json: AsJson = False) -> None:
    """List the steps: size, age, layout, and whether manifest and file sizes are right (`verify` reads everything)."""
    root, _ = find_step(path)
    steps = [_summary(folder, iteration) for iteration, folder in step_folders(root).items()]
    leftovers = sorted(entry.name for entry in root.iterdir() if entry.name.endswith(PARTIAL))
    if as_json:
        print(json.dumps({"root": str(root), "steps": steps, "leftovers": leftovers}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("iteration", "size", "age", "saved by", "tensors", "valid", title=str(root), title_justify="left")
    for step in steps:
        if step["valid"]:
            cells = _size(step["bytes"]), _age(step["age_s"]), _layout(step["layout"], step["ranks"])
            table.add_row(str(step["iteration"]), *cells, str(step["tensors"]), "yes")
        else:
            table.add_row(str(step["iteration"]), "", "", "", "", f"NO: {step['reason']}")
    Console().print(table)
    for name in leftovers:
        print(f"{name}: a save that is under way or was killed; the next save removes it")


@app.command("info")
def info(
    path: Where,
    iteration: Iteration = None,
    tensors: Annotated[str | None, typer.Option(help="List the tensors that match this pattern (*, ?).")] = None,
    as_json: AsJson = False,
) -> None:
    """Show one step: who wrote it, its files, what was saved beside tensors; with --tensors also those."""
    folder = _folder(path, iteration)
    manifest = check_step(folder)
    chosen = {key: t for key, t in manifest.tensors.items() if tensors and fnmatch.fnmatch(key, tensors)}
    value = _summary(folder, manifest.iteration) | {
        "save_id": manifest.save_id,
        "libraries": manifest.libraries,
        "files": {file.name: file.size for file in manifest.files},
        "common": manifest.common,
        "shown_tensors": {key: [t.dtype, list(t.shape)] for key, t in chosen.items()},
    }
    if as_json:
        print(json.dumps(value))
        return
    print(f"{folder}: iteration {manifest.iteration}, {_size(manifest.size)} in {len(manifest.files)} files")
    print(f"  saved {_age(value['age_s'])} ago by {_layout(manifest.layout, manifest.world_size)}")
    print(f"  {', '.join(f'{name} {number}' for name, number in manifest.libraries.items())}")
    print(f"  {len(manifest.tensors)} tensors; beside them: {', '.join(manifest.common or {}) or 'nothing'}")
    for key, t in chosen.items():
        print(f"  {key}  {t.dtype} {list(t.shape)}")


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error; yield the function that takes the bytes done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.update(task, advance=count)


@app.command("verify")
def verify(
    path: Where,
    iteration: Iteration = None,
    everything: Annotated[bool, typer.Option("--all", help="Every step, not only one.")] = False,
) -> None:
    """Read every byte and compare it with its hash. Exit status 1 if anything is damaged; says which tensors."""
    from ckpt.reader import verify_file

    root, found = find_step(path, iteration)
    folders = step_folders(root)
    damaged = 0
    for number in folders if everything else [found]:
        try:
            manifest = check_step(folders[number])
            with _progress(f"step {number}", manifest.size) as progress:
                damage = [d for file in manifest.files for d in verify_file(folders[number], file, progress)]
        except CheckpointError as error:
            damage = [str(error)]
        for message in damage:
            print(message)
        print(f"step {number}: {f'{len(damage)} errors' if damage else 'every byte is what was written'}")
        damaged += bool(damage)
    raise typer.Exit(int(damaged > 0))


@app.command("diff")
def diff(first: Where, second: Where) -> None:
    """Compare the tensors of two steps bit for bit, whatever layouts wrote them. Exit status 1 if they differ."""
    from ckpt.rewrite import difference

    folders = _folder(first, None), _folder(second, None)
    with _progress("compare", sum(check_step(folder).size for folder in folders)) as progress:
        found = difference(*folders, progress)
    for key, what in found.items():
        print(f"{key}: {what}")
    print(f"{len(found)} tensors differ" if found else "all tensors are equal")
    raise typer.Exit(int(bool(found)))


@app.command("prune")
def prune(
    path: Where,
    keep_last: Annotated[int | None, typer.Option(min=1, help="The newest steps stay.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Multiples of this stay.")] = None,
    keep_best: Annotated[int | None, typer.Option(min=1, help="The steps of lowest score stay.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
) -> None:
    """Remove the steps that no rule keeps. The newest valid step always stays; damaged ones are left alone."""
    from ckpt.retention import Retention
    from ckpt.retention import prune as remove

    if keep_last is keep_every is keep_best is None:
        raise CheckpointError("say what to keep: --keep-last, --keep-every or --keep-best")
    root, _ = find_step(path)
    gone = remove(root, Retention(keep_last, keep_every, keep_best), dry_run=dry_run)
    stays = [i for i in step_folders(root) if i not in gone]
    verb = "would go" if dry_run else "removed"
    print(f"{verb}: {', '.join(map(str, gone)) or 'none'}; stays: {', '.join(map(str, stays))}")


@app.command("reshard")
def reshard(
    path: Where,
    target: Annotated[Path, typer.Argument(help="Folder for the new step; made if it is not there.")],
    files: Annotated[int, typer.Option(min=1, help="Files of the new step; the memory of one is needed.")] = 1,
    iteration: Iteration = None,
) -> None:
    """Write a step again with another number of files. Training needs this never: any layout loads any other."""
    from ckpt.rewrite import rewrite

    folder = _folder(path, iteration)
    with _progress("rewrite", check_step(folder).size) as progress:
        written = rewrite(folder, target, files, progress)
    print(f"{written}: {files} files")


@app.command("bench")
def bench(
    folder: Annotated[Path, typer.Argument(help="Folder on the disk to measure; what is written is removed.")],
    gigabytes: Annotated[float, typer.Option(min=0.01)] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Measure the disk under a folder, and what a save and a verified load of one process reach of it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    from ckpt.bench import measure

    found = measure(folder, gigabytes)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{found['gigabytes']:.2f} GB on {folder}, GB/s:")
    print(f"  raw write {found['raw_write_gbps']:.2f}   save until safe {found['durable_gbps']:.2f}")
    print(f"  raw read  {found['raw_read_gbps']:.2f}   verified load   {found['load_gbps']:.2f}")
    print(f"  staging (what training waits for) {found['stall_gbps']:.2f}")
