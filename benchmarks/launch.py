"""From sbatch to the first step, on a real Slurm of this machine: `python benchmarks/launch.py [--json]`.

One job through `zaya submit`, with the supervisor and 8 ranks on 2 nodes, split into

    queue        sbatch until the batch script runs
    agents       until every node's agent has answered and the ranks are started
    interpreter  until every rank has started Python and read its run file's schema (imports without torch)
    rendezvous   until all ranks have read who they are, checked their run and agreed
    imports      torch and Megatron-Core
    join         process groups of torch
    build        model, optimizer, data, checkpoint
    first step   until every rank has done a step

The goal is at most 2 s for everything that is neither imports (interpreter included) nor build nor the step itself.
Without Slurm on the machine: `--local` runs the same job without the queue.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

# As a script this file would hide the package of the same name; the project's folder takes the place of benchmarks/.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.supervise.record import read_events
from tests.slurm_cluster import missing, slurm_cluster

GOAL_S = 2.0
PARTS = ("queue", "agents", "interpreter", "rendezvous", "imports", "join", "build", "first step")
OWN = ("queue", "agents", "rendezvous", "join")
ZAYA = [sys.executable, "-c", "from launch.cli import main; main()"]
RUN = {
    "run": {"name": "launch", "precision": "fp32"},
    "model": dict(
        num_layers=2, hidden_size=32, num_attention_heads=2, num_query_groups=1, kv_channels=16, num_moe_experts=3,
        moe_ffn_hidden_size=16, router_hidden_size=16, vocab_size=258, max_position_embeddings=64, rotary_base=1e4,
    ),
    "schedule": {"train_iters": 2, "global_batch_size": 8},
    "data": {"data_path": ["text"], "seq_length": 32},
    "checkpoint": {"save_at_end": False},
    "telemetry": {"loss_curve": False},
}  # fmt: skip


def prepare(folder: Path, ranks_per_node: int) -> None:
    """Write run file, site file and data."""
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    site = {
        "slurm": {"gpus_per_node": 0, "exclusive": False, "time": "20"},
        "ranks_per_node": ranks_per_node,
        "python": sys.executable,
        "environment": {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    command = [*ZAYA, "data", "prepare", "python-stdlib", "--limit-documents", "60", "-o", "text", "--workers", "1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def wait_for(folder: Path, event: str, timeout_s: float = 300.0) -> dict[str, Any]:
    """Wait for an event of the supervisor."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = read_events(folder / "runs/launch/launch/events.jsonl", event)
        if found:
            return found[0]
        time.sleep(0.1)
    outputs = "".join(p.read_text(errors="replace")[-2000:] for p in folder.rglob("*.out"))
    raise SystemExit(f"no event {event!r} within {timeout_s:g} s\n{outputs}")


def split(submitted: float, folder: Path) -> dict[str, float]:
    """Return the seconds of every part."""
    training = wait_for(folder, "training")["phases"]
    moments = [
        submitted,
        wait_for(folder, "job_started")["time"],
        wait_for(folder, "attempt_started")["time"],
        *(training[phase] for phase in ("rendezvous", "imports", "join", "build", "first step", "step")),
    ]
    return {name: round(b - a, 3) for name, (a, b) in zip(PARTS, pairwise(moments), strict=True)}


def measure(folder: Path, nodes: int, ranks_per_node: int, local: bool) -> dict[str, float]:
    """Run one job and return its split."""
    prepare(folder, ranks_per_node)
    submit = [*ZAYA, "submit", "run.yaml", "--site", "site.yaml"]
    if local:
        submitted = time.time()
        subprocess.run([*submit, "--local", "--nproc", str(nodes * ranks_per_node)], cwd=folder, check=True)
        return split(submitted, folder)
    with slurm_cluster(folder / "slurm", [f"n{number}" for number in range(nodes)]) as cluster:
        cluster.run([*submit, "--nodes", str(nodes)], cwd=folder, timeout_s=120)
        # `zaya submit` writes the batch script last, and sbatch follows at once.
        return split((folder / "runs/launch/launch/job.sbatch").stat().st_mtime, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--local", action="store_true", help="without Slurm")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=4)
    arguments = parser.parse_args()
    if not arguments.local and missing():
        raise SystemExit(f"{missing()}; --local measures without Slurm")
    with tempfile.TemporaryDirectory() as name:
        parts = measure(Path(name), arguments.nodes, arguments.ranks_per_node, arguments.local)
    own = round(sum(parts[name] for name in OWN), 3)
    result = {
        "ranks": arguments.nodes * arguments.ranks_per_node,
        "cores": len(os.sched_getaffinity(0)),
        "seconds": parts,
        "total_s": round(sum(parts.values()), 3),
        "own_s": own,
        "goal_s": GOAL_S,
        "goal_met": own <= GOAL_S,
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for part, seconds in parts.items():
        print(f"{part:12} {seconds:8.2f} s{'  *' if part in OWN else ''}")
    print(f"{'total':12} {result['total_s']:8.2f} s, of it our own (*) {own:.2f} s; goal {GOAL_S:g} s")


if __name__ == "__main__":
    main()
