"""Recorded choices reproduce a step bit for bit under every kind of parallelism; forced ones leave gradients right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_zaya.config import ConfigError, load_config
from megatron_zaya.preconditions import check_run
from megatron_zaya.train.errors import TrainingError
from tests.distributed.layouts import CP2, EP2, PP2, RECOMPUTE_FULL, TP2
from tests.ranks import run_ranks
from tests.train.conftest import run_file, text_prefix  # noqa: F401 (fixtures)

LAYOUTS = {
    "tp2_ep2": TP2 | EP2,
    "ep2": EP2,
    "pp2_recompute": PP2 | RECOMPUTE_FULL,
    "cp2": CP2,
}
MODEL = ["model.num_query_groups=2", "model.num_moe_experts=4", "model.vocab_size=264", "model.skip_expert_bias=0.0"]


def losses_and_gradients(job, attach) -> tuple[float, dict[str, torch.Tensor], object]:
    """Run one global batch, always the same, without stepping; ``attach`` is a context of recording or replaying."""
    from megatron_zaya.data.sampler import evaluation_batches
    from megatron_zaya.train.step import _run_schedule, _take_router_counts

    groups = job.pg_collection
    size = job.config.schedule.micro_batch_size
    data = [evaluation_batches(job.valid_dataset, size, groups.dp.rank(), groups.dp.size()) for _ in job.model]
    for chunk in job.model:
        chunk.zero_grad_buffer()
    with attach as source:
        loss = _run_schedule(job, data, job.num_microbatches, forward_only=False)
    _take_router_counts(job)
    torch.distributed.all_reduce(loss, group=groups.dp_cp)
    torch.distributed.all_reduce(loss, group=groups.pp)
    chunk = job.model[-1].module
    gradients = {chunk.global_name(n): p.main_grad.clone() for n, p in chunk.named_parameters() if "router" in n}
    return loss[0].item(), gradients, source


def replay_in_turn(path: Path, layouts: dict[str, dict]) -> dict[str, dict]:
    """Run on each rank, for every layout: record, replay, force others."""
    from launch.env import read_rank_env
    from megatron_zaya.train.router_replay import recording, replaying
    from megatron_zaya.train.setup import build_job, distributed_world, release_job

    env = read_rank_env()
    results = {}
    base = [*MODEL, "schedule.eval_interval=100", "schedule.eval_iters=1", "parallel.use_distributed_optimizer=false"]
    with distributed_world(load_config(path), env) as device:
        for name, parallel in layouts.items():
            overrides = [*base, f"run.name={name}", *(f"parallel.{key}={value}" for key, value in parallel.items())]
            job = build_job(load_config(path, overrides), env, device)
            loss, gradients, record = losses_and_gradients(job, recording(job))
            choices = record.gather()
            again, same, replay = losses_and_gradients(job, replaying(job, choices))
            other = (choices + 1) % 5
            forced, forced_gradients, away = losses_and_gradients(job, replaying(job, other))
            results[name] = {
                "loss": (loss, again, forced),
                "same": all(torch.equal(gradients[n], same[n]) for n in gradients),
                "finite": all(torch.isfinite(g).all().item() for g in forced_gradients.values()),
                "moved": any(not torch.equal(gradients[n], g) for n, g in forced_gradients.items()),
                "choices": choices.numpy(),
                "dp": job.pg_collection.dp.rank(),
                "divergence": (max(replay.divergence().values()), min(away.divergence().values())),
            }
            release_job(job)
    return results


def train_in_turn(path: Path, runs: dict[str, list[str]]) -> dict[str, list[dict]]:
    """Run on each rank: train two steps with every list of overrides; return the step events."""
    from launch.env import read_rank_env
    from megatron_zaya.telemetry.jsonl import steps_by_iteration
    from megatron_zaya.train.loop import train
    from megatron_zaya.train.setup import build_job, distributed_world, release_job

    env, steps = read_rank_env(), {}
    with distributed_world(load_config(path), env) as device:
        for name, overrides in runs.items():
            short = ["schedule.train_iters=2", "schedule.lr_decay_iters=2", "data.num_workers=0", f"run.name={name}"]
            config = load_config(path, [*MODEL, *short, *overrides])
            job = build_job(config, env, device)
            train(job, [])
            job.events.close()
            release_job(job)
            if env.rank == 0:
                steps[name] = list(steps_by_iteration(config.run_dir / "metrics.jsonl").values())
    return steps


@pytest.fixture(scope="module")
def sessions(tmp_path_factory, text_prefix):  # noqa: F811
    """Step events of whole runs on two ranks, and the folder of their files."""
    folder = tmp_path_factory.mktemp("replay")
    path = run_file.__wrapped__(folder, text_prefix)
    run_ranks(train_in_turn, 1, path, {"one_records": [f"run.router_replay.record={folder / 'one'}"]})
    (folder / "shifted").mkdir()
    for file in (folder / "one").iterdir():
        np.save(folder / "shifted" / file.name, (np.load(file) + 1) % 5)
    layouts = {name: [f"parallel.{key}={value}" for key, value in given.items()] for name, given in LAYOUTS.items()}
    runs = {
        "records": [*layouts["ep2"], f"run.router_replay.record={folder / 'two'}"],
        "replays": [*layouts["ep2"], f"run.router_replay.replay={folder / 'two'}"],
    }
    for name, layout in layouts.items():
        runs[name] = [*layout, f"run.router_replay.replay={folder / 'shifted'}"]
    return run_ranks(train_in_turn, 2, path, runs)[0], folder


@pytest.fixture(scope="module")
def replayed(tmp_path_factory, text_prefix):  # noqa: F811
    """The single steps: of two ranks, and of one."""
    path = run_file.__wrapped__(tmp_path_factory.mktemp("steps"), text_prefix)
    one = run_ranks(replay_in_turn, 1, path, {"one": {}})[0]["one"]
    return run_ranks(replay_in_turn, 2, path, LAYOUTS), one


def test_a_run_that_is_forced_to_its_own_choices_is_the_same_run(sessions):
    steps, _ = sessions
    for key in ("loss", "grad_norm", "skip_rate", "max_expert_load"):
        assert [step[key] for step in steps["replays"]] == [step[key] for step in steps["records"]]
    assert all(step["router_divergence"] == step["max_router_divergence"] == 0.0 for step in steps["replays"])
    assert all(step["router_divergence"] is None for step in steps["records"])


def test_two_data_parallel_ranks_write_the_file_that_one_rank_writes(sessions):
    _, folder = sessions
    for number in (1, 2):
        ours, theirs = (np.load(folder / name / f"step_{number:07d}.npy") for name in ("two", "one"))
        assert ours.shape == theirs.shape == (8, 2, 32) and ours.dtype.kind == "i"
        assert (ours == theirs).mean() > 0.99 and ours.max() == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_obeys_a_file(sessions, layout):
    """Choices that are not its own, from one rank's file."""
    steps, _ = sessions
    own, forced = steps["records"], steps[layout]
    assert all(0.5 < step["router_divergence"] <= step["max_router_divergence"] <= 1.0 for step in forced)
    assert forced[0]["loss"] != own[0]["loss"] and np.isfinite([step["grad_norm"] for step in forced]).all()
    for step, other in zip(forced, steps["ep2"], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["router_divergence"] == pytest.approx(other["router_divergence"], abs=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_choices_reproduce_the_step_bit_for_bit(replayed, layout):
    for rank in replayed[0]:
        loss, again, forced = rank[layout]["loss"]
        assert again == loss and rank[layout]["same"]
        assert forced != loss and rank[layout]["finite"] and rank[layout]["moved"]
        assert rank[layout]["divergence"][0] == 0.0 and rank[layout]["divergence"][1] > 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_records_what_one_rank_records(replayed, layout):
    """The global choices, put together from the parts of stages, sequences and data-parallel ranks."""
    ranks, one = replayed
    theirs = one["choices"].transpose(0, 2, 1, 3).reshape(-1, *one["choices"].shape[1::2])
    by_dp = {rank[layout]["dp"]: rank[layout]["choices"].transpose(0, 2, 1, 3) for rank in ranks}
    parts = [by_dp[number] for number in sorted(by_dp)]
    ours = np.stack(parts, axis=1).reshape(theirs.shape)
    assert set(np.unique(ours)) == set(range(5)), "experts and the skip class must all occur"
    assert (ours == theirs).mean() > 0.999
    assert ranks[0][layout]["loss"][0] == pytest.approx(one["loss"][0], rel=1e-4)


def mistakes(path: Path, folder: Path) -> list[str]:
    """Run on one rank: what wrong choices are answered with."""
    from launch.env import read_rank_env
    from megatron_zaya.train.loop import train
    from megatron_zaya.train.router_files import read_choices
    from megatron_zaya.train.router_replay import Replay
    from megatron_zaya.train.setup import build_job, distributed_world

    messages = []
    with distributed_world(load_config(path), read_rank_env()) as device:
        job = build_job(load_config(path, MODEL), read_rank_env(), device)
        good = torch.zeros(4, 2, 2, 32, dtype=torch.int64)
        np.save(folder / "good.npy", np.zeros((8, 2, 32), dtype=np.int16))
        assert torch.equal(read_choices(folder / "good.npy", job), good)
        np.save(folder / "short.npy", np.zeros((8, 2, 31), dtype=np.int16))
        np.save(folder / "step_0000001.npy", np.full((8, 2, 32), 5, dtype=np.int16))
        job.config.run.router_replay.replay = str(folder)
        for attempt in (
            lambda: train(job, []),
            lambda: Replay(job, good[:3]),
            lambda: Replay(job, good + 5),
            lambda: Replay(job, good.float()),
            lambda: read_choices(folder / "short.npy", job),
            lambda: read_choices(folder / "none.npy", job),
        ):
            try:
                attempt()
            except TrainingError as error:
                messages.append(str(error))
    return messages


def test_choices_that_do_not_fit_are_refused(run_file, tmp_path):
    trained, shape, span, kind, file, absent = run_ranks(mistakes, 1, run_file, tmp_path)[0]
    assert "step_0000001.npy: choices run from 5 to 5; experts are 0 to 3, and 4 skips" in trained
    assert "shape [3, 2, 2, 32]; this rank's step needs [4, 2, 2, 32]" in shape
    assert "from 5 to 5; experts are 0 to 3, and 4 skips" in span
    assert "must be integers" in kind
    assert "short.npy: holds int16 [8, 2, 31]; the step needs integers [8, 2, 32]" in file
    assert "none.npy: cannot be read" in absent


def test_a_run_file_cannot_ask_for_both_nor_for_what_is_not_there(run_file, tmp_path):
    with pytest.raises(ConfigError, match="record and replay exclude each other"):
        load_config(run_file, ["run.router_replay.record=a", "run.router_replay.replay=b"])
    config = load_config(run_file, [f"run.router_replay.replay={tmp_path / 'none'}"])
    with pytest.raises(ConfigError, match=r"run\.router_replay\.replay='.*none': no such folder"):
        check_run(config, 1)
