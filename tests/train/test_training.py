"""Training on real ranks: data parallel sizes agree, and a resumed run equals an uninterrupted one bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_zaya.config import load_config
from megatron_zaya.telemetry.jsonl import read_events, steps_by_iteration
from tests.ranks import run_ranks

KEYS = ("loss", "grad_norm", "learning_rate", "skip_rate", "max_expert_load")


def train_runs(run_file: Path, runs: list[list[str]]) -> list[dict[int, tuple]]:
    """Run on each rank: train every list of overrides in turn; return the steps' figures of each, on rank 0."""
    from launch.env import read_rank_env
    from megatron_zaya.train.loop import train
    from megatron_zaya.train.setup import build_callbacks, build_job, distributed_world, release_job

    env = read_rank_env()
    figures = []
    with distributed_world(load_config(run_file), env) as device:
        for overrides in runs:
            config = load_config(run_file, overrides)
            job = build_job(config, env, device)
            assert train(job, build_callbacks(config, env)) == "finished"
            job.events.close()
            assert job.state.consumed_samples == job.state.iteration * config.schedule.global_batch_size
            release_job(job)
            if env.rank == 0:
                steps = steps_by_iteration(config.run_dir / "metrics.jsonl")
                figures.append({i: tuple(step[key] for key in KEYS) for i, step in steps.items()})
    return figures


RUNS = {
    "whole": ["checkpoint.save_interval=3"],
    "resumed": ["run.name=resumed", "checkpoint.load={whole}", "checkpoint.load_iteration=3"],
    "micro_batches": ["run.name=micro", "schedule.micro_batch_size=1", "parallel.overlap_grad_reduce=false"],
    "plain": ["run.name=plain", "parallel.use_distributed_optimizer=false", "checkpoint.save_interval=3"],
    "plain_resumed": [
        "run.name=plain_resumed",
        "parallel.use_distributed_optimizer=false",
        "checkpoint.load={plain}",
        "checkpoint.load_iteration=3",
    ],
    "allgather": ["run.name=allgather", "parallel.moe_token_dispatcher_type=allgather"],
    "overlapped": ["run.name=overlapped", "parallel.overlap_param_gather=true"],
    "muon": ["run.name=muon", "optimizer.optimizer=muon", "checkpoint.save_interval=3"],
    "muon_resumed": [
        "run.name=muon_resumed",
        "optimizer.optimizer=muon",
        "checkpoint.load={muon}",
        "checkpoint.load_iteration=3",
    ],
    "bf16": [
        "run.name=bf16",
        "run.precision=bf16",
        "checkpoint.save_interval=3",
        "checkpoint.local_dir={bf16}/node/{{name}}",
    ],
    "bf16_resumed": [
        "run.name=bf16_resumed",
        "run.precision=bf16",
        "checkpoint.load={bf16}",
        "checkpoint.load_iteration=3",
    ],
}


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two_ranks(module_folder, text_prefix):
    """Figures of every run of RUNS on two ranks, and the run file."""
    run_file = make_run_file(module_folder, text_prefix)
    folders = {name: load_config(run_file, overrides[:1]).run_dir for name, overrides in RUNS.items()}
    runs = [[o.format(**{n: str(f) for n, f in folders.items()}) for o in overrides] for overrides in RUNS.values()]
    figures = run_ranks(train_runs, 2, run_file, runs)[0]
    return run_file, dict(zip(RUNS, figures, strict=True)), folders


def make_run_file(folder: Path, text_prefix: Path) -> Path:
    from tests.train.conftest import run_file as fixture

    return fixture.__wrapped__(folder, text_prefix)


def assert_close(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    assert set(ours) == set(theirs)
    for iteration, figures in ours.items():
        assert figures[:3] == pytest.approx(theirs[iteration][:3], rel=tolerance), f"iteration {iteration}"


def test_it_learns(two_ranks):
    _, figures, _ = two_ranks
    losses = [step[0] for step in figures["whole"].values()]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("resumed", "whole"),
    [("resumed", "whole"), ("plain_resumed", "plain"), ("muon_resumed", "muon"), ("bf16_resumed", "bf16")],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(two_ranks, resumed, whole):
    _, figures, _ = two_ranks
    assert set(figures[resumed]) == {4, 5, 6}
    assert all(figures[resumed][i] == figures[whole][i] for i in (4, 5, 6))


def test_steps_pass_through_the_nodes_own_disk(two_ranks):
    _, _, folders = two_ranks
    local = folders["bf16"] / "node" / "bf16" / "checkpoints"
    assert local.is_dir()
    assert not list(local.iterdir()), "what is in the run folder is removed from the node"
    assert len(list((folders["bf16"] / "checkpoints").glob("iter_*/rank_00001.safetensors"))) == 2


@pytest.mark.parametrize("other", ["micro_batches", "plain", "allgather", "overlapped"])
def test_how_it_is_computed_does_not_change_what_is_computed(two_ranks, other):
    _, figures, _ = two_ranks
    assert_close(figures[other], figures["whole"])


def test_bf16_follows_fp32(two_ranks):
    _, figures, _ = two_ranks
    for iteration, (loss, *_) in figures["bf16"].items():
        assert loss == pytest.approx(figures["whole"][iteration][0], rel=2e-2)


def test_one_rank_equals_two_and_loads_their_checkpoint(two_ranks):
    run_file, figures, folders = two_ranks
    resume = ["run.name=one_resumed", f"checkpoint.load={folders['whole']}", "checkpoint.load_iteration=3"]
    weights = ["run.name=weights", f"checkpoint.load={folders['whole']}", "checkpoint.load_optimizer=false"]
    one, resumed, fresh = run_ranks(train_runs, 1, run_file, [["run.name=one"], resume, weights])[0]
    assert_close(one, figures["whole"])
    assert_close(resumed, {i: figures["whole"][i] for i in (4, 5, 6)})
    assert set(fresh) == {1, 2, 3, 4, 5, 6}
    assert fresh[1][0] < one[3][0], "the trained weights were taken, the schedule started anew"


def test_the_run_folder_is_complete_and_runs_again(two_ranks):
    run_file, _, folders = two_ranks
    folder = folders["whole"]
    assert load_config(folder / "config.yaml") == load_config(run_file, RUNS["whole"])
    kinds = [event["event"] for event in read_events(folder / "metrics.jsonl")]
    assert (kinds[0], *kinds[-2:]) == ("RunStarted", "Saved", "RunEnded")
    assert (kinds.count("StepDone"), kinds.count("Saved"), len(kinds)) == (6, 2, 16)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["iter_0000003", "iter_0000006", "latest"]
