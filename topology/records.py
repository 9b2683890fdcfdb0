"""What `--json` prints: the answers of the commands as plain data.

Invariant: names carry units, and every value comes from the function that the printed text uses too.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from topology.cabling import Finding
from topology.fabric import Fabric
from topology.fit import Point, mean_error
from topology.legality import STATUS, Verdict
from topology.plan import Plan
from topology.whatif import Outcome

MIB = 1 << 20


def fabric_record(fabric: Fabric, findings: list[Finding]) -> dict[str, Any]:
    """Answer of `show`."""
    reasons = {name: fabric.why_unusable(node) for node, name in enumerate(fabric.node_names)}
    return {
        "name": fabric.spec.name,
        "nodes": fabric.nodes,
        "world_size": fabric.world_size,
        "rails": fabric.rails,
        "rails_meet": fabric.rails_meet,
        "switches": len(fabric.switches),
        "usable_nodes": len(fabric.usable_nodes),
        "unusable": {name: reason for name, reason in reasons.items() if reason},
        "cabling": [asdict(finding) for finding in findings],
        "notes": list(fabric.notes),
    }


def verdict_record(plan: Plan, verdicts: list[Verdict], better: Plan | None) -> dict[str, Any]:
    """Answer of `verify`."""
    rows = [
        {
            **asdict(v),
            "status": STATUS[v.status],
            "legal": v.legal,
            "setting": v.setting,
            "counts": list(v.counts),
        }
        for v in verdicts
    ]
    return {
        "plan": plan.describe(),
        "legal": all(v.legal for v in verdicts),
        "communicators": rows,
        "nearest_legal_plan": better.describe() if better else None,
    }


def outcome_record(outcome: Outcome) -> dict[str, Any]:
    """One answer of `whatif`; `slowdown` is None when nothing runs."""
    placement = outcome.placement
    return {
        "failures": [failure.describe() for failure in outcome.failures],
        "usable_nodes": outcome.usable_nodes,
        "runs": placement is not None,
        "keeps_plan": outcome.keeps_plan,
        "world_size": placement.plan.world_size if placement else 0,
        "slowdown": outcome.slowdown if placement else None,
        "text": outcome.describe(),
    }


def fit_record(fitted: dict[str, float], points: list[Point]) -> dict[str, Any]:
    """Answer of `fit`; errors are relative and signed."""
    used = [p for p in points if p.curve.use == "fit"]
    return {
        "parameters": fitted,
        "fitted_parameters": len(fitted),
        "points": [
            {"curve": p.curve.name, "use": p.curve.use, "size_bytes": p.size_bytes, "error": p.error} for p in points
        ],
        "mean_error": mean_error(used),
        "mean_error_from_1_mib": mean_error(used, MIB),
    }
