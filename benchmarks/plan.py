"""The planner's speed, and its memory model against the dry run of ZAYA1-8B.

`python benchmarks/plan.py --json` times searches (limits: 1 s for 1,024 GPUs, 10 s for 131,072; CPU time of this
process). With `--layouts FILE` it also dry-runs layouts of the full ZAYA1-8B across worlds of 1 to 1,024 ranks, about
a quarter of a minute each, and compares peaks (limit: 2 %). What was measured is kept in the file: the sweep can be
stopped, goes on where it was, and a change of the memory model alone needs no new one. Exit status 1 when a limit is
missed or a layout has not been run.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Started as a script, this folder comes first, and its topology.py would stand in for the package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from megatron_zaya.config import load_config
from megatron_zaya.plan.hardware import Network, accelerator
from megatron_zaya.plan.search import Wanted, search
from megatron_zaya.plan.shape import batch_of, layout_of, model_of, precision_of

ZAYA1 = Path(__file__).resolve().parents[1] / "configs/zaya1_8b.yaml"
SEARCHES = [
    # GPUs, sequence length, global batch, optimizer, limit in seconds
    (8, 4096, 512, "adam", 1.0),
    (1024, 4096, 4096, "adam", 1.0),
    (1024, 4096, 4096, "muon", 1.0),
    (1024, 32768, 512, "adam", 1.0),
    (1024, 131072, 128, "adam", 1.0),
    (131072, 4096, 524288, "adam", 10.0),
    (131072, 4096, 524288, "muon", 10.0),
]
KEYS = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "mbs": "schedule.micro_batch_size",
    "gbs": "schedule.global_batch_size",
    "seq": "data.seq_length",
    "re": "parallel.recompute_granularity",
    "modules": "parallel.recompute_modules",
    "comm": "parallel.cp_comm_type",
    "opt": "optimizer.optimizer",
}
# world, rank, then the degrees
LAYOUTS = """
1 0 mbs=1 gbs=1
8 0 mbs=1 gbs=8
8 0 mbs=2 gbs=16 re=full
8 0 ep=8 mbs=4 gbs=32
8 0 ep=8 mbs=1 gbs=8 opt=muon
8 0 ep=4 mbs=2 gbs=16 re=selective
8 0 tp=2 ep=8 mbs=2 gbs=8
8 0 tp=4 ep=4 mbs=2 gbs=4
8 0 tp=2 ep=4 etp=2 mbs=2 gbs=8
8 0 cp=8 ep=8 mbs=1 gbs=1 seq=32768
16 0 ep=16 mbs=2 gbs=32
64 0 ep=8 mbs=2 gbs=128
64 24 pp=8 ep=8 mbs=1 gbs=32
64 56 pp=8 ep=8 mbs=2 gbs=64
64 0 pp=8 ep=8 mbs=4 gbs=64
512 0 pp=8 ep=4 mbs=1 gbs=256
1024 384 pp=8 ep=16 mbs=2 gbs=512
320 0 pp=10 ep=8 mbs=1 gbs=128
1024 256 tp=2 pp=8 ep=8 mbs=2 gbs=256
1024 512 pp=4 cp=2 ep=8 mbs=1 gbs=256 seq=32768
16 8 tp=2 pp=2 ep=4 etp=2 mbs=2 gbs=8
1024 0 pp=4 ep=8 mbs=2 gbs=1024 re=selective modules=[layernorm,experts]
64 16 pp=4 vp=2 ep=8 mbs=1 gbs=64
32 0 pp=4 ep=8 mbs=1 gbs=32
32 8 pp=4 ep=8 mbs=1 gbs=32
32 24 pp=4 ep=8 mbs=2 gbs=64 re=full
256 192 pp=4 mbs=1 gbs=256
8 4 pp=2 ep=4 mbs=1 gbs=8
1024 512 pp=2 ep=8 mbs=2 gbs=2048 re=selective
1024 777 mbs=1 gbs=1024
1024 777 ep=8 mbs=4 gbs=4096
1024 777 mbs=4 gbs=4096
1024 0 ep=16 mbs=2 gbs=2048
128 0 mbs=2 gbs=256
256 0 tp=2 ep=8 mbs=4 gbs=512
512 0 ep=4 mbs=4 gbs=2048
64 32 pp=2 vp=2 ep=8 mbs=1 gbs=64
128 0 ep=8 mbs=8 gbs=1024
64 0 ep=8 mbs=4 gbs=256 re=selective modules=[core_attn,moe]
8 0 tp=8 ep=8 mbs=4 gbs=4
128 0 ep=8 mbs=4 gbs=512 re=full
64 0 cp=2 ep=8 mbs=1 gbs=32 seq=32768
8 0 tp=2 cp=2 ep=8 mbs=1 gbs=2 seq=32768 comm=p2p
128 64 pp=2 cp=4 ep=8 mbs=1 gbs=16 seq=131072 comm=p2p
1024 0 cp=8 ep=8 mbs=1 gbs=128 seq=131072
"""


def _forget() -> None:
    """Empty every cache of the planner."""
    for found in gc.get_objects():
        if isinstance(found, functools._lru_cache_wrapper) and (found.__module__ or "").startswith(
            "megatron_zaya.plan"
        ):
            found.cache_clear()


def time_searches(repeat: int) -> list[dict[str, Any]]:
    """Fastest CPU time of each search, each without what the one before remembers."""
    device, rows = accelerator("MI300X"), []
    for gpus, seq_length, batch, optimizer, limit_s in SEARCHES:
        config = load_config(ZAYA1, [f"optimizer.optimizer={optimizer}"])
        wanted = Wanted(
            model_of(config), gpus, seq_length, batch, precision=precision_of(config), allowances=device.allowances()
        )
        best, considered = float("inf"), 0
        for _ in range(repeat):
            _forget()
            start = time.process_time()
            considered = search(wanted, device, Network.of(device)).considered
            best = min(best, time.process_time() - start)
        rows.append({"gpus": gpus, "seq_length": seq_length, "optimizer": optimizer, "plans": considered,
                     "cpu_s": round(best, 3), "limit_s": limit_s, "ok": best <= limit_s})  # fmt: skip
    return rows


def _cases() -> Iterator[tuple[str, int, int, list[str]]]:
    for line in LAYOUTS.strip().splitlines():
        world, rank, *degrees = line.split()
        overrides = [f"{KEYS[name]}={value}" for name, value in (text.split("=") for text in degrees)]
        tensor = any(text.startswith("tp=") for text in degrees)
        yield line, int(world), int(rank), [*overrides, f"parallel.sequence_parallel={str(tensor).lower()}"]


def dry_run_layouts(file: Path, minutes: float) -> dict[str, Any]:
    """Return what the dry run says of each layout; ``file`` keeps it, so that a stopped sweep goes on where it was."""
    from megatron_zaya.compat import quiet_megatron
    from megatron_zaya.plan.dryrun.run import dry_run

    quiet_megatron()
    measured: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    started = time.monotonic()
    for name, world, rank, overrides in _cases():
        if name in measured:
            continue
        if time.monotonic() - started > 60 * minutes:
            break
        run = dry_run(load_config(ZAYA1, overrides), world, rank)
        measured[name] = {
            "construction_bytes": run.construction.total_bytes,
            "step_bytes": run.step.total_bytes,
            "optimizer_step_bytes": run.optimizer_step.total_bytes,
            "moment": run.step.moment,
            "parameters": run.parameters,
            "wall_s": round(run.wall_s, 1),
            "date": datetime.now(UTC).date().isoformat(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measured, indent=1) + "\n")
    return measured


def compare_layouts(measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Memory model against the dry runs of the layouts that have been run."""
    from megatron_zaya.plan.activations import Options
    from megatron_zaya.plan.memory import stage_memory

    for name, world, rank, overrides in _cases():
        if name not in measured:
            continue
        run, config = measured[name], load_config(ZAYA1, overrides)
        layout = layout_of(config, world)
        stage = stage_memory(
            model_of(config), layout, batch_of(config), rank // (world // layout.pp), precision=precision_of(config),
            options=Options(loss_workspace_bytes=config.run.loss_workspace_mib * 2**20),
        )  # fmt: skip
        peaks = {
            "construction": stage.construction_peak,
            "step": stage.step_peak,
            "optimizer_step": stage.optimizer_peak,
        }
        dry_peak = max(run[f"{phase}_bytes"] for phase in peaks)
        error = stage.peak / dry_peak - 1
        yield {
            "layout": name,
            "dry_run_gib": round(dry_peak / 2**30, 3),
            "model_gib": round(stage.peak / 2**30, 3),
            "error": round(error, 5),
            **{f"{phase}_error": round(peak / run[f"{phase}_bytes"] - 1, 5) for phase, peak in peaks.items()},
            "wall_s": run["wall_s"],
            "ok": abs(error) <= 0.02,
        }


def main() -> int:
    """Measure, print, and say by the exit status whether all limits hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--layouts", type=Path, metavar="FILE", help="also compare memory model and dry runs, kept here"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="start no dry run after this time")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    record: dict[str, Any] = {
        "benchmark": "plan",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_at_start": round(os.getloadavg()[0], 1),
        "searches": time_searches(options.repeat),
    }
    if options.layouts:
        record["layouts"] = list(compare_layouts(dry_run_layouts(options.layouts, options.minutes)))
        record["layouts_missing"] = len(LAYOUTS.strip().splitlines()) - len(record["layouts"])
    rows = [*record["searches"], *record.get("layouts", [])]
    record["ok"] = all(row["ok"] for row in rows) and not record.get("layouts_missing")
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        for row in record["searches"]:
            asked = f"{row['gpus']:7} GPUs, {row['seq_length']:6} tokens, {row['optimizer']}"
            print(f"{asked}: {row['plans']:6} plans in {row['cpu_s']:.2f} s")
        for row in record.get("layouts", []):
            print(f"{row['layout']:52} {row['dry_run_gib']:8.2f} {row['model_gib']:8.2f} GiB {row['error']:+.2%}  "
                  f"construction {row['construction_error']:+.2%} step {row['step_error']:+.2%} "
                  f"optimizer {row['optimizer_step_error']:+.2%}  {row['wall_s']:.0f} s")  # fmt: skip
        if record.get("layouts_missing"):
            print(f"{record['layouts_missing']} layouts have not been run: the same command goes on with them")
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
