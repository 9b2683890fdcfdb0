"""The memory model against the dry run of the real model, and against what must hold for any plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zaya.config import load_config
from megatron_zaya.plan.memory import Allowances, plan_memory, stage_memory
from megatron_zaya.plan.parameters import active_parameters, model_parameters, rank_parameters
from megatron_zaya.plan.schedule import alive_chunks, passes
from megatron_zaya.plan.shape import Batch, Layout, batch_of, layout_of, model_of, precision_of

ZAYA1 = Path(__file__).parents[2] / "configs/zaya1_8b.yaml"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP4 = ["parallel.pipeline_model_parallel_size=4", "schedule.global_batch_size=128"]
GBS32 = "schedule.global_batch_size=32"
EP8 = ["parallel.expert_model_parallel_size=8"]
# name: (world, rank, overrides). ZAYA1-8B's sizes with fewer layers: the dry run's time is that of its operations.
CASES: dict[str, tuple[int, int, list[str]]] = {
    "one rank": (1, 0, ["schedule.global_batch_size=1"]),
    "data parallel, 4 sequences": (8, 0, ["schedule.micro_batch_size=4", "schedule.global_batch_size=32"]),
    "experts over a node": (1024, 777, [*EP8, "schedule.micro_batch_size=2", "schedule.global_batch_size=2048"]),
    "tensor and expert": (8, 3, [*TP2, "parallel.expert_model_parallel_size=4", "schedule.global_batch_size=4"]),
    "full recomputation, 8 sequences": (
        16,
        0,
        [
            *EP8,
            "parallel.recompute_granularity=full",
            "schedule.micro_batch_size=8",
            "schedule.global_batch_size=128",
        ],
    ),
    "pipeline, first": (64, 0, [*PP4, *EP8, "model.num_layers=4"]),
    "pipeline, middle": (64, 16, [*PP4, *EP8, "model.num_layers=4"]),
    "pipeline, last": (64, 48, [*PP4, *EP8, "model.num_layers=4"]),
    "interleaved, middle": (
        16,
        4,
        [
            *PP4,
            "model.num_layers=8",
            "parallel.virtual_pipeline_model_parallel_size=2",
            "schedule.global_batch_size=32",
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_within_two_percent_of_the_dry_run(name):
    from megatron_zaya.plan.dryrun.run import dry_run

    world_size, rank, overrides = CASES[name]
    config = load_config(ZAYA1, ["model.num_layers=2", "schedule.micro_batch_size=1", *overrides])
    measured = dry_run(config, world_size, rank)
    layout = layout_of(config, world_size)
    model, pp_rank = model_of(config), rank // (world_size // layout.pp)
    stage = stage_memory(model, layout, batch_of(config), pp_rank, precision=precision_of(config))
    assert rank_parameters(model, layout, pp_rank).total == measured.parameters
    assert stage.peak == pytest.approx(measured.peak_bytes, rel=0.02)
    assert stage.step_peak == pytest.approx(measured.step.total_bytes, rel=0.02)
    # Which fragment of which tensor falls to a rank decides the rest of these two; they are rarely the peak.
    assert stage.construction_peak == pytest.approx(measured.construction.total_bytes, rel=0.07)
    assert stage.optimizer_peak == pytest.approx(measured.optimizer_step.total_bytes, rel=0.07)


def test_zaya1_has_its_published_size():
    model = model_of(load_config(ZAYA1))
    assert model_parameters(model).total == 8_840_488_784
    table = model.vocab_size * model.hidden_size
    assert active_parameters(model) - table == pytest.approx(0.76e9, rel=0.02)  # arXiv 2511.17127, abstract


@pytest.mark.parametrize(("pp", "vp", "microbatches"), [(1, 1, 3), (4, 1, 2), (4, 1, 16), (4, 2, 8), (8, 3, 16)])
def test_every_pass_happens_once_and_backward_follows_forward(pp, vp, microbatches):
    for rank in range(pp):
        order = passes(pp, vp, microbatches, rank)
        assert len(order) == len(set(order)) == 2 * vp * microbatches
        done = set()
        for slot in order:
            assert slot.forward or slot._replace(forward=True) in done
            done.add(slot)
        assert all(sum(state) <= vp * microbatches for state in alive_chunks(pp, vp, microbatches, rank))


def test_1f1b_keeps_as_many_microbatches_as_stages_follow():
    assert [max(map(sum, alive_chunks(4, 1, 16, rank))) for rank in range(4)] == [4, 3, 2, 1]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 4))
def test_more_ranks_never_need_more_and_more_rows_never_less(tp_log, pp, ep, micro):
    model = model_of(load_config(ZAYA1))
    layout = Layout(world_size=1024, tp=min(tp_log, 2), pp=pp, ep=ep)
    batch = Batch(4096, micro, 1024 * micro)
    memory = plan_memory(model, layout, batch)
    assert memory.worst.peak <= plan_memory(model, layout, Batch(4096, micro + 1, 1024 * (micro + 1))).worst.peak
    wider = Layout(world_size=2048, tp=layout.tp, pp=pp, ep=ep)
    assert plan_memory(model, wider, Batch(4096, micro, 2048 * micro)).worst.peak <= memory.worst.peak


def test_probability_falls_with_the_need():
    model, allowances = model_of(load_config(ZAYA1)), Allowances()
    probabilities = [
        plan_memory(model, Layout(world_size=8), Batch(4096, micro, 8 * micro)).fit_probability(192e9, allowances)
        for micro in (1, 4, 8, 12, 16)
    ]
    assert probabilities == sorted(probabilities, reverse=True)
    assert probabilities[0] > 0.99
    assert probabilities[-1] < 0.01
