"""A miniature of the published recipe: four phases, DP2 then CP2; and resumed from inside each, bit for bit."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_zaya.config import load_config
from megatron_zaya.config.phases import phase_configs
from megatron_zaya.preconditions import unfinished_phases
from megatron_zaya.telemetry.jsonl import steps_by_iteration
from tests.ranks import run_ranks
from tests.train.conftest import run_file as make_run_file

KEYS = ("loss", "grad_norm", "learning_rate", "skip_rate", "load_entropy")
LENGTHS = {"pretrain_1": 64, "pretrain_2": 64, "midtrain": 128, "sft": 512}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, text_prefix) -> Path:
    """The recipe's shape in small: lengths 64, 64, 128, 512; RoPE bases 10K, 10K, 1M, 5M; CP 2 for the long ones."""
    path = make_run_file.__wrapped__(tmp_path_factory.mktemp("phases"), text_prefix)
    tree = yaml.safe_load(path.read_text())
    tree["model"] |= dict(num_attention_heads=2, num_query_groups=2, max_position_embeddings=64)
    tree["optimizer"] = dict(optimizer="muon", lr=1e-2, min_lr=4e-3)
    tree["schedule"] = dict(global_batch_size=8, micro_batch_size=1)
    tree["data"]["seq_length"] = 64
    tree["checkpoint"] = dict(save_interval=2)
    positions = {"data.seq_length": 128, "model.max_position_embeddings": 128, "model.rotary_base": 1e6}
    long = {"data.seq_length": 512, "model.max_position_embeddings": 512, "model.rotary_base": 5e6}
    two = {"parallel.context_parallel_size": 2}
    tree["phases"] = [
        dict(name="pretrain_1", train_tokens=48 * 64, overrides={"schedule.rampup_batch_size": [4, 4, 16]}),
        dict(name="pretrain_2", train_tokens=32 * 64, overrides={"optimizer.lr": 4e-3}),
        dict(
            name="midtrain",
            train_tokens=16 * 128,
            overrides=positions | two | {"optimizer.lr": 4e-3, "schedule.global_batch_size": 4},
        ),
        dict(
            name="sft",
            train_tokens=8 * 512,
            overrides=long | two | {"optimizer.lr": 2e-3, "optimizer.min_lr": 1e-3, "schedule.global_batch_size": 2},
        ),
    ]
    path.write_text(yaml.safe_dump(tree))
    return path


def run_all(run_file: Path, overrides: list[list[str]]) -> None:
    """Run on each rank: every phase that is left, for each list of overrides."""
    from launch.env import read_rank_env
    from megatron_zaya.train.loop import train
    from megatron_zaya.train.setup import build_callbacks, build_job, distributed_world, release_job

    env = read_rank_env()
    with distributed_world(load_config(run_file), env) as device:
        for one_run in overrides:
            for phase in unfinished_phases(load_config(run_file, one_run)):
                job = build_job(phase, env, device)
                assert train(job, build_callbacks(phase, env)) == "finished"
                job.events.close()
                release_job(job)


def figures(config) -> dict[str, dict[int, tuple]]:
    return {
        phase.run_dir.name: {
            number: tuple(step[key] for key in KEYS)
            for number, step in steps_by_iteration(phase.run_dir / "metrics.jsonl").items()
        }
        for phase in phase_configs(config)
    }


def interrupted_in(whole: Path, target: Path, number: int, phases: list) -> None:
    """Copy a finished run as it was in the middle of phase ``number``: its first checkpoint there, nothing later."""
    for index, phase in enumerate(phases[: number + 1]):
        shutil.copytree(phase.run_dir, target / phase.run_dir.name)
        if index == number:
            steps = sorted((target / phase.run_dir.name / "checkpoints").glob("iter_*"))
            for step in steps[1:]:
                shutil.rmtree(step)


@pytest.fixture(scope="module")
def finished(recipe):
    """The run without a break, then the same resumed from inside each of its phases."""
    config = load_config(recipe)
    run_ranks(run_all, 2, recipe, [[]])
    phases = phase_configs(config)
    resumed = {}
    for number in range(len(phases)):
        folder = config.run_dir.parent / f"again{number}"
        interrupted_in(config.run_dir, folder, number, phases)
        resumed[number] = [f"run.name=again{number}"]
    run_ranks(run_all, 2, recipe, list(resumed.values()))
    again = {number: load_config(recipe, overrides) for number, overrides in resumed.items()}
    return config, figures(config), {number: figures(other) for number, other in again.items()}


def test_every_phase_runs_to_its_end_in_its_layout(finished):
    config, whole, _ = finished
    assert [phase.data.seq_length for phase in phase_configs(config)] == list(LENGTHS.values())
    assert [len(steps) for steps in whole.values()] == [phase.schedule.train_iters for phase in phase_configs(config)]
    assert [len(steps) for steps in whole.values()] == [7, 4, 4, 4]
    assert unfinished_phases(config) == phase_configs(config)[-1:]


def test_the_loss_goes_on_across_the_borders(finished):
    """What the phase before had learnt is still there: the first loss is near the last one, far below a fresh start."""
    _, whole, _ = finished
    phases = list(whole.values())
    fresh = phases[0][1][0]
    assert fresh == pytest.approx(math.log(258), rel=0.05)
    for before, after in itertools.pairwise(phases):
        last, first = before[max(before)][0], after[1][0]
        assert abs(first - last) < 0.35 * (fresh - last), (last, first)
    assert phases[-1][max(phases[-1])][0] < fresh - 1.5


@pytest.mark.parametrize("number", range(4))
def test_resuming_inside_a_phase_changes_no_bit(finished, number):
    """The steps after the checkpoint, the later phases included, are those of the run without a break."""
    _, whole, again = finished
    names = list(whole)
    for name in names[number:]:
        assert again[number][name] == whole[name], name


def test_a_phase_is_a_run_of_its_own(recipe):
    config = load_config(recipe)
    second = phase_configs(config)[1]
    assert second.checkpoint.continue_from == str(phase_configs(config)[0].run_dir)
    assert second.run.seed == config.run.seed + 1 and not second.phases


def test_mistakes_in_a_phase_name_it(recipe, tmp_path):
    tree = yaml.safe_load(recipe.read_text())
    tree["phases"][2]["overrides"]["data.sequence"] = 3
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"midtrain[\s\S]*sequence"):
        load_config(bad)
