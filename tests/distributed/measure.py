"""What each rank of a layout measures; test_layouts.py compares it with one rank.

The model has two layers, and four where a layout needs them for its stages.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from megatron_zaya.config import load_config
from tests.collectives import use_one_exchange
from tests.distributed.layouts import SAVED

STEPS = 20
GLOBAL_BATCH = 4
REFERENCES = {"plain": "one", "packed": "one_packed", "deep": "one_deep"}


def measure(run_file: Path, layouts: dict[str, dict]) -> dict[str, dict]:
    """Run on each rank: for every layout, its shards of logits and gradients, and the figures of the first steps."""
    from launch.env import read_rank_env
    from megatron_zaya.plan.layout import check_layout
    from megatron_zaya.train.setup import build_job, distributed_world, release_job
    from megatron_zaya.train.step import evaluate

    use_one_exchange()
    env = read_rank_env()
    results = {}
    with distributed_world(load_config(run_file), env) as device:
        for name, parallel in layouts.items():
            began, busy = time.perf_counter(), time.process_time()
            variant = variant_of(name, parallel)
            start = load_config(run_file, [f"run.name=start_{variant}"]).run_dir
            if not start.exists():
                make_start(run_file, variant, env, device)
            micro_batch = largest_micro_batch(env.world_size, parallel)
            overrides = [f"run.name={name}", f"schedule.micro_batch_size={micro_batch}", *changes(run_file, variant)]
            overrides += [f"checkpoint.load={start}", "checkpoint.load_optimizer=false"]
            overrides += [f"parallel.{key}={value}" for key, value in parallel.items()]
            # Whole gradients stay on the ranks when optimizer state is not sharded.
            whole = load_config(run_file, [*overrides, "parallel.use_distributed_optimizer=false"])
            check_layout(whole, env.world_size)
            job = build_job(whole, env, device)
            result = {"logits": logits_of(job), "gradients": gradients_of(job)}
            release_job(job)
            job = build_job(load_config(run_file, overrides), env, device)
            result["curve"] = curve_of(job)
            result["evaluation"] = evaluate(job)
            if name in (REFERENCES["plain"], *SAVED):
                save(job)
            release_job(job)
            result["seconds"] = time.perf_counter() - began
            result["processor_seconds"] = time.process_time() - busy
            results[name] = result
    return results


def variant_of(name: str, parallel: dict) -> str:
    """Return which run the layout trains: on packed documents, with layers for more than two stages, or plain."""
    if "packed" in name:
        return "packed"
    many_stages = {"virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"} & set(parallel)
    return "deep" if many_stages or "deep" in name else "plain"


def changes(run_file: Path, variant: str) -> list[str]:
    """Return what a variant changes in the run file."""
    if variant == "deep":
        return ["model.num_layers=4", "model.layer_types=[full, sliding, full, sliding]"]
    if variant == "packed":
        apart = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        return [f"data.data_path=[{run_file.parent / 'short'}]", *(f"data.{key}=true" for key in apart)]
    return []


def make_start(run_file: Path, variant: str, env, device) -> None:
    """Train two steps on this one rank and save: the global checkpoint that every layout starts from."""
    from megatron_zaya.train.setup import build_job, release_job
    from megatron_zaya.train.step import train_step

    config = load_config(run_file, [f"run.name=start_{variant}", *changes(run_file, variant)])
    job = build_job(config, env, device)
    for _ in range(2):
        train_step(job)
    save(job)
    release_job(job)


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
    from megatron_zaya.train.setup import build_job, distributed_world, release_job
    from megatron_zaya.train.step import train_step

    env = read_rank_env()
    losses = {}
    with distributed_world(load_config(run_file), env) as device:
        for name in names:
            folder = load_config(run_file, [f"run.name={name}"]).run_dir
            job = build_job(load_config(run_file, ["run.name=resumed", f"checkpoint.load={folder}"]), env, device)
            assert job.state.iteration == STEPS
            losses[name] = train_step(job).loss
            release_job(job)
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
    return [(r.loss, r.grad_norm, sum(r.load.skip_rate), r.load.max_expert_load) for r in results]
