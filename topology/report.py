"""Human-readable output of the command line: tables and short paragraphs.

Invariant: no decision is taken here; every number comes from the functions that JSON output uses too.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from topology.cabling import Finding
from topology.cost import GroupShape
from topology.emit.picture import human
from topology.fabric import Fabric
from topology.fit import Point, mean_error
from topology.hostlist import compress
from topology.legality import STATUS, Verdict
from topology.lint import Issue
from topology.place import Placement
from topology.whatif import Outcome

MIB = 1 << 20


def table(title: str, *columns: str) -> Table:
    """An empty table; columns that start with `>` are right-aligned."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return made


def show_fabric(console: Console, fabric: Fabric, findings: list[Finding], switches: bool) -> None:
    """Size, rails, rates, health and cabling of a cluster."""
    spec, rails = fabric.spec, fabric.spec.rails
    meets = "rails meet on a shared layer" if fabric.rails_meet else "rails never meet"
    switch = f", {rails.switch_model}" if rails.switch_model else ""
    console.print(
        f"{spec.name}: {fabric.nodes} nodes x {fabric.gpus_per_node} {spec.nodes.gpu_model} = "
        f"{fabric.world_size} GPUs; {fabric.rails} rails x {rails.leaves_per_rail} leaves of up to "
        f"{rails.nodes_per_leaf} nodes, {rails.spines_per_rail} spines ({meets}){switch}"
    )
    console.print(
        f"per GPU: NIC {spec.nics.rate_gbps:g} Gb/s ({spec.nics.model}); {spec.scale_up.kind} "
        f"{fabric.link_bytes_per_s / 1e9:g} GB/s usable per link; up-link ratio {rails.uplink_ratio:g}"
    )
    if spec.storage:
        console.print(f"storage network: {spec.storage.model} {spec.storage.rate_gbps:g} Gb/s, separate")
    unusable = [n for n in range(fabric.nodes) if fabric.why_unusable(n)]
    console.print(f"usable nodes: {fabric.nodes - len(unusable)} of {fabric.nodes}")
    for node in unusable[:20]:
        console.print(f"  {fabric.node_names[node]}: {fabric.why_unusable(node)}")
    for note in fabric.notes:
        console.print(f"note: {note}")
    for finding in findings:
        console.print(f"cabling {finding.code}: {finding.host}: {finding.message}")
    console.print("cabling: congruent on all rails" if not findings else f"cabling: {len(findings)} findings")
    if switches:
        down = {s.name for i, s in enumerate(fabric.switches) if not fabric.switch_ok[i]}
        for tier in ("leaf", "spine", "core"):
            names = [s.name for s in fabric.switches if s.tier == tier]
            if names:
                console.print(f"{tier}: {', '.join(names)}")
        if down:
            console.print(f"down: {', '.join(sorted(down))}")


def show_verdicts(console: Console, verdicts: list[Verdict] | tuple[Verdict, ...]) -> None:
    """One line per kind of communicator, then the proofs of what is illegal and the hazards."""
    rows = table("communicators", "group", ">count", ">size", "status", "legal", "purpose")
    for v in verdicts:
        rows.add_row(
            v.kind,
            str(v.groups),
            str(v.size),
            STATUS[v.status],
            "yes" if v.legal else "NO",
            v.purpose,
        )
    console.print(rows)
    for v in verdicts:
        if not v.legal:
            console.print(f"ILLEGAL {v.kind}: {v.setting}")
            if v.witness:
                console.print(f"  proof: {v.witness.describe()}")
        elif v.witness:
            console.print(f"{v.kind}: for example {v.witness.describe()}")
    for hazard in dict.fromkeys(hazard for v in verdicts for hazard in v.hazards):
        kinds = ", ".join(v.kind for v in verdicts if hazard in v.hazards)
        console.print(f"hazard ({kinds}): {hazard}")


def show_costs(console: Console, title: str, rows: list[dict[str, float]]) -> None:
    """Times and bus bandwidths of one operation over sizes."""
    made = table(title, ">size", ">time, us", ">from", ">to", ">bus GB/s")
    for row in rows:
        times = [f"{row[key]:.2f}" for key in ("time_us", "low_us", "high_us")]
        made.add_row(human_binary(row["size_bytes"]), *times, f"{row['bus_gb_per_s']:.2f}")
    console.print(made)


def human_binary(size_bytes: float) -> str:
    """Power-of-two sizes as in rccl-tests: 1M is 1048576."""
    for scale, unit in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size_bytes >= scale:
            return f"{size_bytes / scale:g}{unit}"
    return f"{size_bytes:g}"


def show_placement(console: Console, placement: Placement) -> None:
    """Where the job goes, what a step costs, and how far that is from the bound."""
    cost, bound = placement.cost.total_s, placement.bound_s
    gap = (cost / bound - 1) * 100 if bound else 0.0
    console.print(placement.plan.describe())
    console.print(f"order: {placement.strategy}; rank 0 on {placement.master}; hosts in rank order:")
    hosts = placement.hosts
    console.print(compress(hosts) if hosts == sorted(hosts) else ",".join(hosts[:8]) + f",... ({len(hosts)})")
    console.print(f"predicted communication {cost * 1e3:.3f} ms per step, bound {bound * 1e3:.3f} ms (+{gap:.3f} %)")
    flows = table("flows", "group", "operation", ">size", ">calls", ">nodes", ">per node", ">spine hops", ">ms")
    for c in placement.cost.flows:
        flows.add_row(
            c.flow.kind,
            c.flow.op,
            human(c.flow.size_bytes),
            str(c.flow.calls),
            str(c.shape.nodes),
            str(c.shape.per_node),
            str(c.shape.spine_hops),
            f"{c.time_s * 1e3:.3f}",
        )
    console.print(flows)
    names = placement.fabric.node_names
    spares = compress(names[n] for n in placement.spares) or "none"
    console.print(f"spare nodes ({len(placement.spares)}): {spares}")
    for node, reason in placement.excluded[:20]:
        console.print(f"excluded {names[node]}: {reason}")
    if len(placement.excluded) > 20:
        console.print(f"... and {len(placement.excluded) - 20} more")


def show_outcomes(console: Console, outcomes: list[Outcome]) -> None:
    """What still works per failure."""
    rows = table("what still works", "failure", ">usable nodes", "outcome")
    for outcome in outcomes:
        failed = ", ".join(f.describe() for f in outcome.failures)
        rows.add_row(failed, str(outcome.usable_nodes), outcome.describe())
    console.print(rows)


def show_issues(console: Console, issues: list[Issue]) -> None:
    """Lint findings with evidence and source."""
    for issue in issues:
        console.print(f"{issue.severity.upper()} {issue.rule} (x{issue.count}): {issue.message}")
        if issue.where:
            console.print(f"  {issue.where.file}:{issue.where.line}: {issue.where.text}")
        console.print(f"  see {issue.source}")
    errors = sum(issue.severity == "error" for issue in issues)
    console.print(f"{errors} errors, {len(issues) - errors} warnings and notes")


def show_fit(console: Console, fitted: dict[str, float], points: list[Point]) -> None:
    """Parameters, then every calibration point with its error."""
    used = [p for p in points if p.curve.use == "fit"]
    console.print(f"{len(fitted)} fitted parameters, {len(used)} calibration points:")
    for name, value in fitted.items():
        console.print(f"  {name} = {value:.4g}")
    rows = table("points", "use", "curve", ">size", ">measured, us", ">model, us", ">error, %")
    for p in points:
        rows.add_row(
            p.curve.use,
            p.curve.name,
            human_binary(p.size_bytes),
            f"{p.measured_s * 1e6:.2f}",
            f"{p.predicted_s * 1e6:.2f}",
            f"{p.error * 100:+.2f}",
        )
    console.print(rows)
    console.print(
        f"mean error of the fitted points: {mean_error(used) * 100:.2f} %; of 1 MiB and more: "
        f"{mean_error(used, MIB) * 100:.2f} %. `check` points are predictions; a `floor` is an acceptance "
        "threshold in us, which a time should stay below (negative error). flat_congestion and "
        "dispatch_exposed rest on one point each."
    )


def describe_shape(op: str, shape: GroupShape) -> str:
    """Title of a cost table."""
    return f"{op}, {shape.nodes} nodes x {shape.per_node} ranks (from/to: range of the bulk start-up only)"
