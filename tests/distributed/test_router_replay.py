"""Recorded choices reproduce a step bit for bit under every kind of parallelism; forced ones leave gradients right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_zaya.config import load_config
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
    from megatron_zaya.parallel.groups import release_process_groups
    from megatron_zaya.train.router_replay import recording, replaying
    from megatron_zaya.train.setup import build_job, distributed_world

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
            release_process_groups()
    return results


@pytest.fixture(scope="module")
def replayed(tmp_path_factory, text_prefix):  # noqa: F811
    path = run_file.__wrapped__(tmp_path_factory.mktemp("replay"), text_prefix)
    return run_ranks(replay_in_turn, 2, path, LAYOUTS), run_ranks(replay_in_turn, 1, path, {"one": {}})[0]["one"]


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
    from megatron_zaya.train.router_replay import Replay, read_choices
    from megatron_zaya.train.setup import build_job, distributed_world

    messages = []
    with distributed_world(load_config(path), read_rank_env()) as device:
        job = build_job(load_config(path, MODEL), read_rank_env(), device)
        good = torch.zeros(4, 2, 2, 32, dtype=torch.int64)
        np.save(folder / "good.npy", np.zeros((8, 2, 32), dtype=np.int16))
        assert torch.equal(read_choices(folder / "good.npy", job), good)
        np.save(folder / "short.npy", np.zeros((8, 2, 31), dtype=np.int16))
        for attempt in (
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
    shape, span, kind, file, absent = run_ranks(mistakes, 1, run_file, tmp_path)[0]
    assert "shape [3, 2, 2, 32]; this rank's step needs [4, 2, 2, 32]" in shape
    assert "from 5 to 5; experts are 0 to 3, and 4 skips" in span
    assert "must be integers" in kind
    assert "short.npy: holds int16 [8, 2, 31]; the step needs integers [8, 2, 32]" in file
    assert "none.npy: cannot be read" in absent
