"""Placement: whole leaves, degraded fabrics, the bound, spares, and what still works after failures."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.build import fabric_from_text, load_fabric
from topology.cost import CostModel
from topology.emit.links import link_load
from topology.errors import TopologyError
from topology.fabric import Fabric
from topology.place import place
from topology.plan import Plan
from topology.traffic import StepModel, step_flows
from topology.whatif import Failure, parse_failure, single_failures, what_if

SHIPPED = Path(__file__).parents[2] / "configs/clusters/mi300x_128x8_rails.yaml"
FULL = Plan(world_size=1024, expert_model_parallel_size=16, pipeline_model_parallel_size=4)


def fabric(ratio: float = 1.0) -> Fabric:
    return fabric_from_text(SHIPPED.read_text().replace("uplink_ratio: 1.0", f"uplink_ratio: {ratio}"))


def small(leaf_sizes: int, leaves: int, down: str = "[]") -> Fabric:
    return fabric_from_text(
        f"""
name: small
nodes: {{names: "n[0-{leaf_sizes * leaves - 1}]", gpus: 2}}
nics: {{per_node: 2}}
rails: {{count: 2, leaves_per_rail: {leaves}, nodes_per_leaf: {leaf_sizes}, spines_per_rail: 1,
         uplink_ratio: 0.25, switch_latency_s: 1.0e-5}}
health: {{nodes_down: {down}}}
"""
    )


def test_the_full_cluster_meets_its_bound() -> None:
    found = place(load_fabric(SHIPPED), FULL)
    assert sorted(found.slots.tolist()) == list(range(128))
    assert found.bound_s <= found.cost.total_s <= found.bound_s * 1.001


@settings(max_examples=20, deadline=None)
@given(
    st.sets(st.integers(0, 127), max_size=9),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 8, 16]),
    st.sampled_from([0.25, 1.0]),
)
def test_degraded_clusters_use_healthy_nodes_once_and_respect_the_bound(
    down: set[int], pp: int, ep: int, ratio: float
) -> None:
    damaged = fabric(ratio).with_failures(nodes=[f"zaya{n:03}" for n in down])
    plan = Plan(world_size=1024, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep)
    found = place(damaged, plan, shrink=True)
    slots = found.slots.tolist()
    assert len(set(slots)) == len(slots) == found.plan.world_size // 8
    assert not set(slots) & down
    assert set(slots) | set(found.spares) == set(range(128)) - down
    assert {node for node, _ in found.excluded} == down
    assert found.bound_s <= found.cost.total_s * (1 + 1e-9)
    in_order = StepModel(damaged, found.plan, CostModel.for_fabric(damaged)).price(damaged.usable_nodes[: len(slots)])
    assert found.cost.total_s <= in_order.total_s * (1 + 1e-9)


def test_127_nodes_and_a_dead_nic_and_a_drained_leaf() -> None:
    base = load_fabric(SHIPPED)
    plan = Plan(world_size=1024, expert_model_parallel_size=8)
    odd = place(base.with_failures(nodes=["zaya009"]), plan, shrink=True)
    assert odd.plan.world_size == 1016 and odd.plan.edp == 127
    nic = place(base.with_failures(nics=[("zaya009", 5)]), plan, shrink=True)
    assert nic.plan.world_size == 1016 and nic.excluded == ((9, "NIC 5 is down"),)
    leaf = place(base.with_failures(switches=["r4l2"]), plan, shrink=True)
    assert leaf.plan.world_size == 768 and len(leaf.excluded) == 32
    assert "leaf r4l2 is down" in leaf.excluded[0][1]


@pytest.mark.parametrize(("ratio", "kept"), [(1.0, "dp_cp"), (0.25, "pp")])
def test_the_groups_that_matter_most_are_kept_inside_leaves(ratio: float, kept: str) -> None:
    damaged = fabric(ratio).with_failures(nodes=["zaya000"])
    plan = Plan(world_size=31 * 4 * 8, pipeline_model_parallel_size=4)
    found = place(damaged, plan)
    naive = StepModel(damaged, plan, CostModel.for_fabric(damaged)).price(damaged.usable_nodes[:124])
    assert found.cost.total_s < naive.total_s
    shapes = [cost.shape for cost in found.cost.flows if cost.flow.kind == kept]
    assert shapes and all(shape.spine_hops == 0 for shape in shapes)


def test_the_search_finds_the_optimum_of_small_fabrics() -> None:
    cluster = small(3, 2, down="[n2]")
    plan = Plan(world_size=8, pipeline_model_parallel_size=2)
    model = StepModel(cluster, plan, CostModel.for_fabric(cluster))
    best = min(model.price(np.array(order)).total_s for order in permutations(cluster.usable_nodes.tolist(), 4))
    assert place(cluster, plan).cost.total_s == pytest.approx(best, rel=2e-3)


def test_spares_and_avoided_nodes() -> None:
    found = place(load_fabric(SHIPPED), Plan(world_size=32 * 8), avoid=("zaya000",))
    assert 0 not in found.slots and len(found.spares) == 128 - 32 - 1
    assert len(set(found.fabric.leaf_group[found.slots].tolist())) == 1, "32 nodes fit one leaf"


def test_too_large_plans_say_how_much_fits() -> None:
    damaged = load_fabric(SHIPPED).with_failures(nodes=["zaya000"])
    with pytest.raises(TopologyError, match=r"needs 128 nodes, 127 of 128 are usable.*--shrink"):
        place(damaged, FULL)
    with pytest.raises(TopologyError, match="whole nodes"):
        place(load_fabric(SHIPPED), Plan(world_size=12))


def test_illegal_plans_are_not_placed() -> None:
    plan = Plan(world_size=48, pipeline_model_parallel_size=4, tensor_model_parallel_size=4)
    with pytest.raises(TopologyError, match=r"group \w+ is illegal .*rank \d+"):
        place(load_fabric(SHIPPED), plan)


def test_congested_uplinks_slow_the_groups_that_cross_them() -> None:
    plan = Plan(world_size=1024, pipeline_model_parallel_size=4)
    slots = np.arange(128).reshape(4, 32).T.ravel()  # every ring visits all leaves at every step
    free, tight = (StepModel(f, plan, CostModel.for_fabric(f)).price(slots) for f in (fabric(1.0), fabric(0.1)))
    assert tight.total_s > 2 * free.total_s


def test_flows_of_a_step_have_the_sizes_of_the_model() -> None:
    plan = Plan(world_size=1024, expert_model_parallel_size=8)
    flows = {(flow.kind, flow.op): flow for flow in step_flows(plan)}
    w = plan.workload
    assert flows["ep_dp", "reduce_scatter"].size_bytes == w.expert_parameters / 8 * 4
    assert flows["dp_cp", "all_gather"].size_bytes == w.dense_parameters * 2
    assert flows["ep", "dispatch"].calls == 4 * w.num_layers
    assert ("pp", "send_recv") not in flows


def test_link_loads_add_up() -> None:
    found = place(load_fabric(SHIPPED), FULL)
    load = link_load(found)
    assert sum(load.uplink_bytes.values()) == pytest.approx(found.cost.spine_bytes)
    w = found.plan.workload
    dispatched = 4 * w.num_layers * 4 * w.seq_length * w.hidden_size * w.activation_bytes  # 4 microbatches / 4 stages
    by_kind = {cost.flow.kind: cost for cost in found.cost.flows}
    ep = by_kind["ep"]
    assert ep.network_bytes / ep.shape.ranks == pytest.approx(dispatched / 4 / 2), "half of the tokens leave the node"
    assert load.nic_bytes > ep.network_bytes / ep.shape.ranks and load.xgmi_bytes > 0


def test_what_if_keeps_shrinks_or_refuses() -> None:
    base = load_fabric(SHIPPED)
    before = place(base, FULL)
    spine = what_if(base, FULL, (Failure("switch", "r0s0"),), before)
    assert spine.keeps_plan and spine.slowdown == pytest.approx(1.0, abs=0.01)
    node = what_if(base, FULL, (Failure("node", "zaya001"),), before)
    assert node.placement is not None and node.placement.plan.world_size == 960
    spared = Plan(world_size=512)
    kept = what_if(base, spared, (Failure("node", "zaya001"),), place(base, spared))
    assert kept.keeps_plan and kept.placement is not None and 1 not in kept.placement.slots
    everything = tuple(Failure("node", name) for name in base.node_names)
    dead = what_if(base, FULL, everything, before)
    assert dead.placement is None and "nothing runs" in dead.describe()
    assert [case[0].kind for case in single_failures(base)] == ["node", "nic", "switch", "switch"]


@pytest.mark.parametrize("text", ["nic=zaya001", "rail=3", "node=", "nic=:3", "leaf"])
def test_failures_that_cannot_be_read(text: str) -> None:
    with pytest.raises(TopologyError, match="not a failure"):
        parse_failure(text)
