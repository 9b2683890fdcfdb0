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

`--recovery` then cuts the power of a node that trains, and reports how long it takes until the job trains on the spare:

    noticed      until the lost node is named, the other ranks are ended and the spare is told to start
    interpreter to first step, as above
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

# As a script this file would hide the package of the same name; the project's folder takes the place of benchmarks/.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.supervise.record import read_events
from tests.slurm_cluster import SlurmCluster, missing, slurm_cluster

GOAL_S, RECOVERY_GOAL_S = 2.0, 30.0
PARTS = ("queue", "agents", "interpreter", "rendezvous", "imports", "join", "build", "first step")
OWN = ("queue", "agents", "rendezvous", "join")
PHASES = ("rendezvous", "imports", "join", "build", "first step", "step")
ZAYA = [sys.executable, "-c", "from launch.cli import main; main()"]
RUN = {
    "run": {"name": "launch", "precision": "fp32"},
    "model": dict(
        num_layers=2, hidden_size=32, num_attention_heads=2, num_query_groups=1, kv_channels=16, num_moe_experts=3,
        moe_ffn_hidden_size=16, router_hidden_size=16, vocab_size=258, max_position_embeddings=64, rotary_base=1e4,
    ),
    "schedule": {"train_iters": 2000, "global_batch_size": 8},
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


def wait_for(folder: Path, event: str, number: int = 0, timeout_s: float = 300.0) -> dict[str, Any]:
    """Wait for an event of the supervisor, by default the first of its kind."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = read_events(folder / "runs/launch/launch/events.jsonl", event)
        if len(found) > number:
            return found[number]
        time.sleep(0.1)
    outputs = "".join(p.read_text(errors="replace")[-2000:] for p in folder.rglob("*.out"))
    raise SystemExit(f"no event {event!r} within {timeout_s:g} s\n{outputs}")


def differences(names: Sequence[str], moments: Sequence[float]) -> dict[str, float]:
    """Return the seconds between moments, by name."""
    return {name: round(b - a, 3) for name, (a, b) in zip(names, pairwise(moments), strict=True)}


def split(submitted: float, folder: Path) -> dict[str, float]:
    """Return the seconds of every part."""
    phases = wait_for(folder, "training")["phases"]
    starts = [wait_for(folder, event)["time"] for event in ("job_started", "attempt_started")]
    return differences(PARTS, [submitted, *starts, *(phases[phase] for phase in PHASES)])


def recover(cluster: SlurmCluster, folder: Path) -> dict[str, float]:
    """Cut the power of a node that trains; return the seconds of every part of the way back."""
    victim = wait_for(folder, "attempt_started")["hosts"][1]
    killed = time.time()
    cluster.crash_node(victim)
    phases = wait_for(folder, "training", 1)["phases"]
    started = wait_for(folder, "attempt_started", 1)
    assert victim not in started["hosts"]
    return differences(("noticed", *PARTS[2:]), [killed, started["time"], *(phases[phase] for phase in PHASES)])


def measure(
    folder: Path, nodes: int, ranks_per_node: int, local: bool, recovery: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Run one job and return its split, and that of its recovery."""
    prepare(folder, ranks_per_node)
    submit = [*ZAYA, "submit", "run.yaml", "--site", "site.yaml"]
    if local:
        submitted = time.time()
        options = ["--local", "--nproc", str(nodes * ranks_per_node), "schedule.train_iters=2"]
        subprocess.run([*submit, *options], cwd=folder, check=True)
        return split(submitted, folder), {}
    names = [f"n{number}" for number in range(nodes + recovery)]
    with slurm_cluster(folder / "slurm", names) as cluster:
        cluster.run([*submit, "--nodes", str(nodes), "--spares", str(int(recovery))], cwd=folder, timeout_s=120)
        # `zaya submit` writes the batch script last, and sbatch follows at once.
        parts = split((folder / "runs/launch/launch/job.sbatch").stat().st_mtime, folder)
        return parts, recover(cluster, folder) if recovery else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--local", action="store_true", help="without Slurm")
    parser.add_argument("--recovery", action="store_true", help="then kill a node and measure the way back")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.local and arguments.recovery:
        parser.error("--recovery needs nodes to kill: leave out --local")
    if not arguments.local and missing():
        raise SystemExit(f"{missing()}; --local measures without Slurm")
    with tempfile.TemporaryDirectory() as name:
        shape = (arguments.nodes, arguments.ranks_per_node)
        parts, recovery = measure(Path(name), *shape, arguments.local, arguments.recovery)
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
    if recovery:
        total = round(sum(recovery.values()), 3)
        beyond = round(total - recovery["interpreter"] - recovery["imports"], 3)
        result["recovery"] = {
            "seconds": recovery, "total_s": total, "beyond_imports_s": beyond, "goal_s": RECOVERY_GOAL_S,
            "goal_met": beyond <= RECOVERY_GOAL_S,
        }  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
        return
    for part, seconds in parts.items():
        print(f"{part:12} {seconds:8.2f} s{'  *' if part in OWN else ''}")
    print(f"{'total':12} {result['total_s']:8.2f} s, of it our own (*) {own:.2f} s; goal {GOAL_S:g} s")
    for part, seconds in recovery.items():
        print(f"{part:12} {seconds:8.2f} s after a node died")
    if recovery:
        print(f"{'total':12} {total:8.2f} s, of it beyond imports {beyond:.2f} s; goal {RECOVERY_GOAL_S:g} s")


if __name__ == "__main__":
    main()
