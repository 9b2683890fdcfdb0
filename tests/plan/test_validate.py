"""Published facts and measurements come out of the planner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_zaya.config import ConfigError, load_config
from megatron_zaya.plan.activations import Options
from megatron_zaya.plan.hardware import accelerator
from megatron_zaya.plan.memory import Allowances, plan_memory
from megatron_zaya.plan.shape import Batch, Layout, model_of
from megatron_zaya.plan.validate import POINTS, compare, summary
from tests.plan.test_plan_cli import zaya_plan

ZAYA1 = Path(__file__).parents[2] / "configs/zaya1_8b.yaml"


def test_memory_is_within_three_percent_of_published_allocator_figures_in_the_median():
    found = summary(compare())
    assert found["memory_median_error"] < 0.03
    assert found["memory_largest_error"] < 0.08
    assert found["time_median_error"] < 0.08


def test_points_of_others_are_taken_and_mistakes_named(tmp_path):
    text = POINTS.read_text()
    mine = tmp_path / "points.yaml"
    mine.write_text(text.replace("activations_gib: 9.56", "activations_gib: 19.12"))
    assert min(c.error for c in compare(mine)) == pytest.approx(-0.5, abs=0.01)
    mine.write_text(text.replace("model: gpt-22b", "model: gpt-23b", 1))
    with pytest.raises(ConfigError, match="gpt-23b"):
        compare(mine)


def test_the_command_prints_signs_and_the_number_of_fitted_parameters():
    done = zaya_plan("validate")
    assert done.returncode == 0, done.stderr
    assert "2 parameters were fitted" in done.stdout
    assert "%" in done.stdout
    record = json.loads(zaya_plan("validate", "--json").stdout)
    assert len(record["points"]) >= 15


@pytest.mark.parametrize("world_size", [8, 1024])
def test_zaya1_at_4k_needs_no_model_parallelism_on_192_gb_but_on_80_gb(world_size):
    """Published: arXiv 2511.17127, section II; AMD's release credits 192 GB. Logits whole, as in that run."""
    model, allowances = model_of(load_config(ZAYA1)), Allowances()
    options, layout = Options(loss_workspace_bytes=None), Layout(world_size=world_size)
    for micro, fits_192 in ((1, True), (2, True), (4, True)):
        memory = plan_memory(model, layout, Batch(4096, micro, micro * world_size), options=options)
        assert (memory.fit_probability(accelerator("MI300X").memory_bytes, allowances) > 0.95) == fits_192
        if micro > 1:
            assert memory.fit_probability(accelerator("H100").memory_bytes, allowances) < 0.05
    spread = replace(layout, ep=8)
    memory = plan_memory(model, spread, Batch(4096, 2, 2 * world_size), options=options)
    assert memory.fit_probability(accelerator("H100").memory_bytes, allowances) > 0.9
