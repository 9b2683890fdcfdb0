"""The legality rule against brute force: a search over an explicit graph of GPUs, NICs and switches."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.build import fabric_from_text, load_fabric
from topology.fabric import Fabric
from topology.groups import GroupSet, derive_groups
from topology.legality import INSIDE, RELAY, SAME_RAIL, UNREACHABLE, judge, nearest_legal_plan, verify
from topology.plan import Plan

SHIPPED = Path(__file__).parents[2] / "configs/clusters/mi300x_128x8_rails.yaml"


def cluster(nodes: int, gpus: int, rails: int, *, spine: str = "per_rail", leaves: int = 2, extra: str = "") -> Fabric:
    return fabric_from_text(
        f"""
name: small
nodes: {{names: "n[0-{nodes - 1}]", gpus: {gpus}}}
nics: {{per_node: {gpus}}}
rails: {{count: {rails}, leaves_per_rail: {leaves}, nodes_per_leaf: {-(-nodes // leaves)},
         spines_per_rail: 2, spine: {spine}}}
{extra}
"""
    )


def brute_force(fabric: Fabric, members: list[int], pxn: bool) -> bool:
    """Walk the cables: GPU, own NIC, switches, NIC, GPU; with PXN one hop to a member GPU may come first."""
    wires = nx.Graph()
    for i, switch in enumerate(fabric.switches):
        if fabric.switch_ok[i]:
            wires.add_node(("switch", i))
            wires.add_edges_from((("switch", i), ("switch", up)) for up in switch.up if fabric.switch_ok[up])
    for node, nic in product(range(fabric.nodes), range(fabric.nics_per_node)):
        wires.add_node(("nic", node, nic))
        leaf = int(fabric.leaf[node, nic])
        if leaf >= 0 and fabric.nic_ok[node, nic] and fabric.node_ok[node] and fabric.switch_ok[leaf]:
            wires.add_edge(("nic", node, nic), ("switch", leaf))

    def nic(rank: int) -> tuple[str, int, int]:
        node, gpu = divmod(rank, fabric.gpus_per_node)
        return "nic", node, fabric.nic_of_gpu(gpu)

    def direct(a: int, b: int) -> bool:
        return nic(a) != nic(b) and nx.has_path(wires, nic(a), nic(b))

    for a, b in product(members, members):
        if a // fabric.gpus_per_node == b // fabric.gpus_per_node:
            continue
        peers = [c for c in members if c // fabric.gpus_per_node == a // fabric.gpus_per_node]
        if not (direct(a, b) or (pxn and any(direct(c, b) for c in peers))):
            return False
    return True


@st.composite
def fabrics_and_groups(draw: st.DrawFn) -> tuple[Fabric, list[int], bool]:
    nodes, gpus = draw(st.integers(2, 5)), draw(st.sampled_from([2, 4]))
    rails = draw(st.sampled_from([r for r in (1, 2, 4) if r <= gpus]))
    spine = draw(st.sampled_from(["per_rail", "shared", "none"]))
    fabric = cluster(nodes, gpus, rails, spine=spine, leaves=draw(st.integers(1, 2)))
    names = [switch.name for switch in fabric.switches]
    fabric = fabric.with_failures(
        nodes=draw(st.lists(st.sampled_from(fabric.node_names), max_size=1)),
        nics=draw(st.lists(st.tuples(st.sampled_from(fabric.node_names), st.integers(0, gpus - 1)), max_size=2)),
        switches=draw(st.lists(st.sampled_from(names), max_size=3)),
    )
    members = draw(st.lists(st.integers(0, fabric.world_size - 1), min_size=1, max_size=8, unique=True))
    return fabric, members, draw(st.booleans())


@settings(max_examples=300, deadline=None)
@given(fabrics_and_groups())
def test_the_rule_equals_brute_force_reachability(case: tuple[Fabric, list[int], bool]) -> None:
    fabric, members, pxn = case
    groups = GroupSet("dp", np.array([members]))
    verdict = judge(fabric, np.arange(fabric.nodes), groups, pxn)
    assert verdict.legal == brute_force(fabric, members, pxn)
    if not verdict.legal:  # the witness must be a pair that really cannot talk
        assert verdict.witness is not None
        pair = [verdict.witness.source, verdict.witness.target]
        if verdict.status == UNREACHABLE:
            whole = [m for m in members if m // fabric.gpus_per_node == pair[0] // fabric.gpus_per_node]
            assert not brute_force(fabric, sorted({*whole, pair[1]}), True)
        else:
            assert not brute_force(fabric, pair, False)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2, 4, 8]),
)
def test_every_group_of_a_plan_equals_brute_force(tp: int, cp: int, pp: int, ep: int) -> None:
    fabric = cluster(6, 4, 4)
    try:
        plan = Plan(
            world_size=24,
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=1,
        )
    except ValueError:
        return
    for kind, groups in derive_groups(plan).items():
        verdict = judge(fabric, np.arange(6), groups, pxn=True)
        assert verdict.legal == all(brute_force(fabric, row, True) for row in groups.ranks.tolist()), kind


def statuses(fabric: Fabric, plan: Plan) -> dict[str, int]:
    return {verdict.kind: verdict.status for verdict in verify(fabric, plan)}


def test_the_default_order_keeps_data_parallel_groups_on_one_rail() -> None:
    plan = Plan(world_size=1024, tensor_model_parallel_size=2, context_parallel_size=4, pipeline_model_parallel_size=4)
    found = statuses(load_fabric(SHIPPED), plan)
    assert found["tp"] == found["cp"] == INSIDE
    assert found["dp"] == found["pp"] == found["embd"] == SAME_RAIL
    assert found["mp"] == found["world"] == RELAY


def test_two_node_expert_groups_need_the_relay() -> None:
    fabric = load_fabric(SHIPPED)
    plan = Plan(world_size=1024, expert_model_parallel_size=16)
    on = {v.kind: v for v in verify(fabric, plan, pxn=True)}
    off = {v.kind: v for v in verify(fabric, plan, pxn=False)}
    assert on["ep"].legal and not off["ep"].legal
    assert "NCCL_PXN_DISABLE=0" in off["ep"].setting
    assert off["ep_dp"].legal, "a single-rail group needs no relay"


def test_a_pipeline_stride_that_is_no_multiple_of_eight_breaks_the_embedding_group() -> None:
    fabric = load_fabric(SHIPPED)
    plan = Plan(world_size=48, pipeline_model_parallel_size=4, tensor_model_parallel_size=4)
    verdict = {v.kind: v for v in verify(fabric, plan)}["embd"]
    assert verdict.status == UNREACHABLE and verdict.witness is not None
    assert verdict.witness.source_rail != verdict.witness.target_rail
    better = nearest_legal_plan(fabric, plan, np.arange(6), pxn=True)
    assert better is not None and all(v.legal for v in verify(fabric, better))


def test_rail_optimised_and_single_switch_fabrics_carry_what_rails_only_cannot() -> None:
    plan = Plan(world_size=24, pipeline_model_parallel_size=12)
    assert not all(v.legal for v in verify(cluster(6, 4, 4), plan))
    assert all(v.legal for v in verify(cluster(6, 4, 4, spine="shared"), plan, pxn=False))
    assert all(v.legal for v in verify(cluster(6, 4, 1, leaves=1), plan, pxn=False))


def test_uneven_rows_are_called_out() -> None:
    fabric = cluster(2, 4, 4, spine="shared")
    verdict = judge(fabric, np.arange(2), GroupSet("dp", np.array([[0, 1, 2, 3, 4]])), pxn=True)
    assert any("RAIL_TREES" in hazard for hazard in verdict.hazards)


@pytest.mark.parametrize("nodes", [1, 127, 128])
def test_plain_data_parallelism_is_legal_at_any_node_count(nodes: int) -> None:
    plan = Plan(world_size=nodes * 8, expert_model_parallel_size=8)
    assert all(v.legal for v in verify(load_fabric(SHIPPED), plan))
