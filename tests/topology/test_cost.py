"""The cost model: calibration error, published floors, monotone growth, and limits that physics sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.build import fabric_from_text, load_fabric
from topology.cost import OPS, CostModel, GroupShape, Routing, bus_factor
from topology.errors import TopologyError
from topology.fit import evaluate, fit, load_calibration, mean_error
from topology.parameters import DEFAULT, Fitted, load_parameters, version_matches
from topology.yamlio import read

SHIPPED = Path(__file__).parents[2] / "configs/clusters/mi300x_128x8_rails.yaml"
MIB = 1 << 20
MODEL = CostModel.for_fabric(load_fabric(SHIPPED))
SIZES = st.integers(1, 1 << 34)
NODES = st.sampled_from([2, 3, 4, 7, 8, 16, 100, 127, 128, 1024, 4096, 16384])


def test_mean_error_on_the_calibration_curves_is_at_most_seven_percent() -> None:
    points = [p for p in evaluate(MODEL, load_calibration()) if p.curve.use == "fit"]
    assert len(points) > 2 * len(Fitted.model_fields)
    assert mean_error(points, MIB) <= 0.07
    assert max(abs(p.error) for p in points) <= 0.07


def test_the_shipped_parameters_are_those_of_the_fit() -> None:
    fitted = fit(MODEL, load_calibration()).parameters.fitted
    for name, value in fitted.model_dump().items():
        assert getattr(MODEL.parameters.fitted, name) == pytest.approx(value, rel=2e-3), name


def test_the_fit_finds_its_own_parameters_again_from_elsewhere() -> None:
    curves = [c for c in load_calibration() if c.use == "fit"]
    start = Fitted(**{name: value * 1.5 for name, value in MODEL.parameters.fitted.model_dump().items()})
    elsewhere = CostModel(
        MODEL.parameters.model_copy(update={"fitted": start}),
        MODEL.link_bytes_per_s,
        MODEL.nic_line_bytes_per_s,
        MODEL.switch_latency_s,
        MODEL.rccl,
    )
    assert mean_error(evaluate(fit(elsewhere, curves), curves)) == pytest.approx(
        mean_error(evaluate(MODEL, curves)), abs=2e-3
    )


def test_predictions_that_were_not_fitted_agree_with_published_values() -> None:
    for point in evaluate(MODEL, load_calibration()):
        if point.curve.use == "check":
            assert abs(point.error) < 0.03, point.curve.name
        if point.curve.use == "floor":
            assert point.error < 0.02, f"{point.curve.name}: slower than the acceptance threshold"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(OPS), SIZES, st.floats(1.0, 8.0), NODES, st.sampled_from([1, 2, 4, 8]))
def test_time_grows_with_the_message(op: str, size: int, factor: float, nodes: int, per_node: int) -> None:
    shape = GroupShape(nodes, per_node)
    small, large = MODEL.time(op, size, shape), MODEL.time(op, size * factor, shape)
    assert 0 < small <= large * (1 + 1e-12)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(OPS), SIZES, NODES, NODES, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 8]))
def test_time_grows_with_the_nodes_up_to_131072_gpus(
    op: str, size: int, a: int, b: int, per_node: int, topk: int
) -> None:
    few, many = sorted((a, b))
    routing = Routing(topk, 4)
    fast, slow = (MODEL.time(op, size, GroupShape(n, per_node), routing) for n in (few, many))
    assert fast <= slow * (1 + 1e-9)


@given(SIZES, st.floats(0.05, 1.0), st.integers(0, 64))
def test_congestion_and_spines_never_help(size: int, share: float, hops: int) -> None:
    for op in OPS:
        free, tight = GroupShape(8, 8), GroupShape(8, 8, hops, share)
        assert MODEL.time(op, size, free) <= MODEL.time(op, size, tight) * (1 + 1e-12)


@pytest.mark.parametrize("nodes", [2, 4, 8, 16, 128])
def test_no_collective_beats_the_wires(nodes: int) -> None:
    size = 1 << 34
    for op in ("all_reduce", "reduce_scatter", "all_gather"):
        shape = GroupShape(nodes, 8)
        rate = size * bus_factor(op, shape.ranks) / MODEL.time(op, size, shape)
        assert rate <= 8 * 50e9
    logical = MODEL.dispatch_logical_bytes(1 << 26, nodes, Routing(8, 4))
    seconds = MODEL.dispatch(1 << 26, GroupShape(nodes, 8), Routing(8, 4))
    assert logical * (nodes - 1) / nodes / seconds <= 50e9


def test_bandwidth_inside_a_node_follows_the_number_of_participants() -> None:
    # B = (n - 1) x link, https://arxiv.org/abs/2511.17127 equation 1, with the usable 48 GB/s per link.
    for ranks in (2, 4, 8):
        rate = 1e10 * bus_factor("all_reduce", ranks) / MODEL.all_reduce(1e10, GroupShape(1, ranks))
        assert rate / 1e9 == pytest.approx(48 * (ranks - 1), rel=0.07)


@pytest.mark.parametrize("op", OPS)
def test_the_printed_interval_holds_the_prediction(op: str) -> None:
    fast, slow = MODEL.extremes()
    for power in range(20, 35):
        low, mid, high = (m.time(op, 1 << power, GroupShape(2, 8)) for m in (fast, MODEL, slow))
        assert low <= mid <= high
    ring = [m.all_reduce(1 << 28, GroupShape(2, 8)) for m in (fast, MODEL, slow)]
    assert ring[0] / ring[1] == pytest.approx(0.92, abs=0.01)
    assert ring[2] / ring[1] == pytest.approx(1.27, abs=0.01)


def test_relays_beat_flat_all_to_all_and_skew_costs() -> None:
    size, shape = 1 << 28, GroupShape(4, 8)
    flat, relayed = (MODEL.all_to_all(size, shape, relay=relay) for relay in (False, True))
    assert 1.5 < flat / relayed < 2.2, "the published gain is about two"
    assert MODEL.all_to_all(size, shape, relay=True, skew=1.5) > 1.4 * relayed
    even, skewed = (MODEL.dispatch(size, shape, Routing(1, None, skew)) for skew in (1.0, 1.5))
    assert skewed > 1.4 * even


def test_two_levels_save_latency_of_small_messages_at_scale() -> None:
    shape = GroupShape(128, 8)
    assert MODEL.ring(1 << 24, shape, "bulk", 2) > MODEL.all_reduce_two_level(1 << 24, shape)


def test_a_single_rank_costs_nothing() -> None:
    for op in ("all_reduce", "reduce_scatter", "all_gather", "broadcast"):
        assert MODEL.time(op, 1 << 20, GroupShape(1, 1)) == 0


def test_versions_choose_their_data() -> None:
    new = fabric_from_text(SHIPPED.read_text().replace('rccl: "2.22.3"', 'rccl: "2.27.7"'))
    shape = GroupShape(2, 8)
    assert CostModel.for_fabric(new).all_reduce(1 << 23, shape) < MODEL.all_reduce(1 << 23, shape)
    assert version_matches("6.4.1", ">=6.2,<7") and not version_matches("7.0", ">=6.2,<7")
    with pytest.raises(TopologyError, match="not a version condition"):
        version_matches("6.4", "~6")


def test_a_version_may_force_the_knee() -> None:
    entry = MODEL.parameters.versions[0].model_copy(update={"knees": {"all_reduce": 1 << 20}})
    forced = replace(MODEL, parameters=MODEL.parameters.model_copy(update={"versions": [entry]}))
    shape = GroupShape(1, 8)
    assert forced.all_reduce(1 << 20, shape) == MODEL.all_reduce(1 << 20, shape)
    assert forced.all_reduce(1 << 21, shape) == MODEL.ring(1 << 21, shape, "bulk", 2) > MODEL.all_reduce(1 << 21, shape)
    with pytest.raises(TopologyError, match="no cost-model data for this RCCL version"):
        replace(forced, rccl="9.9").all_reduce(1 << 20, GroupShape(2, 8))


def test_parameter_files_are_strict() -> None:
    text = DEFAULT.read_text().replace("flat_congestion", "flat_kongestion")
    path = Path("parameters.yaml")
    from topology.parameters import Parameters
    from topology.yamlio import parse

    with pytest.raises(TopologyError, match=r"parameters.yaml:\d+: unknown key 'fitted.flat_kongestion'|missing"):
        parse(text, str(path)).validate(Parameters)
    assert load_parameters() == read(DEFAULT).validate(Parameters)
