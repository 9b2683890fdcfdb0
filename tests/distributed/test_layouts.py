"""Every layout computes what one rank computes: logits, gathered gradients, the first steps of training (fp32).

The layouts are data (layouts.py); this is the one runner. Ranks of equal number share their processes.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_zaya.config import load_config
from megatron_zaya.data.prepare import prepare
from megatron_zaya.parallel.sequence import merge_zigzag
from tests.collectives import use_one_exchange
from tests.distributed.layouts import LAYOUTS, PACKED, SAVED
from tests.ranks import run_ranks
from tests.train.conftest import run_file as make_run_file
from tests.train.conftest import text_prefix  # noqa: F401 (fixture)

TOLERANCE = 1e-5
STEPS = 20
GLOBAL_BATCH = 4
ALL = LAYOUTS | PACKED


def measure(run_file: Path, layouts: dict[str, dict], start: Path) -> dict[str, dict]:
    """Run on each rank: for every layout, its shards of logits and gradients, and the figures of the first steps."""
    from launch.env import read_rank_env
    from megatron_zaya.parallel.groups import release_process_groups
    from megatron_zaya.plan.layout import check_layout
    from megatron_zaya.train.setup import build_job, distributed_world
    from megatron_zaya.train.step import evaluate

    use_one_exchange()
    env = read_rank_env()
    results = {}
    with distributed_world(load_config(run_file), env) as device:
        if not start.exists():
            make_start(run_file, env, device)
        for name, parallel in layouts.items():
            micro_batch = largest_micro_batch(env.world_size, parallel)
            overrides = [f"run.name={name}", f"schedule.micro_batch_size={micro_batch}", f"checkpoint.load={start}"]
            overrides += ["checkpoint.load_optimizer=false"]
            overrides += [f"parallel.{key}={value}" for key, value in parallel.items()]
            if name.startswith("packed"):
                overrides += [f"data.{key}={value}" for key, value in packed_data(run_file).items()]
            # Whole gradients stay on the ranks when optimizer state is not sharded.
            whole = load_config(run_file, [*overrides, "parallel.use_distributed_optimizer=false"])
            check_layout(whole, env.world_size)
            job = build_job(whole, env, device)
            result = {"logits": logits_of(job), "gradients": gradients_of(job)}
            release_process_groups()
            began = time.perf_counter()
            job = build_job(load_config(run_file, overrides), env, device)
            result["curve"] = curve_of(job)
            result["evaluation"] = evaluate(job)
            result["seconds"] = time.perf_counter() - began
            if name in ("one", *SAVED):
                save(job)
            release_process_groups()
            results[name] = result
    return results


def packed_data(run_file: Path) -> dict[str, object]:
    """Return the changes of the data section that put several documents in a sample, kept apart."""
    apart = dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), True)
    return {"data_path": f"[{run_file.parent / 'short'}]"} | apart


def make_start(run_file: Path, env, device) -> None:
    """Train two steps on this one rank and save: the global checkpoint that every layout starts from."""
    from megatron_zaya.parallel.groups import release_process_groups
    from megatron_zaya.train.setup import build_job
    from megatron_zaya.train.step import train_step

    job = build_job(load_config(run_file, ["run.name=start"]), env, device)
    for _ in range(2):
        train_step(job)
    save(job)
    release_process_groups()


def save(job) -> None:
    from ckpt.checkpointer import Checkpointer
    from megatron_zaya.train.checkpoint import save_job

    checkpointer = Checkpointer(job.config.checkpoint_dir)
    save_job(checkpointer, job)
    checkpointer.wait()
    checkpointer.close()


def resume(run_file: Path, names: list[str]) -> dict[str, float]:
    """Run on one rank: load what each layout saved after its curve; return the loss of the next step."""
    from launch.env import read_rank_env
    from megatron_zaya.parallel.groups import release_process_groups
    from megatron_zaya.train.setup import build_job, distributed_world
    from megatron_zaya.train.step import train_step

    env = read_rank_env()
    losses = {}
    with distributed_world(load_config(run_file), env) as device:
        for name in names:
            folder = load_config(run_file, [f"run.name={name}"]).run_dir
            job = build_job(load_config(run_file, ["run.name=resumed", f"checkpoint.load={folder}"]), env, device)
            assert job.state.iteration == STEPS
            losses[name] = train_step(job).loss
            release_process_groups()
    return losses


def largest_micro_batch(world: int, parallel: dict) -> int:
    """Return a micro-batch size that leaves an interleaved schedule enough micro-batches."""
    pipeline = parallel.get("pipeline_model_parallel_size", 1)
    split = parallel.get("tensor_model_parallel_size", 1) * parallel.get("context_parallel_size", 1) * pipeline
    enough = pipeline if "virtual_pipeline_model_parallel_size" in parallel else 1
    return max(size for size in (1, 2) if GLOBAL_BATCH // (world // split) // size % enough == 0)


def logits_of(job) -> list[tuple[int, int, int, np.ndarray]]:
    """Return (sample, tensor- and context-parallel rank, logits) of every micro-batch, on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_zaya.data.sampler import evaluation_batches
    from megatron_zaya.train.step import read_batch

    groups = job.pg_collection
    micro_batch = job.config.schedule.micro_batch_size
    batches = [
        evaluation_batches(job.valid_dataset, micro_batch, groups.dp.rank(), groups.dp.size()) for _ in job.model
    ]

    def forward(data, model):
        batch = read_batch(data, job)
        logits = model(batch["tokens"], batch["position_ids"], None, cu_seqlens=batch["cu_seqlens"])
        return logits, lambda logits, non_loss_data: logits

    for chunk in job.model:
        chunk.eval()
    out = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=batches if len(batches) > 1 else batches[0],
        model=job.model if len(job.model) > 1 else job.model[0],
        num_microbatches=job.num_microbatches,
        seq_length=job.config.data.seq_length,
        micro_batch_size=micro_batch,
        forward_only=True,
        collect_non_loss_data=True,
        p2p_communicator=job.p2p,
        pg_collection=groups,
    )
    for chunk in job.model:
        chunk.train()
    # Micro-step i reads one micro-batch for each data-parallel rank in turn.
    first = [(i * groups.dp.size() + groups.dp.rank()) * micro_batch for i in range(len(out))]
    samples = [(i + j, sample) for i, logits in zip(first, out, strict=True) for j, sample in enumerate(logits)]
    return [(sample, groups.tp.rank(), groups.cp.rank(), logits.detach().numpy()) for sample, logits in samples]


def gradients_of(job) -> dict[str, tuple]:
    """Return for each parameter of this rank: global shape, offset of its shard, gradient over the global batch."""
    from megatron_zaya.train.step import _run_schedule

    for chunk in job.model:
        chunk.zero_grad_buffer()
    _run_schedule(job, job.train_data, job.num_microbatches, forward_only=False)
    shards = []
    for chunk in job.model:
        described = chunk.module.sharded_state_dict()
        for name, parameter in chunk.module.named_parameters():
            tensor = described[name]
            shards.append((tensor.key, tensor.global_shape, tensor.global_offset, parameter.main_grad.numpy().copy()))
    return shards


def curve_of(job) -> list[tuple[float, ...]]:
    from megatron_zaya.train.step import train_step

    results = [train_step(job) for _ in range(STEPS)]
    return [(r.loss, r.grad_norm, r.skip_rate, r.max_expert_load) for r in results]


def assemble_shards(ranks: list[list]) -> dict[str, np.ndarray]:
    """Put the shards of all ranks together; copies of one shard must agree on every rank."""
    whole: dict[str, np.ndarray] = {}
    for shards in ranks:
        for key, shape, offset, gradient in shards:
            target = whole.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
            part = target[tuple(slice(o, o + n) for o, n in zip(offset, gradient.shape, strict=True))]
            if np.isnan(part).all():
                part[...] = gradient
            else:
                assert_close(gradient, part, f"copies of {key}")
    assert not any(np.isnan(gradient).any() for gradient in whole.values())
    return whole


def assemble_logits(ranks: list[list]) -> dict[int, np.ndarray]:
    """Put the vocabulary (tensor parallel) and the sequence (context parallel) of each sample together."""
    parts: dict[int, dict[int, dict[int, np.ndarray]]] = {}
    for shards in ranks:
        for sample, tp_rank, cp_rank, logits in shards:
            parts.setdefault(sample, {}).setdefault(cp_rank, {})[tp_rank] = logits
    whole = {}
    for sample, by_rank in parts.items():
        rows = [np.concatenate([p[r] for r in sorted(p)], axis=-1) for _, p in sorted(by_rank.items())]
        whole[sample] = merge_zigzag([torch.from_numpy(part) for part in rows], dim=0).numpy()
    return whole


def assert_close(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    scale = np.abs(theirs).max()
    error = np.abs(ours - theirs).max()
    assert error <= TOLERANCE * scale, f"{what}: {error / scale if scale else error:.2e}"


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory, text_prefix):  # noqa: F811
    """Results by layout, of those that tests were selected for: gradients, logits, curve. "one" is the reference."""
    selected = {
        item.callspec.params["layout"]
        for item in request.session.items
        if hasattr(item, "callspec") and "layout" in item.callspec.params
    }
    path = make_run_file.__wrapped__(tmp_path_factory.mktemp("layouts"), text_prefix)
    tree = yaml.safe_load(path.read_text())
    tree["model"] |= dict(num_layers=4, num_attention_heads=8, num_query_groups=2, kv_channels=8)
    tree["model"] |= dict(num_moe_experts=4, vocab_size=264)
    tree["model"] |= dict(layer_types=["full", "sliding", "full", "sliding"], sliding_window=9, skip_expert_bias=0.0)
    tree["schedule"] |= dict(
        train_iters=STEPS + 2, micro_batch_size=2, global_batch_size=GLOBAL_BATCH, eval_interval=100, eval_iters=1
    )
    tree["data"] |= dict(seq_length=32)
    tree["optimizer"] = {"lr": 1e-3, "min_lr": 1e-3}
    path.write_text(yaml.safe_dump(tree))
    texts = path.parent / "texts"
    texts.mkdir()
    for i in range(200):
        (texts / f"{i:03d}.txt").write_text(f"{i * i}: " + "ab cd ef gh"[: i % 13])
    prepare([texts], path.parent / "short", workers=1)
    results = {}
    worlds = {1: {"one": {}, "packed_one": {}}}
    for name, (world, parallel) in ALL.items():
        if name in selected:
            worlds.setdefault(world, {})[name] = parallel
    for world, layouts in worlds.items():
        ranks = run_ranks(measure, world, path, layouts, path.parent / "runs" / "start")
        for name in layouts:
            print(f"{name}: {ranks[0][name]['seconds']:.1f} s")
            results[name] = {
                "gradients": assemble_shards([rank[name]["gradients"] for rank in ranks]),
                "logits": assemble_logits([rank[name]["logits"] for rank in ranks]),
                "curve": ranks[0][name]["curve"],
                "evaluation": ranks[0][name]["evaluation"],
            }
    saved = ["one", *sorted(selected & set(SAVED))]
    for name, loss in run_ranks(resume, 1, path, saved)[0].items():
        results[name]["loss after resuming on one rank"] = loss
    return results


def both(measured: dict, layout: str, what: str) -> tuple:
    """Return a result of the layout and of its reference."""
    return measured[layout][what], measured["packed_one" if layout.startswith("packed") else "one"][what]


@pytest.mark.parametrize("layout", ALL)
def test_logits_equal_those_of_one_rank(measured, layout):
    ours, one = both(measured, layout, "logits")
    assert set(ours) == set(one)
    for sample, logits in one.items():
        assert_close(ours[sample], logits, f"sample {sample}")


@pytest.mark.parametrize("layout", ALL)
def test_every_gathered_gradient_equals_that_of_one_rank(measured, layout):
    ours, one = both(measured, layout, "gradients")
    assert set(ours) == set(one)
    for name, gradient in one.items():
        assert_close(ours[name], gradient, name)


@pytest.mark.parametrize("layout", ALL)
def test_the_loss_curve_equals_those_of_one_rank(measured, layout):
    ours, one = (np.array(curve) for curve in both(measured, layout, "curve"))
    np.testing.assert_allclose(ours[:, 0], one[:, 0], rtol=TOLERANCE)
    np.testing.assert_allclose(ours[:, 1], one[:, 1], rtol=10 * TOLERANCE)
    np.testing.assert_allclose(ours[:, 2:], one[:, 2:], rtol=TOLERANCE, err_msg="skip rate, load of the busiest expert")
    (our_loss, our_tokens), (loss, tokens) = both(measured, layout, "evaluation")
    assert our_tokens == tokens and our_loss == pytest.approx(loss, rel=TOLERANCE)


@pytest.mark.parametrize("layout", SAVED)
def test_one_rank_resumes_what_a_layout_saved(measured, layout):
    ours, one = (measured[name]["loss after resuming on one rank"] for name in (layout, "one"))
    assert ours == pytest.approx(one, rel=TOLERANCE)


def test_packed_samples_hold_several_documents(measured):
    """The loss mask leaves out the last token of each document, so the evaluations count documents."""
    batches = GLOBAL_BATCH * 32
    assert measured["one"]["evaluation"][1] == batches
    assert batches - 40 < measured["packed_one"]["evaluation"][1] < batches - 4


def test_the_reference_exercises_several_experts(measured):
    gradient = measured["one"]["gradients"]["layers.1.mlp.experts.linear_fc1"]
    assert (np.abs(gradient).reshape(4, -1).max(axis=1) > 0).sum() >= 2
