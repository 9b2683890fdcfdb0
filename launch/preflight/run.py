"""`zaya preflight`: both tiers, in an allocation through srun, elsewhere on this machine; then one verdict per node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.containers import Wrapping, wrap
from launch.errors import LaunchError
from launch.local import torchrun_command
from launch.preflight.judge import judge
from launch.preflight.node import node_name, write_verdict
from launch.site import Site
from launch.supervise.slurm import allocated_hosts
from topology.hostlist import compress

TIER2_TIMEOUT_S = 900


@dataclass(frozen=True)
class Outcome:
    """Names of the nodes that may train, and of the others with their reasons."""

    passed: list[str]
    failed: dict[str, list[str]]


def preflight(site: Site, out: Path, tier: int, ranks_per_node: int | None) -> Outcome:
    """Check all nodes and write the verdicts, `pass.txt` and `fail.txt` (a host list for `--exclude`) into ``out``.

    Raises:
        LaunchError: the site file sets no limits.
    """
    if site.preflight is None:
        raise LaunchError("the site file has no `preflight:` section: there is nothing to check against")
    out.mkdir(parents=True, exist_ok=True)
    (out / "limits.json").write_text(site.preflight.model_dump_json(), encoding="utf-8")
    hosts = allocated_hosts()
    wrapping = wrap(site.container, Path.cwd(), [out.resolve()]) if hosts else Wrapping([], [])
    failed: dict[str, list[str]] = {}
    command = ["-m", "launch.preflight.node", "--limits", str(out / "limits.json"), "--out", str(out)]
    for host in hosts or [node_name()]:
        (out / f"{host}.tier1.json").unlink(missing_ok=True)
    if hosts:
        nodes = str(len(hosts))
        srun = [
            "srun",
            f"--nodes={nodes}",
            f"--ntasks={nodes}",
            "--ntasks-per-node=1",
            "--no-kill",
            "--kill-on-bad-exit=0",
        ]
        _run([*srun, "--overlap", *wrapping.srun_options, *wrapping.prefix, site.python, *command])
    else:
        _run([sys.executable, *command])
    for host in hosts or [node_name()]:
        failed |= _failures(out, host, 1)
    if tier == 2:
        failed |= _tier2(site, out, [h for h in hosts if h not in failed], bool(hosts), ranks_per_node, wrapping)
    passed = [host for host in hosts or [node_name()] if host not in failed]
    (out / "pass.txt").write_text(compress(passed) + "\n" if passed else "", encoding="utf-8")
    (out / "fail.txt").write_text(compress(failed) + "\n" if failed else "", encoding="utf-8")
    return Outcome(passed, failed)


def _run(command: list[str], env: dict[str, str] | None = None) -> int:
    """Run to the end; verdicts are files, the exit status says only that something was bad."""
    try:
        return subprocess.run(command, timeout=TIER2_TIMEOUT_S, env={**os.environ, **(env or {})}).returncode
    except subprocess.TimeoutExpired:
        return -1


def _failures(out: Path, host: str, tier: int) -> dict[str, list[str]]:
    path = out / f"{host}.tier{tier}.json"
    if not path.exists():
        return {host: [f"no verdict of tier {tier}: the node did not answer"]}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["passed"]:
        return {}
    return {host: [f"{f['check']}: {f['found']} (wanted: {f['wanted']})" for f in record["findings"] if not f["ok"]]}


def _tier2(
    site: Site, out: Path, hosts: list[str], in_slurm: bool, ranks_per_node: int | None, wrapping: Wrapping
) -> dict[str, list[str]]:
    """Measure on the nodes that passed tier 1, judge, write verdicts."""
    assert site.preflight is not None
    result = out / "measurements.json"
    result.unlink(missing_ok=True)
    ranks = ranks_per_node or site.ranks
    measure = ["megatron_zaya.preflight.measure", str(result)]
    if in_slurm and not hosts:
        return {}
    if in_slurm:
        nodes = len(hosts)
        options = [
            f"--nodes={nodes}",
            f"--ntasks={nodes * ranks}",
            f"--ntasks-per-node={ranks}",
            "--overlap",
            "--overcommit",
        ]
        options += [f"--nodelist={compress(hosts)}", "--kill-on-bad-exit=1", *wrapping.srun_options]
        status = _run(["srun", *options, *wrapping.prefix, site.python, "-m", *measure], site.environment)
    else:
        status = _run(torchrun_command(measure[0], measure[1:], ranks), site.environment)
    if not result.exists():
        reason = (
            f"tier 2 gave no figures (exit status {status}); a rank hung or died: see its output, and `zaya topology`"
        )
        return {host: [reason] for host in hosts or [node_name()]}
    records = json.loads(result.read_text(encoding="utf-8"))["ranks"]
    verdicts = judge(records, site.preflight, _expected(site, records))
    failed: dict[str, list[str]] = {}
    for host, findings in verdicts.items():
        write_verdict(out, host, 2, findings, {})
        failed |= _failures(out, host, 2)
    return failed


def _expected(site: Site, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """What the topology planner expects of these nodes at the measured size; empty without a cluster description."""
    if site.cluster is None:
        return {}
    from topology.build import load_fabric
    from topology.cost import CostModel, GroupShape, bus_factor

    model = CostModel.for_fabric(load_fabric(Path(site.cluster)))
    hosts = len({rank["host"] for rank in ranks})
    per_node, size = len(ranks) // hosts, int(ranks[0]["size_bytes"])
    shapes = {"node.all_reduce": GroupShape(1, per_node), "rail.all_reduce": GroupShape(hosts, 1),
              "world.all_reduce": GroupShape(hosts, per_node)}  # fmt: skip
    return {
        name: size * bus_factor("all_reduce", shape.ranks) / model.time("all_reduce", size, shape) / 1e9
        for name, shape in shapes.items()
        if shape.ranks > 1
    }
