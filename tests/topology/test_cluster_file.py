"""Cluster files: shapes that load, and malformed ones whose error names the line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.build import fabric_from_text, load_fabric
from topology.cabling import check_cabling
from topology.errors import TopologyError
from topology.hostlist import compress, expand

SHIPPED = Path(__file__).parents[2] / "configs/clusters/mi300x_128x8_rails.yaml"

GOOD = """name: small
nodes: {names: "n[0-3]", gpus: 4}
nics: {per_node: 4}
rails:
  count: 4
  leaves_per_rail: 2
  nodes_per_leaf: 2
  spines_per_rail: 1
"""

# What is wrong, what is added to GOOD (or replaced in it), the line that must be named, and the message.
ADDED = [
    ("unknown rail", "cabling:\n  - {node: n0, nic: 1, leaf: r1l0, rail: 9}", 10, "unknown rail"),
    ("switch rail", "switches:\n  - name: x\n    tier: leaf\n    rail: 7", 12, "unknown rail"),
    ("duplicate NIC", "cabling:\n  - {node: n0, nic: 1, leaf: r1l0}\n  - {node: n0, nic: 1, leaf: r1l1}", 11,
     "duplicate NIC"),
    ("two leaves", "cabling:\n  - {node: n0, nic: 1, leaf: r2l1}", 10, "two leaves of rail 2"),
    ("no xGMI rate", "scale_up:\n  link_gbps: 0", 10, "greater than 0"),
    ("cyclic spine", "switches:\n  - {name: a, tier: core, up: [b]}\n  - {name: b, tier: core, up: [a]}", 11,
     "cyclic spine: a -> b -> a"),
    ("unknown up-link", "switches:\n  - {name: a, tier: spine, up: [zz]}", 10, "unknown up-link"),
    ("unknown leaf", "cabling:\n  - {node: n0, nic: 1, leaf: nowhere}", 10, "unknown leaf"),
    ("other rail", "cabling:\n  - {node: n0, nic: 1, leaf: r2l0, rail: 1}", 10, "is on rail 2"),
    ("duplicate key", "name: again", 9, "duplicate key"),
    ("unknown node", "health:\n  nodes_down: [n9]", 10, "unknown node"),
    ("unknown NIC", "health:\n  nics_down:\n    - {node: n0, nic: 8}", 11, "unknown NIC"),
    ("not YAML", "x: [1, 2", 10, "not valid YAML"),
]  # fmt: skip
REPLACED = [
    ("zero bandwidth", "per_node: 4}", "per_node: 4, rate_gbps: 0}", 3, "greater than 0"),
    ("NIC pattern", "per_node: 4}", "per_node: 4, device: ionic}", 3, "must be a pattern with {nic}"),
    ("misspelt key", "leaves_per_rail", "leafs_per_rail", 6, "did you mean 'leaves_per_rail'"),
    ("too many nodes", "n[0-3]", "n[0-9]", 7, "do not fit"),
    ("NIC count", "per_node: 4}", "per_node: 3}", 1, "must divide"),
    ("bad host list", "n[0-3]", "n[3-0]", 2, "bad range"),
]
MALFORMED = [(name, f"{GOOD}{text}\n", line, message) for name, text, line, message in ADDED]
MALFORMED += [(name, GOOD.replace(old, new), line, message) for name, old, new, line, message in REPLACED]


@pytest.mark.parametrize(("text", "line", "message"), [case[1:] for case in MALFORMED], ids=[c[0] for c in MALFORMED])
def test_malformed_clusters_name_the_line(text: str, line: int, message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        fabric_from_text(text, "c.yaml")
    assert f"c.yaml:{line}:" in str(caught.value)
    assert message in str(caught.value)


def test_the_shipped_cluster_is_the_published_shape() -> None:
    fabric = load_fabric(SHIPPED)
    assert fabric.world_size == 1024 and fabric.rails == 8 and not fabric.rails_meet
    assert len(fabric.switches) == 8 * (4 + 4)
    assert len(np.unique(fabric.domain)) == 8, "one routing domain per rail"
    assert len(fabric.usable_nodes) == 128


@pytest.mark.parametrize(
    ("nodes", "rails", "leaves", "spine", "domains"),
    [(2, 8, 1, "per_rail", 8), (16, 8, 2, "shared", 1), (16, 8, 2, "none", 16), (4, 1, 1, "none", 1),
     (16384, 8, 128, "per_rail", 8)],
)  # fmt: skip
def test_other_shapes_load_the_same_way(nodes: int, rails: int, leaves: int, spine: str, domains: int) -> None:
    fabric = fabric_from_text(
        f"""
name: shape
nodes: {{names: "n[00000-{nodes - 1:05}]"}}
rails: {{count: {rails}, leaves_per_rail: {leaves}, nodes_per_leaf: {nodes // leaves}, spines_per_rail: 2,
        spine: {spine}}}
"""
    )
    assert fabric.world_size == nodes * 8
    assert len(np.unique(fabric.domain)) == domains


def test_a_swap_in_the_file_is_found_and_takes_the_node_out() -> None:
    swap = "cabling:\n  - {node: n1, nic: 1, leaf: r2l0}\n  - {node: n1, nic: 2, leaf: r1l0}\n"
    fabric = fabric_from_text(GOOD + swap)
    assert [f.message for f in check_cabling(fabric)] == ["NICs 1 and 2 are swapped; exchange their cables"]
    assert fabric.usable_nodes.tolist() == [0, 2, 3]
    moved = fabric_from_text(GOOD + "cabling:\n  - {node: n1, nic: 1, leaf: r1l1}\n")
    assert [f.code for f in check_cabling(moved)] == ["incongruent"]
    assert len(moved.usable_nodes) == 4, "the spine still joins both leaves of the rail"


def test_a_dead_nic_takes_its_node_out_and_says_why() -> None:
    fabric = fabric_from_text(GOOD + "health:\n  nics_down:\n    - {node: n1, nic: 2}\n")
    assert fabric.usable_nodes.tolist() == [0, 2, 3]
    assert fabric.why_unusable(1) == "NIC 2 is down"


def test_losing_all_spines_cuts_the_leaves_apart() -> None:
    fabric = load_fabric(SHIPPED).with_failures(switches=[f"r3s{spine}" for spine in range(4)])
    assert len(np.unique(fabric.domain[:, 3])) == 4
    assert len(fabric.usable_nodes) == 32, "one leaf of nodes still forms whole rows"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_give_user_errors_and_no_traceback(data: st.DataObject) -> None:
    lines = SHIPPED.read_text().splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(lines) - 1))
        what = data.draw(
            st.sampled_from(["", "[", "x: *y", "- 3", "count: -1", "names: 7", "  : :", "\x01", "? [a]: b"])
        )
        lines[where] = data.draw(st.sampled_from([what, lines[where] + what, what + lines[where].lstrip()]))
    try:
        fabric_from_text("\n".join(lines), "c.yaml")
    except TopologyError as error:
        assert str(error).startswith("c.yaml") and "\n" not in str(error)


@given(st.sets(st.integers(0, 200), min_size=1))
def test_host_lists_round_trip(numbers: set[int]) -> None:
    names = sorted(f"zaya{number:03}" for number in numbers)
    assert expand(compress(names)) == names


def test_host_lists_of_mixed_names() -> None:
    assert expand("login,a[01-03,7]x,b2") == ["login", "a01x", "a02x", "a03x", "a7x", "b2"]
