"""What must hold for any step time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_zaya.config import load_config
from megatron_zaya.plan.activations import Options, Tokens
from megatron_zaya.plan.hardware import Network, accelerator
from megatron_zaya.plan.layer_time import (
    Assumptions,
    StageTime,
    expert_bias_bytes,
    layer_time,
    sorting_bytes,
    stage_times,
)
from megatron_zaya.plan.memory import plan_memory
from megatron_zaya.plan.muon import muon_s
from megatron_zaya.plan.pipeline_time import simulate
from megatron_zaya.plan.reduction import reduction_s, with_best_buckets
from megatron_zaya.plan.schedule import alive_chunks
from megatron_zaya.plan.shape import Batch, Layout, Precision, model_of
from megatron_zaya.plan.step_time import MUON, plan_step_time
from megatron_zaya.telemetry.profile import PLANNED

ZAYA1 = Path(__file__).parents[2] / "configs/zaya1_8b.yaml"


def test_a_pipeline_of_equal_stages_has_the_published_bubble():
    times = [StageTime({"x": 1.0}, {"x": 2.0}) for _ in range(4)]
    for microbatches in (4, 16, 64):
        span, _ = simulate(Layout(world_size=4, pp=4), microbatches, times, 0.0)
        assert span == pytest.approx(3 * (microbatches + 3))  # (p - 1) / m, arXiv 2104.04473, section 2.2
    halves = [StageTime({"x": 0.5}, {"x": 1.0}) for _ in range(8)]
    span, _ = simulate(Layout(world_size=4, pp=4, vp=2), 16, halves, 0.0)
    assert span == pytest.approx(3 * 16 + 3 * 3 / 2)  # (p - 1) / (v m)


def test_parts_add_up_and_skew_and_lost_nics_cost_time():
    model, device = model_of(load_config(ZAYA1)), accelerator("MI300X")
    layout, batch = Layout(world_size=1024, ep=16), Batch(4096, 2, 4096)
    plain = plan_step_time(model, layout, batch, device, Network.of(device))
    assert sum(plain.parts.values()) == pytest.approx(plain.step_s)
    assert 0 < plain.mfu < 0.6
    skewed = plan_step_time(model, layout, batch, device, Network.of(device), assume=Assumptions(skew=1.5))
    degraded = plan_step_time(model, layout, batch, device, Network.of(device, nics_down=4))
    assert skewed.step_s > plain.step_s
    assert degraded.step_s > plain.step_s


def test_rows_are_sorted_only_where_a_rank_has_several_experts_and_rows_of_other_ranks():
    model, batch = model_of(load_config(ZAYA1)), Batch(4096, 1, 16)
    for ep, passes in ((1, 0), (8, 4), (16, 0)):
        layout = Layout(world_size=16, ep=ep)
        t = Tokens.of(model, layout, batch, 1.0)
        assert sorting_bytes(model, layout, t) == passes * 2 * t.experts * model.hidden_size


def test_biases_of_experts_are_passes_over_their_outputs():
    plain = replace(model_of(load_config(ZAYA1)), attention="gqa", router_hidden_size=0, moe_router_topk=4)
    biased, device, batch = replace(plain, add_bias_linear=True), accelerator("H100"), Batch(4096, 4, 32)
    layout = Layout(world_size=8, ep=8)
    t = Tokens.of(biased, layout, batch, 1.0)
    forward, backward = expert_bias_bytes(biased, t)
    assert (forward, backward) == (28 * t.experts * biased.hidden_size, 40 * t.experts * biased.hidden_size)
    assert expert_bias_bytes(plain, t) == (0.0, 0.0)
    without, with_them = (
        layer_time(m, layout, batch, device, Network.of(device), Assumptions(), Options(), True)
        for m in (plain, biased)
    )
    more = with_them.backward["memory passes"] - without.backward["memory passes"]
    assert more == pytest.approx(device.traffic_s(backward))


def test_small_buckets_suit_few_ranks_and_large_ones_many():
    model, device, precision = model_of(load_config(ZAYA1)), accelerator("MI300X"), Precision()
    network, small, large = Network.of(device), 40_000_000, 2**40
    for ranks, better, worse in ((8, small, large), (1024, large, small)):  # latency of a ring grows with its ranks
        layout = Layout(world_size=ranks)
        times = stage_times(model, layout, Batch(4096, 1, ranks), device, network, Options(), Assumptions())
        exposed = {}
        for elements in (small, large, None):
            variant = replace(layout, bucket_elements=elements)
            if elements is None:
                variant = with_best_buckets(model, layout, precision, network, times, 0.4)
            exposed[elements] = sum(reduction_s(model, variant, precision, network, times).values())
        assert exposed[better] < exposed[worse]
        assert exposed[None] <= exposed[better] * 1.01
        unhidden = replace(layout, overlap_grad_reduce=False)
        assert sum(reduction_s(model, unhidden, precision, network, times).values()) >= exposed[better]


@pytest.mark.parametrize("layout", [Layout(8), Layout(64, ep=8), Layout(1024, tp=2, pp=2, ep=8)], ids=Layout.describe)
def test_sharding_the_optimizer_never_costs_time_or_memory(layout):
    """So a search does not look at plans without it."""
    model, device = model_of(load_config(ZAYA1)), accelerator("MI300X")
    batch, whole = Batch(4096, 2, 4 * layout.dp), replace(layout, use_distributed_optimizer=False)
    sharded, unsharded = (
        plan_step_time(model, each, batch, device, Network.of(device)).step_s for each in (layout, whole)
    )
    assert sharded <= unsharded
    assert plan_memory(model, layout, batch).worst.peak < plan_memory(model, whole, batch).worst.peak


def test_a_ring_of_keys_hides_behind_attention_and_a_gather_does_not():
    model, device = model_of(load_config(ZAYA1)), accelerator("MI300X")
    seen = {}
    for how in ("all_gather", "p2p"):
        layout = Layout(world_size=8, cp=8, ep=8, cp_comm_type=how)
        long, short = (
            plan_step_time(model, layout, Batch(length, 1, 1), device, Network.of(device)).parts["context parallel"]
            for length in (131072, 8192)
        )
        seen[how] = long / 131072, short / 8192  # per token
    assert seen["p2p"][0] < 0.2 * seen["p2p"][1]
    assert seen["p2p"][0] < seen["all_gather"][0]


def test_muon_costs_more_than_adam_and_less_on_more_ranks():
    model, device = model_of(load_config(ZAYA1)), accelerator("MI300X")
    batch, precision = Batch(4096, 1, 8), Precision(matrix_moments=4)
    seconds = [
        muon_s(model, Layout(world_size=size), precision, device, Network.of(device)) for size in (1, 8, 64, 1024)
    ]
    assert seconds == sorted(seconds, reverse=True)
    adam, muon = (
        plan_step_time(model, Layout(8), batch, device, Network.of(device), precision=each)
        for each in (Precision(), precision)
    )
    assert muon.parts[MUON] == seconds[1]
    assert muon.parts["optimizer"] < adam.parts["optimizer"]  # no second moment of the matrices
    assert muon.step_s > adam.step_s


def test_a_profile_is_laid_beside_parts_that_the_planner_names():
    model, device, precision = model_of(load_config(ZAYA1)), accelerator("MI300X"), Precision(matrix_moments=4)
    layout = Layout(64, tp=2, ep=8, overlap_grad_reduce=False, overlap_param_gather=False)
    known = plan_step_time(model, layout, Batch(4096, 1, 64), device, Network.of(device), precision=precision).parts
    assert {name for names in PLANNED.values() for name in names} <= set(known)


@pytest.mark.parametrize("rows", [(1.0, 2.0), (3.0, 3.0)])
def test_zero_bubble_idles_less_than_1f1b_and_gpipe_keeps_more_alive(rows):
    times, kinds = [StageTime({"x": rows[0]}, {"x": rows[1]})] * 4, ("1f1b", "zb1p", "gpipe")
    spans = {kind: simulate(Layout(world_size=4, pp=4, schedule=kind), 8, times, 0.0)[0] for kind in kinds}
    work = 8 * sum(rows)
    assert work < spans["zb1p"] < spans["1f1b"] <= spans["gpipe"]
    # (p - 1) (T_F + T_B - 2 T_W) with equal thirds, arXiv 2401.10241, table 1
    if rows == (1.0, 2.0):
        assert spans["zb1p"] - work == pytest.approx((spans["1f1b"] - work) / 3)
    alive = {kind: max(map(sum, alive_chunks(4, 1, 8, 0, kind))) for kind in kinds}
    assert alive == {"1f1b": 4, "zb1p": 4, "gpipe": 8}
