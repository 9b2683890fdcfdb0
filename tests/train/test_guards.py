"""Steps that must not be taken: left out on all ranks, counted, and reported with rank and parameter at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_zaya.config import load_config
from megatron_zaya.train.guards import SpikeDetector
from tests.ranks import run_ranks
from tests.train.test_training import make_run_file

POISONED = "layers.1.mlp.experts.linear_fc2"


def train_with_poison(run_file: Path, overrides: list[str], poisoned_steps: set[int], infect: str) -> dict:
    """Run on each rank: train with a gradient (or a loss) of rank 1 made infinite at some steps."""
    from launch.env import read_rank_env
    from megatron_zaya.train.errors import TrainingError
    from megatron_zaya.train.setup import build_job, distributed_world
    from megatron_zaya.train.step import train_step

    env, config = read_rank_env(), load_config(run_file, overrides)
    with distributed_world(config, env) as device:
        job = build_job(config, env, device)
        results, error = [], None
        parameters = dict(job.model[0].module.named_parameters())
        finalize = job.model[0].config.finalize_model_grads_func

        def poisoned(*args, **kwargs):
            if job.state.iteration + 1 in poisoned_steps and env.rank == 1 and infect == "gradient":
                parameters[POISONED].main_grad[0, 0, 0] = torch.inf
            return finalize(*args, **kwargs)

        job.model[0].config.finalize_model_grads_func = poisoned

        def infected_loss(module, inputs, output):
            bad = job.state.iteration + 1 in poisoned_steps and env.rank == 1 and infect == "loss"
            return output * torch.nan if bad else output

        job.model[0].module.register_forward_hook(infected_loss)
        job.optimizer.norm_groups_wanted = True
        try:
            for _ in range(config.schedule.train_iters):
                before = {name: p.detach().clone() for name, p in parameters.items()}
                result = train_step(job)
                changed = any(not torch.equal(before[name], p) for name, p in parameters.items())
                results.append((result.skipped, changed, job.state.skipped_steps))
                if len(results) == 1:
                    norms = job.optimizer.norm_by_group, result.grad_norm
        except TrainingError as problem:
            error = str(problem)
        return {"steps": results, "error": error, "norms": norms}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, text_prefix):
    return make_run_file(tmp_path_factory.mktemp("guards"), text_prefix)


SKIP = ["schedule.nan_policy=skip", "schedule.nan_limit=2", "optimizer.optimizer=muon", "schedule.lr_warmup_iters=0"]
SKIP += ["parallel.overlap_grad_reduce=false"]  # so that there is a moment to poison a gradient before it is reduced


@pytest.mark.parametrize("infect", ["gradient", "loss"])
def test_a_bad_step_is_left_out_on_all_ranks_and_too_many_end_the_run(run_file, infect):
    ranks = run_ranks(train_with_poison, 2, run_file, SKIP, {2, 4, 5, 6}, infect)
    for result in ranks:
        good, bad = (False, True), (True, False)
        assert [(skipped, changed) for skipped, changed, _ in result["steps"]] == [good, bad, good, bad, bad]
        assert result["steps"][-1][2] == 3
        assert "iteration 6" in result["error"] and "2 steps before it were skipped" in result["error"]
    assert len({result["error"] for result in ranks}) == 1
    if infect == "gradient":
        assert f"owns gradients that are not: {POISONED}" in ranks[0]["error"]
        assert "the gradient norm is inf" in ranks[0]["error"]
    else:
        assert "the loss of rank 1 is not finite" in ranks[0]["error"]


def test_norms_by_group_add_up_to_the_norm(run_file):
    (norms, norm), other = (r["norms"] for r in run_ranks(train_with_poison, 2, run_file, SKIP[2:], set(), ""))
    assert norms.keys() == {"embedding", "experts", "router", "attention", "other"}
    assert norms == other[0] and all(value > 0 for value in norms.values())
    assert sum(value**2 for value in norms.values()) ** 0.5 == pytest.approx(norm, rel=1e-5)


def test_a_loss_spike_is_seen_and_a_falling_or_noisy_loss_is_not():
    detector = SpikeDetector(6.0, 20)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(1)) * 0.05
    losses = [5.0 - 0.01 * step + noise[step].item() for step in range(200)]
    assert [detector.observe(loss) for loss in losses] == [None] * 200
    assert detector.observe(6.0) > 6
    assert detector.observe(3.0) is None
    assert SpikeDetector(0.0, 2).observe(99.0) is None


def test_deterministic_mode_reaches_torch(run_file):
    from launch.env import read_rank_env
    from megatron_zaya.train.setup import distributed_world

    with distributed_world(load_config(run_file, ["run.deterministic=true"]), read_rank_env({})):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
