"""Tier 1 on one node: `python -m launch.preflight.node --limits limits.json --out FOLDER`. Exit status 1 on a failure.

Writes `<host>.json` (findings and the tools' texts) and appends to `history.jsonl`. Asks no other node.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path

from launch.preflight.checks import Finding, check_node
from launch.preflight.collect import collect
from launch.preflight.limits import Limits


def node_name() -> str:
    """Name of this node, as Slurm knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def write_verdict(folder: Path, host: str, tier: int, findings: list[Finding], texts: dict[str, str]) -> bool:
    """Write a node's verdict and a line of history; return whether it passed."""
    folder.mkdir(parents=True, exist_ok=True)
    passed = all(finding.ok for finding in findings)
    record = {"host": host, "tier": tier, "time": round(time.time(), 1), "passed": passed}
    detail = {"findings": [asdict(finding) for finding in findings], "texts": texts}
    (folder / f"{host}.tier{tier}.json").write_text(json.dumps(record | detail, indent=1) + "\n", encoding="utf-8")
    failed = [finding.line() for finding in findings if not finding.ok]
    with (folder / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record | {"failed": failed}) + "\n")
    return passed


def main() -> int:
    """Check this node."""
    parser = argparse.ArgumentParser(description="Checks of one node, without any other.")
    parser.add_argument("--limits", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    limits = Limits.model_validate_json(arguments.limits.read_text(encoding="utf-8"))
    texts = collect(limits)
    findings = check_node(texts, limits)
    passed = write_verdict(arguments.out, node_name(), 1, findings, texts)
    for finding in findings:
        if not finding.ok:
            print(f"{node_name()}: {finding.line()}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
