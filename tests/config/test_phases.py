"""Phases and batch ramps: arithmetic of lengths, and the shipped recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_zaya.config import load_config
from megatron_zaya.config.phases import phase_configs
from megatron_zaya.config.sections import ScheduleConfig
from megatron_zaya.plan.layout import layout_problems

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "recipes" / "zaya1_8b.yaml"


def test_the_recipe_is_four_complete_runs_for_128_nodes():
    phases = phase_configs(load_config(RECIPE))
    assert [p.data.seq_length for p in phases] == [4096, 4096, 32_768, 131_072]
    assert [p.model.rotary_base for p in phases] == [1e4, 1e4, 1e6, 5e6]
    assert [p.parallel.context_parallel_size for p in phases] == [1, 1, 2, 8]
    tokens = [p.schedule.train_samples * p.data.seq_length for p in phases]
    assert tokens == pytest.approx([8e12, 4e12, 1.2e12, 0.66e12], rel=1e-4)
    assert all(not layout_problems(p, 1024, 8) for p in phases)
    assert {p.optimizer.optimizer for p in phases} == {"muon"}
    assert (phases[0].optimizer.lr, phases[0].optimizer.min_lr) == (6e-4, 2e-4)


def test_a_ramp_grows_evenly_and_ends_at_the_global_batch():
    schedule = ScheduleConfig(global_batch_size=16, rampup_batch_size=[4, 4, 100], train_iters=50)
    consumed, sizes = 0, []
    for _ in range(50):
        sizes.append(schedule.batch_size_at(consumed))
        consumed += sizes[-1]
    assert sizes == sorted(sizes) and set(sizes) == {4, 8, 12, 16}
    assert schedule.train_samples == consumed
    for samples in (1, 4, 5, 99, 100, 101, consumed):
        iterations = schedule.iterations_for(samples)
        assert sum(sizes[:iterations]) >= samples > sum(sizes[: iterations - 1])


def test_a_ramp_that_misses_its_end_is_refused():
    with pytest.raises(ValueError, match="multiple of the increment"):
        ScheduleConfig(global_batch_size=16, rampup_batch_size=[4, 5, 100])
