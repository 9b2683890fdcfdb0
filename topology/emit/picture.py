"""Pictures of the fabric under one placement: Graphviz, SVG, and an HTML page around the SVG.

Drawn per rail and leaf, not per cable: 128 x 8 cables are not a picture. Colours follow the share of a
leaf's nodes that the job uses. Invariant: the SVG needs no Graphviz and no network.
"""

from __future__ import annotations

from html import escape

import numpy as np

from topology.emit.links import LinkLoad, link_load
from topology.hostlist import compress
from topology.place import Placement

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def human(size_bytes: float) -> str:
    """Bytes for people."""
    for scale, unit in _UNITS:
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def _leaf_rows(placement: Placement) -> list[tuple[int, list[str], int]]:
    """(leaf position, its nodes, how many the job uses)."""
    fabric, used = placement.fabric, set(placement.slots.tolist())
    rows = []
    for group in np.unique(fabric.leaf_group):
        nodes = np.flatnonzero(fabric.leaf_group == group)
        rows.append((int(group), [fabric.node_names[n] for n in nodes], sum(int(n) in used for n in nodes.tolist())))
    return rows


def graphviz(placement: Placement) -> str:
    """A DOT graph: node sets, leaves per rail, spines; edges carry the bytes per step."""
    fabric, load = placement.fabric, link_load(placement)
    lines = ["graph fabric {", "  rankdir=BT; node [shape=box, fontname=Helvetica];"]
    rows = _leaf_rows(placement)
    for group, nodes, used in rows:
        lines.append(f'  nodes{group} [label="{compress(nodes)}\\n{used} of {len(nodes)} nodes used"];')
    seen: set[int] = set()
    for group, nodes, used in rows:
        node = fabric.node_index[nodes[0]]
        for nic in range(fabric.nics_per_node):
            leaf = int(fabric.leaf[node, nic])
            if leaf < 0:
                continue
            switch = fabric.switches[leaf]
            style = "" if fabric.switch_ok[leaf] else ", style=dashed, color=red"
            lines.append(f'  "{switch.name}" [label="{switch.name}\\nrail {switch.rail}"{style}];')
            lines.append(f'  nodes{group} -- "{switch.name}" [label="{human(load.nic_bytes * used)}"];')
            if leaf not in seen:
                seen.add(leaf)
                part = load.uplink_bytes.get(group, 0.0) / fabric.nics_per_node / max(1, len(switch.up))
                lines += [
                    f'  "{switch.name}" -- "{fabric.switches[up].name}" [label="{human(part)}"];' for up in switch.up
                ]
    return "\n".join([*dict.fromkeys(lines), "}"]) + "\n"


def svg(placement: Placement) -> str:
    """A self-contained SVG: one column per leaf position, one row per rail, spines on top of each row."""
    fabric, load, rows = placement.fabric, link_load(placement), _leaf_rows(placement)
    width, row_height, left = 190, 46, 70
    total = left + width * len(rows) + 20
    height = 60 + row_height * fabric.nics_per_node + 110
    title = f"{fabric.spec.name}: {placement.plan.describe()}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<text x="10" y="20" font-size="15">{escape(title)}</text>',
    ]
    for nic in range(fabric.nics_per_node):
        y = 40 + nic * row_height
        parts.append(f'<text x="10" y="{y + 20}">rail {fabric.nominal_rail(nic)}</text>')
        parts += [_leaf_box(placement, load, group, nodes, nic, left + i * width, y)
                  for i, (group, nodes, _) in enumerate(rows)]  # fmt: skip
    y = 40 + fabric.nics_per_node * row_height + 10
    for i, (_, nodes, used) in enumerate(rows):
        shade = 245 - int(110 * used / len(nodes))
        parts.append(
            f'<rect x="{left + i * width}" y="{y}" width="{width - 14}" height="44" rx="4" '
            f'fill="rgb({shade},{shade},255)" stroke="#446"/>'
            f'<text x="{left + i * width + 8}" y="{y + 18}">{escape(compress(nodes))}</text>'
            f'<text x="{left + i * width + 8}" y="{y + 36}">{used} of {len(nodes)} nodes used</text>'
        )
    parts.append(
        f'<text x="10" y="{y + 70}">per step: {human(load.nic_bytes)} on each NIC, '
        f"{human(load.xgmi_bytes)} on the xGMI links of each GPU, "
        f"{human(placement.cost.spine_bytes)} through spines</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _leaf_box(placement: Placement, load: LinkLoad, group: int, nodes: list[str], nic: int, x: int, y: int) -> str:
    fabric = placement.fabric
    leaf = int(fabric.leaf[fabric.node_index[nodes[0]], nic])
    name = fabric.switches[leaf].name if leaf >= 0 else "no cable"
    healthy = leaf >= 0 and bool(fabric.switch_ok[leaf])
    up = load.uplink_bytes.get(group, 0.0) / fabric.nics_per_node
    label = f"{name}: {human(up)} up" if healthy else f"{name}: DOWN"
    fill = "#efe" if healthy else "#fcc"
    return (
        f'<rect x="{x}" y="{y}" width="176" height="30" rx="4" fill="{fill}" stroke="#464"/>'
        f'<text x="{x + 8}" y="{y + 20}">{escape(label)}</text>'
    )


_PAGE = """<!doctype html> <html lang="en"><meta charset="utf-8"><title>{{ name }}</title>
<style>body{font-family:sans-serif;margin:2em}td,th{padding:2px
10px;text-align:right}td:first-child{text-align:left} </style> <h1>{{ name }}</h1><p>{{ plan }}.
Placement: {{ strategy }}. Predicted communication {{ "%.4f" % total_s }} s per step without overlap,
bound {{ "%.4f" % bound_s }} s.</p> {{ svg }} <h2>Flows of one step</h2>
<table><tr><th>group</th><th>operation</th><th>size</th><th>calls</th><th>nodes x ranks</th><th>time,
ms</th></tr> {% for c in flows %}<tr><td>{{ c.flow.kind }}</td><td>{{ c.flow.op }}</td><td>{{
human(c.flow.size_bytes) }}</td> <td>{{ c.flow.calls }}</td><td>{{ c.shape.nodes }} x {{ c.shape.per_node
}}</td> <td>{{ "%.3f" % (c.time_s * 1e3) }}</td></tr> {% endfor %}</table> <h2>Communicators</h2>
<table><tr><th>group</th><th>count</th><th>size</th><th>status</th></tr> {% for v in verdicts %}<tr><td>{{
v.kind }}</td><td>{{ v.groups }}</td><td>{{ v.size }}</td> <td>{{ status[v.status] }}</td></tr> {% endfor
%}</table></html>
"""


def html(placement: Placement) -> str:
    """The SVG with the tables of flows and verdicts, as one page."""
    from jinja2 import Environment
    from markupsafe import Markup

    from topology.legality import STATUS

    template = Environment(autoescape=True, keep_trailing_newline=True).from_string(_PAGE)
    return template.render(
        name=placement.fabric.spec.name,
        plan=placement.plan.describe(),
        strategy=placement.strategy,
        total_s=placement.cost.total_s,
        bound_s=placement.bound_s,
        svg=Markup(svg(placement)),
        flows=placement.cost.flows,
        verdicts=placement.verdicts,
        status=STATUS,
        human=human,
    )
