"""The RCCL and runtime environment of a plan, each variable with reason, source and version gate.

The table is `topology/data/environment.yaml`. Invariant: two entries for one variable never apply at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict

from topology.fabric import Fabric
from topology.legality import RELAY, UNEVEN_ROWS, Verdict
from topology.parameters import DATA, version_matches
from topology.yamlio import read


class Entry(BaseModel):
    """One line of the table: a variable (`name`, `value`) or a known defect (`id`, `text`, `remedy`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    name: str = ""
    value: str = ""
    reason: str = ""
    disputed: str = ""
    id: str = ""
    text: str = ""
    remedy: str = ""
    when: list[str] = []
    rocm: str = ""
    rccl: str = ""


@dataclass(frozen=True)
class Variable:
    """A variable that applies, with its explanation."""

    name: str
    value: str
    reason: str
    source: str
    gate: str
    disputed: str


@cache
def table(section: str) -> tuple[Entry, ...]:
    """Entries of one section of the table: `variables` or `defects`."""
    document = read(DATA / "environment.yaml")
    return tuple(document.validate(Entry, (section, i)) for i in range(len(document.data[section])))


def plan_facts(fabric: Fabric, verdicts: list[Verdict] | tuple[Verdict, ...]) -> set[str]:
    """The conditions of the table that hold for this fabric and these groups."""
    relay = any(v.status == RELAY for v in verdicts) and not fabric.rails_meet
    facts = {"relay" if relay else "no_relay"}
    facts |= set() if fabric.rails_meet else {"rails_apart"}
    facts |= {"ainic"} if fabric.spec.software.ainic else set()
    facts |= {"spines"} if fabric.spec.rails.leaves_per_rail > 1 else {"single_leaf"}
    facts |= {"multi_node"} if any(v.status > 0 for v in verdicts) else set()
    facts |= {"uneven_rows"} if any(UNEVEN_ROWS in v.hazards for v in verdicts) else set()
    return facts


def _applies(entry: Entry, fabric: Fabric, facts: set[str]) -> bool:
    software = fabric.spec.software
    return (
        set(entry.when) <= facts
        and version_matches(software.rocm, entry.rocm)
        and version_matches(software.rccl, entry.rccl)
    )


def environment(fabric: Fabric, verdicts: list[Verdict] | tuple[Verdict, ...]) -> list[Variable]:
    """All variables that apply, in table order."""
    facts = plan_facts(fabric, verdicts)
    software = fabric.spec.software
    nics = range(fabric.nics_per_node)
    fill: dict[str, Any] = {
        "hca": ",".join(fabric.spec.nics.device.format(nic=nic) for nic in nics),
        "socket": software.socket_interface,
        "gid": software.gid_index,
        "tc": software.traffic_class,
        "fifo_tc": software.fifo_traffic_class,
        "relay_kinds": ", ".join(v.kind for v in verdicts if v.status == RELAY),
    }
    found = []
    for entry in table("variables"):
        if _applies(entry, fabric, facts):
            gates = [f"{n} {c}" for n, c in (("ROCm", entry.rocm), ("RCCL", entry.rccl)) if c]
            value, reason = entry.value.format(**fill), entry.reason.format(**fill)
            found.append(
                Variable(entry.name, value, reason, entry.source, ", ".join(gates) or "any version", entry.disputed)
            )
    return found


def known_defects(fabric: Fabric, verdicts: list[Verdict] | tuple[Verdict, ...]) -> list[Entry]:
    """Known defects of the installed versions that touch this plan."""
    facts = plan_facts(fabric, verdicts)
    return [entry for entry in table("defects") if _applies(entry, fabric, facts)]


def environment_file(fabric: Fabric, verdicts: list[Verdict] | tuple[Verdict, ...]) -> str:
    """A file to source: `export NAME=value` under comment lines that explain it."""
    software = fabric.spec.software
    lines = [f"# RCCL environment for {fabric.spec.name}: ROCm {software.rocm}, RCCL {software.rccl}."]
    for defect in known_defects(fabric, verdicts):
        lines += ["", f"# KNOWN DEFECT {defect.id}: {defect.text}", f"#   remedy: {defect.remedy}"]
        lines.append(f"#   source: {defect.source}")
    for variable in environment(fabric, verdicts):
        lines += ["", f"# {variable.reason}", f"#   source: {variable.source}; gate: {variable.gate}"]
        if variable.disputed:
            lines.append(f"#   disputed: {variable.disputed}")
        lines.append(f"export {variable.name}={variable.value}")
    return "\n".join(lines) + "\n"
