"""Muon over ranks: parameters after ten steps equal those of one rank, whatever spans what; and state changes layout.

Newton-Schulz runs in fp32 here. Ranks of equal number share their processes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_zaya.config import load_config
from tests.distributed.layouts import EP2, ETP2, PP2, TP2
from tests.ranks import run_ranks
from tests.train.conftest import run_file as make_run_file
from tests.train.conftest import text_prefix  # noqa: F401 (fixture)

STEPS = 10
SMALL_BUCKETS = {"ddp_bucket_size": 1}  # a bucket per parameter: matrices are cut into many pieces

LAYOUTS: dict[str, tuple[int, dict]] = {
    "dp2": (2, {}),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "ep2": (2, EP2),
    "dp4_cut": (4, SMALL_BUCKETS),
    "tp2_etp2_dp2": (4, TP2 | ETP2 | SMALL_BUCKETS),
    "tp4_shared_heads": (4, TP2 | {"tensor_model_parallel_size": 4}),
    "tp2_ep2_pp2": (4, TP2 | EP2 | PP2),
    "dp8_cut": (8, SMALL_BUCKETS),
    "tp2_from_dp2": (2, TP2),
    "tp2_ep2_pp2_from_dp4_cut": (4, TP2 | EP2 | PP2),
    "dp8_from_tp2_etp2_dp2": (8, {}),
}
SAVED_AT = 5


def origin(layout: str) -> str | None:
    """Return the layout whose checkpoint of step 5 a layout starts from, if its name says so."""
    return layout.partition("_from_")[2] or None


def train_layouts(run_file: Path, layouts: dict[str, dict]) -> dict[str, dict]:
    """Run on each rank: train every layout; return its parts of the parameters and what spans how many ranks."""
    from launch.env import read_rank_env
    from megatron_zaya.plan.layout import check_layout
    from megatron_zaya.train.setup import build_callbacks, build_job, distributed_world, release_job
    from megatron_zaya.train.step import train_step

    env = read_rank_env()
    results = {}
    with distributed_world(load_config(run_file), env) as device:
        for name, parallel in layouts.items():
            overrides = [f"run.name={name}", *(f"parallel.{key}={value}" for key, value in parallel.items())]
            if origin(name):
                source = load_config(run_file, [f"run.name={origin(name)}"]).run_dir
                overrides += [f"checkpoint.load={source}", f"checkpoint.load_iteration={SAVED_AT}"]
            config = load_config(run_file, overrides)
            check_layout(config, env.world_size)
            job = build_job(config, env, device)
            callbacks, figures = build_callbacks(config, env), []
            while job.state.iteration < STEPS:
                figures.append(train_step(job))
                for callback in callbacks:
                    callback.after_step(job)
            for callback in callbacks:
                callback.at_end(job)
            parts = [
                (tensor.key, tensor.global_shape, tensor.global_offset, tensor.data.detach().numpy().copy())
                for chunk in job.model
                for tensor in chunk.module.sharded_state_dict().values()
                if tensor.data.requires_grad
            ]
            spans = {len(m.pieces) for part in job.optimizer.chained_optimizers for m in part.plan.matrices}
            results[name] = {"parts": parts, "norms": [f.grad_norm for f in figures], "spans": spans}
            release_job(job)
    return results


def whole_parameters(ranks: list[dict]) -> dict[str, np.ndarray]:
    whole: dict[str, np.ndarray] = {}
    for rank in ranks:
        for key, shape, offset, values in rank["parts"]:
            target = whole.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
            target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    assert not any(np.isnan(values).any() for values in whole.values())
    return whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_prefix):  # noqa: F811
    path = make_run_file.__wrapped__(tmp_path_factory.mktemp("muon"), text_prefix)
    tree = yaml.safe_load(path.read_text())
    tree["model"] |= dict(num_attention_heads=4, num_query_groups=2, num_moe_experts=4, kv_channels=8)
    tree["model"] |= dict(skip_expert_bias=0.0, vocab_size=260)
    tree["schedule"] |= dict(train_iters=STEPS, micro_batch_size=1)
    tree["data"] |= dict(seq_length=16)
    tree["optimizer"] = dict(optimizer="muon", lr=2e-3, min_lr=1e-3, muon_newton_schulz_dtype="fp32")
    tree["checkpoint"] = dict(save_interval=SAVED_AT, save_at_end=False)
    path.write_text(yaml.safe_dump(tree))
    worlds: dict[int, dict] = {1: {"one": {}}}
    for name, (world, parallel) in LAYOUTS.items():
        worlds.setdefault(world, {})[name] = parallel
    results = {}
    for world, layouts in worlds.items():
        ranks = run_ranks(train_layouts, world, path, layouts)
        for name in layouts:
            ours = [rank[name] for rank in ranks]
            spans = set.union(*(rank["spans"] for rank in ours))
            results[name] = {"parameters": whole_parameters(ours), "norms": ours[0]["norms"], "spans": spans}
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_after_ten_steps_equal_those_of_one_rank(trained, layout):
    ours, one = trained[layout]["parameters"], trained["one"]["parameters"]
    assert set(ours) == set(one)
    errors = {name: np.abs(ours[name] - one[name]).max() for name in one}
    assert max(errors.values()) <= 1e-5, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_norms_equal_those_of_one_rank(trained, layout):
    steps = SAVED_AT if origin(layout) else 0
    np.testing.assert_allclose(trained[layout]["norms"], trained["one"]["norms"][steps:], rtol=1e-4)


def test_matrices_span_one_two_three_and_more_ranks(trained):
    spans = set.union(*(result["spans"] for result in trained.values()))
    assert {1, 2, 3, 4, 8} <= spans
    assert trained["one"]["spans"] == {1}
