"""The collectives that are priced against those that the dry run records, and what must hold for any step time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_zaya.config import load_config
from megatron_zaya.plan.collectives import step_flows
from megatron_zaya.plan.hardware import Network, accelerator
from megatron_zaya.plan.layer_time import Assumptions, StageTime
from megatron_zaya.plan.pipeline_time import simulate
from megatron_zaya.plan.shape import Batch, Layout, batch_of, layout_of, model_of, precision_of
from megatron_zaya.plan.step_time import plan_step_time

ZAYA1 = Path(__file__).parents[2] / "configs/zaya1_8b.yaml"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
TP4 = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]
EP4 = ["parallel.expert_model_parallel_size=4"]
CP4 = ["parallel.context_parallel_size=4"]
PP2 = ["parallel.pipeline_model_parallel_size=2", "schedule.global_batch_size=8"]
RING = ["parallel.cp_comm_type=p2p"]
FULL = ["parallel.recompute_granularity=full"]
SOME = ["parallel.recompute_granularity=selective"]
# name: (world, rank, overrides); of context-parallel ranks one in the middle, which has two neighbours
CASES: dict[str, tuple[int, int, list[str]]] = {
    "data": (4, 1, ["schedule.global_batch_size=8"]),
    "data, nothing sharded": (4, 1, ["parallel.use_distributed_optimizer=false"]),
    "expert": (8, 0, EP4),
    "expert, parameters not overlapped": (8, 0, [*EP4, "parallel.overlap_param_gather=false"]),
    "expert, everything again": (8, 0, [*EP4, *FULL]),
    "expert, some again": (8, 0, [*EP4, *SOME, "parallel.recompute_modules=[moe]"]),
    "expert tensor": (4, 0, [*TP2, "parallel.expert_tensor_parallel_size=2", "parallel.expert_model_parallel_size=2"]),
    "tensor": (4, 0, TP2),
    "tensor beyond key-value heads, everything again": (4, 0, [*TP4, *FULL]),
    "tensor and expert": (8, 0, [*TP2, *EP4]),
    "context, gathered": (4, 1, CP4),
    "context, ring": (4, 2, [*CP4, *RING]),
    "context of two, ring": (4, 0, ["parallel.context_parallel_size=2", *RING]),
    "context, gathered, attention again": (4, 1, [*CP4, *SOME]),
    "context, ring, one layer again": (4, 1, [*CP4, *RING, *FULL, "parallel.recompute_method=block"]),
    "context and tensor, gathered": (8, 2, [*CP4, *TP2]),
    "context and tensor beyond key-value heads, ring": (16, 4, [*CP4, *TP4, *RING]),
    "pipeline, first": (4, 0, PP2),
    "pipeline, last": (4, 2, PP2),
    "interleaved, middle": (4, 1, ["parallel.pipeline_model_parallel_size=4", "schedule.global_batch_size=4",
                                   "parallel.virtual_pipeline_model_parallel_size=2", "model.num_layers=8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_priced_collectives_are_those_of_the_dry_run(name):
    from megatron_zaya.plan.dryrun.run import dry_run

    world_size, rank, overrides = CASES[name]
    small = ["model.num_layers=2", "schedule.micro_batch_size=1"]
    once = f"schedule.global_batch_size={layout_of(load_config(ZAYA1, overrides), world_size).dp}"
    config = load_config(ZAYA1, [*small, once, *overrides])
    run = dry_run(config, world_size, rank, skip_share=0.0)
    layout, model = layout_of(config, world_size), model_of(config)
    priced: Counter[str] = Counter()
    for flow in step_flows(
        model, layout, batch_of(config), precision_of(config), rank // (world_size // layout.pp), skip_share=0.0
    ):
        if flow.size_bytes >= 1024:
            priced[flow.op] += flow.size_bytes * flow.calls
    seen: Counter[str] = Counter()
    for call in run.collectives:
        if call.size_bytes >= 1024:
            seen[call.op] += call.size_bytes * call.calls
    assert {op for op, size in priced.items() if size} == set(seen)
    for op, size in seen.items():
        # Gradient buckets are padded to multiples of the ranks; everything else is equal to the byte.
        exact = op in ("all_to_all", "send_recv") or (op == "all_reduce" and layout.use_distributed_optimizer)
        assert priced[op] == pytest.approx(size, rel=0 if exact else 1e-4), op


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
