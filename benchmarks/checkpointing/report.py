"""From the figures of all rounds to medians, ratios and the verdict on each goal."""

from __future__ import annotations

import statistics
from typing import Any

GOALS = {
    "stall / memcpy bound": (1.25, "at most"),
    "stall / memcpy bound, warm memory": (1.25, "at most"),
    "stall of dcp_async / ours": (4.0, "at least"),
    "durable: share of raw write": (0.85, "at least"),
    "durable of mcore_fully_parallel / ours": (3.0, "at least"),
    "cpu seconds per GB": (0.6, "at most"),
    "load: share of raw read": (0.8, "at least"),
    "load: share of raw read, large pages": (0.8, "at least"),
    "load of dcp_sync / ours": (2.5, "at least"),
    "reshard: share of raw read": (0.7, "at least"),
    "reshard: share of raw read, large pages": (0.7, "at least"),
    "reshard of dcp_sync / ours": (2.5, "at least"),
}


def median(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.median(values) if values else None


def summarise(first: dict, second: dict, names: list[str]) -> dict[str, Any]:
    unique, bounds = first["bytes_unique"], first["bounds"]
    bound = {key: statistics.median(b[key] for b in bounds) for key in bounds[0]}
    raw_one, raw_one_large = (statistics.median(column) for column in zip(*second["raw_read_s"], strict=True))
    methods = {}
    for name in names:
        rows = first["figures"][name]
        reshard = [value for value in second["figures"][name] if value is not None]
        methods[name] = {key: median(rows, key) for key in ("stall_s", "durable_s", "cpu_s", "load_s")} | {
            "reshard_s": statistics.median(reshard) if reshard else None,
            "rounds": rows,
        }
    ours = methods["ours"]

    def of_bound(key: str) -> float:
        """Return the median over rounds of our stall as a multiple of that round's copy."""
        return statistics.median(row["stall_s"] / b[key] for row, b in zip(ours["rounds"], bounds, strict=True))

    def ratio(method: str, key: str) -> float | None:
        other = methods.get(method, {}).get(key)
        return None if other is None else other / ours[key]

    reached = {
        "stall / memcpy bound": of_bound("memcpy_s"),
        "stall / memcpy bound, warm memory": of_bound("memcpy_warm_s"),
        "stall of dcp_async / ours": ratio("dcp_async", "stall_s"),
        "durable: share of raw write": bound["write_s"] / ours["durable_s"],
        "durable of mcore_fully_parallel / ours": ratio("mcore_fully_parallel", "durable_s"),
        "cpu seconds per GB": ours["cpu_s"] / (unique / 1e9),
        "load: share of raw read": bound["read_s"] / ours["load_s"],
        "load: share of raw read, large pages": bound["read_large_pages_s"] / ours["load_s"],
        "load of dcp_sync / ours": ratio("dcp_sync", "load_s"),
        "reshard: share of raw read": raw_one / ours["reshard_s"],
        "reshard: share of raw read, large pages": raw_one_large / ours["reshard_s"],
        "reshard of dcp_sync / ours": ratio("dcp_sync", "reshard_s"),
    }
    goals = {}
    for name, value in reached.items():
        goal, sense = GOALS[name]
        met = None if value is None else (value <= goal if sense == "at most" else value >= goal)
        goals[name] = {"reached": value, "goal": f"{sense} {goal}", "met": met}
    return {
        "methods": methods,
        "limits_rounds": bounds,
        "limits": bound | {"read_one_rank_s": raw_one, "read_one_rank_large_pages_s": raw_one_large},
        "goals": goals,
    }


def print_table(result: dict[str, Any]) -> None:
    columns = ("stall_s", "durable_s", "cpu_s", "load_s", "reshard_s")
    print(f"{'':22}" + "".join(f"{c:>12}" for c in columns))
    for name, figures in result["methods"].items():
        cells = ("-" if figures[c] is None else f"{figures[c]:.3f}" for c in columns)
        print(f"{name:22}" + "".join(f"{cell:>12}" for cell in cells) + f"   {len(figures['rounds'])} rounds")
    print("limits:", ", ".join(f"{key} {value:.3f}" for key, value in result["limits"].items()))
    for name, goal in result["goals"].items():
        value = "-" if goal["reached"] is None else f"{goal['reached']:.2f}"
        verdict = {True: "reached", False: "NOT reached", None: "not measured"}[goal["met"]]
        print(f"{name:42} {value:>8}   goal: {goal['goal']:14} {verdict}")
