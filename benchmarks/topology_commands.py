"""How quickly `zaya topology` answers, per command, as whole processes; and how large fabrics do.

Run: `python benchmarks/topology_commands.py --json`. Each command is started `--repeat` times and the fastest counts.
Invariant: exit status 1 when a command misses its limit (1 s; 10 s for `place` and for 131,072 GPUs).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "configs/clusters/mi300x_128x8_rails.yaml"
LOGS = ROOT / "tests/topology/nccl_logs"
PLAN = "world_size: 1024\nexpert_model_parallel_size: 16\npipeline_model_parallel_size: 4\n"
LARGE_PLAN = "world_size: 131072\nexpert_model_parallel_size: 16\npipeline_model_parallel_size: 8\n"


def large_cluster(text: str) -> str:
    """The shipped cluster with 16,384 nodes on 512 leaves per rail."""
    text = text.replace("zaya[000-127]", "zaya[00000-16383]")
    return text.replace("  leaves_per_rail: 4", "  leaves_per_rail: 512")


def cases(folder: Path) -> list[tuple[str, float, list[str]]]:
    """(name, limit in seconds, arguments) of every measured command."""
    plan, large, large_plan = folder / "plan.yaml", folder / "large.yaml", folder / "large_plan.yaml"
    plan.write_text(PLAN)
    large.write_text(large_cluster(CLUSTER.read_text()))
    large_plan.write_text(LARGE_PLAN)
    cluster = str(CLUSTER)
    return [
        ("show", 1.0, ["show", cluster]),
        ("verify", 1.0, ["verify", cluster, str(plan)]),
        ("cost", 1.0, ["cost", cluster, "--op", "all", "--nodes", "128"]),
        ("cost of a plan", 1.0, ["cost", cluster, str(plan)]),
        ("place", 10.0, ["place", cluster, str(plan)]),
        ("place, 126 nodes", 10.0, ["place", cluster, str(plan), "--shrink", "--fail", "node=zaya005",
                                    "--fail", "nic=zaya070:3"]),
        ("emit", 1.0, ["emit", cluster, str(plan), "--out", str(folder / "out")]),
        ("whatif", 1.0, ["whatif", cluster, str(plan)]),
        ("lint", 1.0, ["lint", *map(str, sorted(LOGS.glob("*.log")))]),
        ("fit", 1.0, ["fit", cluster]),
        ("verify, 131072 GPUs", 10.0, ["verify", str(large), str(large_plan)]),
        ("place, 131072 GPUs", 10.0, ["place", str(large), str(large_plan)]),
    ]  # fmt: skip


def measure(arguments: list[str], repeat: int) -> tuple[float, float, int]:
    """Fastest wall time and fastest CPU time (seconds) of `python -m topology ...`, and its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    best = best_cpu = float("inf")
    status = 0
    for _ in range(repeat):
        start, cpu = time.perf_counter(), _children_cpu_s()
        done = subprocess.run(
            [sys.executable, "-m", "topology", *arguments], cwd=ROOT, env=environment, capture_output=True
        )
        best, best_cpu = min(best, time.perf_counter() - start), min(best_cpu, _children_cpu_s() - cpu)
        status = done.returncode
    return best, best_cpu, status


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(repeat: int) -> dict[str, Any]:
    """All measurements as one record."""
    rows = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        for title, limit_s, arguments in cases(Path(name)):
            seconds, cpu_s, status = measure(arguments, repeat)
            expected = 1 if title == "lint" else 0  # the excerpts contain errors on purpose
            ok = seconds <= limit_s and status == expected
            times = {"seconds": round(seconds, 3), "cpu_s": round(cpu_s, 3), "limit_s": limit_s}
            rows.append({"command": title, **times, "ok": ok})
    return {
        "benchmark": "topology",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_at_start": round(load, 1),  # above the core count, wall times say little
        "repeat": repeat,
        "rows": rows,
        "ok": all(row["ok"] for row in rows),
    }


def main() -> int:
    """Measure, print, and say by the exit status whether all limits hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    record = run(options.repeat)
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        for row in record["rows"]:
            verdict = "ok" if row["ok"] else "TOO SLOW OR FAILED"
            times = f"{row['seconds']:7.3f} s  cpu {row['cpu_s']:7.3f} s  limit {row['limit_s']:g} s"
            print(f"{row['command']:24} {times}  {verdict}")
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
