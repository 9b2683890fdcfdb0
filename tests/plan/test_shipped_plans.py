"""Every shipped plan is legal, fits, and lies over its run file."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.plan_file import read_plan
from megatron_zaya.config import load_config
from megatron_zaya.plan.hardware import accelerator
from megatron_zaya.plan.layout import layout_problems
from megatron_zaya.plan.memory import plan_memory
from megatron_zaya.plan.parameters import active_parameters, model_parameters
from megatron_zaya.plan.shape import batch_of, layout_of, model_of, precision_of

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "configs/plans").glob("*.yaml"))


def test_all_lengths_and_sizes_are_there():
    names = {path.stem for path in PLANS}
    assert {f"zaya1_8b_{length}_{nodes}n" for length in ("4k", "32k", "131k") for nodes in (1, 16, 128)} <= names
    assert any(name.startswith("zaya_74b") for name in names)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan_is_legal_and_fits_an_mi300x(path):
    overrides, world_size = read_plan(path)
    run_file = "zaya_74b" if "74b" in path.stem else "zaya1_8b"
    config = load_config(ROOT / f"configs/{run_file}.yaml", overrides)
    assert world_size is not None
    assert layout_problems(config, world_size, 8) == []
    device = accelerator("MI300X")
    memory = plan_memory(
        model_of(config), layout_of(config, world_size), batch_of(config), precision=precision_of(config),
        allowances=device.allowances(),
    )  # fmt: skip
    assert memory.fit_probability(device.memory_bytes, device.allowances()) > 0.95


def test_the_sibling_has_the_published_totals():
    model = model_of(load_config(ROOT / "configs/zaya_74b.yaml"))
    assert model_parameters(model).total == pytest.approx(74e9, rel=0.01)
    assert active_parameters(model) == pytest.approx(4e9, rel=0.1)
