"""`zaya submit --rehearse`: every rank starts where it would train, but only says who it is.

As a task, `python -m launch.rehearse FOLDER` prints one JSON line: rank, host, groups, rail, and what differs from the
environment that was planned. `--check FOLDER` then compares all lines with the plan. Standard library only, no torch:
1,024 of them fit on a laptop.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

from launch.coordinates import groups_of
from launch.env import read_rank_env
from launch.errors import LaunchError


def digest(groups: dict[str, list[int]]) -> dict[str, str]:
    """Return a short name per group, equal for its members: first rank, stride, size."""
    return {
        kind: f"{ranks[0]}:{ranks[1] - ranks[0] if len(ranks) > 1 else 1}:{len(ranks)}"
        for kind, ranks in groups.items()
    }


def report(folder: Path) -> dict[str, Any]:
    """Return what this rank knows about itself.

    Raises:
        LaunchError: no launcher's environment, or a contradictory one.
    """
    context = read_rank_env()
    job = json.loads((folder / "rehearsal.json").read_text(encoding="utf-8"))
    nics = job["nics"]
    per_nic = max(1, context.local_world_size // len(nics)) if nics else 1
    wrong = [name for name, value in job["environment"].items() if os.environ.get(name) != value]
    return {
        "rank": context.rank,
        "host": os.environ.get("SLURMD_NODENAME", ""),
        "local_rank": context.local_rank,
        "world_size": context.world_size,
        "master": context.master_addr,
        "port": context.master_port,
        "device": context.device_index,
        "nic": nics[context.local_rank // per_nic] if nics else "",
        "groups": digest(groups_of(context.rank, context.world_size, job["plan"])),
        "hosts": zlib.crc32(" ".join(context.hosts).encode()),
        "wrong_environment": wrong,
    }


def check(folder: Path) -> list[str]:
    """Compare the lines of all ranks with the plan; return what is wrong."""
    job = json.loads((folder / "rehearsal.json").read_text(encoding="utf-8"))
    lines = (folder / "rehearsal.jsonl").read_text(encoding="utf-8").splitlines()
    said = {record["rank"]: record for record in map(json.loads, filter(None, lines)) if "rank" in record}
    size, per_node, hosts = job["world_size"], job["ranks_per_node"], job["hosts"]
    problems = [f"rank {rank} said nothing" for rank in range(size) if rank not in said][:8]
    for rank, record in sorted(said.items()):
        expected = {"local_rank": rank % per_node, "world_size": size, "wrong_environment": []}
        if hosts:
            expected |= {"host": hosts[rank // per_node], "master": hosts[0]}
        wrong = [
            f"{key} {record[key]!r} instead of {value!r}" for key, value in expected.items() if record[key] != value
        ]
        problems += [f"rank {rank} on {record['host']}: {', '.join(wrong)}"] if wrong else []
    for key in ("master", "port", "hosts"):
        values = {record[key] for record in said.values()}
        problems += [f"ranks disagree on {key}: {sorted(map(str, values))[:4]}"] if len(values) > 1 else []
    return problems


def main(argv: list[str]) -> int:
    """Be a task, or check what tasks said."""
    if argv[:1] == ["--check"]:
        problems = check(Path(argv[1]))
        for problem in problems[:20]:
            print(f"zaya: rehearsal: {problem}")
        print(f"zaya: rehearsal {'FAILED: ' + str(len(problems)) + ' problems' if problems else 'passed'}")
        return 1 if problems else 0
    try:
        print(json.dumps(report(Path(argv[0]))), flush=True)
    except LaunchError as error:
        print(f"zaya: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
