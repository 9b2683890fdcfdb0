"""Conversion of a synthetic model of 2 GB: throughput beside a plain copy of the same bytes, and peak memory.

    python benchmarks/convert.py [--json] [--gb 2] [--rounds 3]

Every round copies, imports and exports once, each in a process of its own, with the page cache of the inputs dropped.
The copy reads and writes 4 MiB at a time through the page cache and syncs, as `cp` would. The two conversions of
torch_dist use torch and Megatron-Core, so their peaks include these.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_zaya.config import RunConfig  # noqa: E402
from megatron_zaya.convert.commands import Options, from_hf, from_torch_dist, to_hf, to_torch_dist  # noqa: E402

BLOCK = 4 << 20


def config_of(size_gb: float) -> RunConfig:
    """Return a bf16 model of about that size; its largest tensor is 134 MB."""
    layer_bytes = 2 * 16 * 3 * 1024 * 2048
    layers = max(1, round(size_gb * 1e9 / layer_bytes))
    return RunConfig.model_validate(
        {"model": {"num_layers": layers, "hidden_size": 1024, "vocab_size": 32_768}, "run": {"precision": "bf16"}}
    )


def drop_cache(folder: Path) -> None:
    """Let the page cache forget the files of a folder."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> None:
    """Copy the weights of a folder as plainly as can be."""
    target.mkdir()
    for path in source.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file, (target / path.name).open("wb", buffering=0) as out:
            while block := file.read(BLOCK):
                out.write(block)
            os.fsync(out.fileno())


def child(what: str, source: Path, target: Path, size_gb: float) -> None:
    """Do one thing, and print its seconds and this process's peak resident memory."""
    drop_cache(source)
    start = time.perf_counter()
    if what == "copy":
        copy(source, target)
    elif what == "from-hf":
        from_hf(source, config_of(size_gb), target, Options(workers=2))
    elif what == "to-hf":
        to_hf(source, target, Options(workers=2))
    elif what == "to-torch-dist":
        to_torch_dist(source, target, Options())
    else:
        from_torch_dist(source, config_of(size_gb), target, Options())
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def measure(what: str, source: Path, target: Path, size_gb: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, str(source), str(target), "--gb", str(size_gb)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, source, target = options.child
        child(what, Path(source), Path(target), options.gb)
        return
    from tests.convert.drawn import write_model

    ways = ("copy", "from-hf", "to-hf", "to-torch-dist", "from-torch-dist")
    results: dict[str, list[dict[str, float]]] = {what: [] for what in ways}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            root = Path(folder)
            source = write_model(root / "source", config_of(options.gb), dtype="BF16")
            size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
            results["copy"].append(measure("copy", source, root / f"copy{number}", options.gb))
            results["from-hf"].append(measure("from-hf", source, root / "ours", options.gb))
            results["to-hf"].append(measure("to-hf", root / "ours", root / "back", options.gb))
            results["to-torch-dist"].append(measure("to-torch-dist", root / "ours", root / "torch_dist", options.gb))
            again = measure("from-torch-dist", root / "torch_dist", root / "again", options.gb)
            results["from-torch-dist"].append(again)
    report: dict[str, object] = {"model_bytes": size, "rounds": options.rounds}
    for what, rounds in results.items():
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(results["copy"], rounds, strict=True)]
        report[what] = {
            "gb_per_s": size / 1e9 / statistics.median(r["seconds"] for r in rounds),
            "peak_mb": max(r["peak_bytes"] for r in rounds) / 1e6,
            "throughput_over_copy": statistics.median(ratios),
        }
    if options.json:
        print(json.dumps(report))
        return
    print(f"{size / 1e9:.2f} GB, {options.rounds} rounds")
    for what in results:
        one = report[what]
        assert isinstance(one, dict)
        print(
            "{:15} {gb_per_s:6.2f} GB/s  {throughput_over_copy:5.2f} of a copy  peak {peak_mb:5.0f} MB".format(
                what, **one
            )
        )


if __name__ == "__main__":
    main()
