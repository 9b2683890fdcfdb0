"""The planner's speed, and its memory model against the dry run of ZAYA1-8B.

`python benchmarks/plan.py --json` times searches (limits: 1 s for 1,024 GPUs, 10 s for 131,072; CPU time of this
process). With `--layouts` it also dry-runs layouts of the full ZAYA1-8B across worlds of 1 to 1,024 ranks, half a
minute each, and compares peaks (limit: 2 %). Exit status 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
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
    # GPUs, sequence length, global batch, limit in seconds
    (8, 4096, 512, 1.0),
    (1024, 4096, 4096, 1.0),
    (1024, 32768, 512, 1.0),
    (1024, 131072, 128, 1.0),
    (131072, 4096, 524288, 10.0),
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
8 4 pp=2 ep=4 mbs=1 gbs=16
16 0 ep=16 mbs=2 gbs=32
16 8 pp=2 ep=8 mbs=2 gbs=32
32 0 pp=4 ep=8 mbs=1 gbs=64
32 8 pp=4 ep=8 mbs=1 gbs=64
32 24 pp=4 ep=8 mbs=1 gbs=64
64 0 ep=8 mbs=2 gbs=128
64 32 pp=2 vp=2 ep=8 mbs=1 gbs=64
64 0 cp=2 ep=8 mbs=1 gbs=32 seq=32768
128 0 mbs=2 gbs=256
128 0 ep=8 mbs=8 gbs=1024
128 0 cp=8 ep=8 mbs=1 gbs=16 seq=131072
128 0 ep=8 mbs=4 gbs=512 re=full
256 0 tp=2 ep=8 mbs=4 gbs=512
256 192 pp=4 mbs=1 gbs=512
512 0 ep=4 mbs=4 gbs=2048
512 0 tp=2 cp=2 ep=8 mbs=1 gbs=128 seq=32768
1024 777 mbs=1 gbs=1024
1024 777 mbs=4 gbs=4096
1024 777 ep=8 mbs=4 gbs=4096
1024 0 ep=16 mbs=2 gbs=2048
1024 0 cp=8 ep=8 mbs=1 gbs=128 seq=131072
1024 512 pp=2 ep=8 mbs=2 gbs=4096 re=selective
1024 0 cp=2 ep=8 mbs=1 gbs=512 seq=32768
"""


def time_searches(repeat: int) -> list[dict[str, Any]]:
    """Fastest CPU time of each search."""
    model, device = model_of(load_config(ZAYA1)), accelerator("MI300X")
    rows = []
    for gpus, seq_length, batch, limit_s in SEARCHES:
        best, considered = float("inf"), 0
        for _ in range(repeat):
            start = time.process_time()
            found = search(Wanted(model, gpus, seq_length, batch), device, Network.of(device))
            best, considered = min(best, time.process_time() - start), found.considered
        ok = best <= limit_s
        rows.append({"gpus": gpus, "seq_length": seq_length, "plans": considered, "cpu_s": round(best, 3),
                     "limit_s": limit_s, "ok": ok})  # fmt: skip
    return rows


def _cases() -> Iterator[tuple[str, int, int, list[str]]]:
    for line in LAYOUTS.strip().splitlines():
        world, rank, *degrees = line.split()
        overrides = [f"{KEYS[name]}={value}" for name, value in (text.split("=") for text in degrees)]
        tensor = any(text.startswith("tp=") for text in degrees)
        yield line, int(world), int(rank), [*overrides, f"parallel.sequence_parallel={str(tensor).lower()}"]


def compare_layouts() -> Iterator[dict[str, Any]]:
    """Memory model against dry run, one layout after the other."""
    from megatron_zaya.compat import quiet_megatron
    from megatron_zaya.plan.activations import Options
    from megatron_zaya.plan.dryrun.run import dry_run
    from megatron_zaya.plan.memory import stage_memory

    quiet_megatron()
    for name, world, rank, overrides in _cases():
        config = load_config(ZAYA1, overrides)
        run = dry_run(config, world, rank)
        layout = layout_of(config, world)
        stage = stage_memory(
            model_of(config), layout, batch_of(config), rank // (world // layout.pp), precision=precision_of(config),
            options=Options(loss_workspace_bytes=config.run.loss_workspace_mib * 2**20),
        )  # fmt: skip
        error = stage.peak / run.peak_bytes - 1
        yield {
            "layout": name,
            "dry_run_gib": round(run.peak_bytes / 2**30, 3),
            "model_gib": round(stage.peak / 2**30, 3),
            "error": round(error, 5),
            "step_error": round(stage.step_peak / run.step.total_bytes - 1, 5),
            "wall_s": round(run.wall_s, 1),
            "ok": abs(error) <= 0.02,
        }


def main() -> int:
    """Measure, print, and say by the exit status whether all limits hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--layouts", action="store_true", help="also compare the memory model with the dry run")
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
        record["layouts"] = []
        for row in compare_layouts():
            record["layouts"].append(row)
            if not options.json:
                print(f"{row['layout']:45} {row['dry_run_gib']:8.2f} {row['model_gib']:8.2f} GiB {row['error']:+.2%}")
    rows = [*record["searches"], *record.get("layouts", [])]
    record["ok"] = all(row["ok"] for row in rows)
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        for row in record["searches"]:
            print(f"{row['gpus']:7} GPUs, {row['seq_length']:6} tokens: {row['plans']:6} plans in {row['cpu_s']:.2f} s")
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
