"""Which node is slow: the figures of all ranks against each other, against absolute limits, and against the planner.

A figure is slow below `spread` of the median of its kind. A pair of nodes is slow together; the one that is slow in
every pair it takes part in is at fault. Pure.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from launch.preflight.checks import Finding
from launch.preflight.limits import Limits

OWN = ("gemm_tflops", "memory_gbs", "node.all_reduce", "rail.all_reduce")
SHARED = ("world.all_reduce", "world.all_to_all")
UNIT = {"gemm_tflops": "TFLOP/s"}


def judge(
    ranks: Sequence[Mapping[str, Any]], limits: Limits, expected: Mapping[str, float]
) -> dict[str, list[Finding]]:
    """Return findings per host.

    Args:
        ranks: the records of `megatron_zaya.preflight.measure`.
        limits: absolute limits, and the spread that is healthy.
        expected: figure -> GB/s that the topology planner expects; empty where nobody described the fabric.
    """
    findings: dict[str, list[Finding]] = {str(rank["host"]): [] for rank in ranks}
    for name in OWN:
        _spread(name, ranks, limits, findings)
    for host, finding in _pairs(ranks, limits).items():
        findings[host].append(finding)
    absolute = {"gemm_tflops": limits.min_gemm_tflops, "memory_gbs": limits.min_memory_bandwidth_gbs}
    if limits.network_share is not None:
        absolute |= {name: value * limits.network_share for name, value in expected.items()}
    for name, least in absolute.items():
        if least is not None:
            _least(name, ranks, least, findings)
    return findings


def _spread(name: str, ranks: Sequence[Mapping[str, Any]], limits: Limits, findings: dict[str, list[Finding]]) -> None:
    values = [(float(rank[name]), rank) for rank in ranks if name in rank]
    if not values:
        return
    median = statistics.median(value for value, _ in values)
    for host in findings:
        own = [(value, rank["rank"]) for value, rank in values if rank["host"] == host]
        if own:
            value, rank = min(own)
            wanted = f"at least {limits.spread:g} of the median {median:.4g} {UNIT.get(name, 'GB/s')}"
            found = f"{value:.4g} on rank {rank}"
            findings[host].append(Finding(name, value >= limits.spread * median, found, wanted, "compare its tier 1"))


def _pairs(ranks: Sequence[Mapping[str, Any]], limits: Limits) -> dict[str, Finding]:
    """One finding per host that is slow in every pair it takes part in, on some rail."""
    pairs = [
        (source, str(rank["host"]), int(rank["rail"]), float(value))
        for rank in ranks
        for source, value in rank.get("rail.send_recv_from", {}).items()
    ]
    if not pairs:
        return {}
    median = statistics.median(value for *_, value in pairs)
    slow: dict[tuple[str, int], int] = defaultdict(int)
    taking_part: dict[tuple[str, int], int] = defaultdict(int)
    for source, target, rail, value in pairs:
        for host in (source, target):
            taking_part[host, rail] += 1
            slow[host, rail] += value < limits.spread * median
    found = {}
    for (host, rail), count in sorted(slow.items()):
        if count == taking_part[host, rail] and host not in found:
            wanted = f"at least {limits.spread:g} of the median {median:.4g} GB/s"
            found[host] = Finding("rail.send_recv", False, f"slow to all neighbours on rail {rail}", wanted,
                                  f"see NIC {rail}, its cable and switch port")  # fmt: skip
    return found


def _least(name: str, ranks: Sequence[Mapping[str, Any]], least: float, findings: dict[str, list[Finding]]) -> None:
    for host in findings:
        values = [float(rank[name]) for rank in ranks if rank["host"] == host and name in rank]
        if values:
            found = round(min(values), 3)
            findings[host].append(
                Finding(f"{name}, absolute", found >= least, found, f"at least {least:.4g}", "see tier 1")
            )
