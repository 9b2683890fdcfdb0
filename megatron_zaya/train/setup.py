"""The composition root: from a run configuration and a rank to a TrainingJob. Read it top to bottom.

process groups -> model -> DDP -> optimizer and schedule -> data -> telemetry -> checkpoint to start from
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection

from ckpt.checkpointer import Checkpointer
from ckpt.retention import Retention
from ckpt.tiers import recover
from megatron_zaya.compat import cpu
from megatron_zaya.compat.host_memory import keep_freed_memory
from megatron_zaya.config import RunConfig, dump_config
from megatron_zaya.data.datasets import Datasets, build_datasets, order_fingerprint
from megatron_zaya.data.sampler import ResumableSampler, build_dataloader
from megatron_zaya.model.init import initialise
from megatron_zaya.model.sharding import reduce_replica_gradients
from megatron_zaya.model.specs import zaya_layer_spec
from megatron_zaya.model.transformer_config import zaya_transformer_config
from megatron_zaya.model.zaya_model import EMBEDDING, ZayaModel
from megatron_zaya.optim import table
from megatron_zaya.optim.balancing import BiasBalancer
from megatron_zaya.optim.build import build_optimizer, build_scheduler
from megatron_zaya.parallel.groups import build_process_groups, release_process_groups
from megatron_zaya.parallel.pipeline import ZayaP2PCommunicator
from megatron_zaya.plan.hardware import accelerators
from megatron_zaya.plan.layout import pipeline_stages
from megatron_zaya.preconditions import checkpoint_to_load
from megatron_zaya.telemetry.events import Event, Loaded, Restarted
from megatron_zaya.telemetry.heartbeat import Heartbeat
from megatron_zaya.telemetry.sinks import build_sinks
from megatron_zaya.telemetry.stream import EventStream
from megatron_zaya.train.callbacks.base import Callback
from megatron_zaya.train.callbacks.checkpoint import SaveCheckpoints
from megatron_zaya.train.callbacks.drill import Drills
from megatron_zaya.train.callbacks.evaluate import Evaluate
from megatron_zaya.train.callbacks.heartbeat import Beat
from megatron_zaya.train.callbacks.profile import Profile
from megatron_zaya.train.callbacks.switches import SwitchFiles
from megatron_zaya.train.checkpoint import load_job
from megatron_zaya.train.state import TrainingJob, TrainState
from megatron_zaya.train.timing import StepTimer

if TYPE_CHECKING:
    from launch.env import RankContext


@contextlib.contextmanager
def distributed_world(config: RunConfig, env: RankContext) -> Iterator[torch.device]:
    """Join the job's world for the duration of the block; yield the device of this rank."""
    if cpu.install():
        keep_freed_memory()
    accelerator = cpu.has_accelerator()
    if accelerator:
        torch.cuda.set_device(env.device_index)
    backend = config.run.backend
    if backend == "auto":
        backend = "nccl" if accelerator else "gloo"
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it; without effect on ROCm
        torch.use_deterministic_algorithms(True)
    timeout = datetime.timedelta(seconds=config.run.distributed_timeout_s)
    if env.is_single:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        torch.distributed.init_process_group(backend, rank=env.rank, world_size=env.world_size, timeout=timeout)
    try:
        yield cpu.device()
    finally:
        release_process_groups()
        torch.distributed.destroy_process_group()
        torch.use_deterministic_algorithms(False)


def build_stages(config: RunConfig, pg_collection: ProcessGroupCollection) -> list[ZayaModel]:
    """Return the pipeline stages of this rank, uninitialised, in the order a token passes them."""
    transformer = zaya_transformer_config(config)
    transformer.calculate_per_token_loss = True
    stages = pipeline_stages(config)
    size, rank = pg_collection.pp.size(), pg_collection.pp.rank()
    interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
    return [
        ZayaModel(
            transformer,
            zaya_layer_spec(),
            config.model.vocab_size,
            config.model.max_position_embeddings,
            pg_collection,
            share_embeddings_and_output_weights=config.model.share_embeddings_and_output_weights,
            pre_process=number == 0,
            post_process=number == len(stages) - 1,
            first_layer=stages[number].first_layer,
            num_local_layers=stages[number].num_layers,
            vp_stage=index if interleaved else None,
        )
        for index, number in enumerate(range(rank, len(stages), size))
    ]


def _finalize_gradients(model: list[DistributedDataParallel], *args, pg_collection: ProcessGroupCollection, **kwargs):
    """Megatron-Core's reductions, then that over the replicas of key-value heads."""
    finalize_model_grads(model, *args, pg_collection=pg_collection, **kwargs)
    reduce_replica_gradients(model)


def build_model(
    config: RunConfig, pg_collection: ProcessGroupCollection, device: torch.device
) -> list[DistributedDataParallel]:
    """Return the initialised stages of this rank, each wrapped in Megatron-Core's DistributedDataParallel."""
    parallel = config.parallel
    gathers_early = parallel.overlap_param_gather and parallel.use_distributed_optimizer  # nothing to gather otherwise
    stages = build_stages(config, pg_collection)
    transformer = stages[0].config
    chunks = []
    for index, stage in enumerate(stages):
        initialise(stage.to(device), transformer, config.run.seed)
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=gathers_early,
            grad_reduce_in_fp32=parallel.grad_reduce_in_fp32,
            bucket_size=parallel.ddp_bucket_size,
        )
        # Only the first stage of a rank has its gradients ready early enough to gain from buckets.
        chunk = DistributedDataParallel(
            transformer, ddp_config, stage, disable_bucketing=index > 0, pg_collection=pg_collection
        )
        chunk.broadcast_params()
        chunks.append(chunk)
    transformer.finalize_model_grads_func = partial(_finalize_gradients, pg_collection=pg_collection)
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        transformer.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    if gathers_early:
        param_sync = [chunk.start_param_sync for chunk in chunks]
        transformer.param_sync_func = param_sync if len(chunks) > 1 else param_sync[0]
    return chunks


def _build_data(config: RunConfig, env: RankContext) -> Datasets:
    schedule = config.schedule
    held_out = schedule.eval_iters * schedule.global_batch_size if schedule.eval_interval else 0
    return build_datasets(
        config.data,
        train_samples=schedule.train_samples,
        valid_samples=held_out,
        seed=config.run.seed,
        local_rank=env.local_rank,
    )


def _count_parameters(config: RunConfig, rows: list[table.Row]) -> tuple[int, int]:
    """Return the sizes of the whole model: all parameters, and those a token passes without the embedding."""
    total, experts = sum(row.numel for row in rows), sum(row.numel for row in rows if row.is_expert)
    embedding = sum(row.numel for row in rows if row.name == EMBEDDING)
    return total, total - embedding - experts + experts // config.model.num_moe_experts


def peak_tflops(device: torch.device) -> float | None:
    """Return the vendor's dense BF16 peak of an accelerator that the planner knows, or None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((known.peak_tflops for known in accelerators().values() if known.name in name), None)


def _build_events(config: RunConfig, env: RankContext) -> EventStream:
    """Rank 0 has the sinks; the run folder gets the resolved configuration."""
    if env.rank != 0:
        return EventStream()
    folder = config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return EventStream(build_sinks(config, env.job_labels))


def build_callbacks(config: RunConfig, env: RankContext) -> Sequence[Callback]:
    """Return what happens between steps, in order: obey switch files, evaluate, save, fail on purpose, sign of life."""
    callbacks: list[Callback] = [SwitchFiles(config.run_dir, env.rank)]
    if config.schedule.eval_interval:
        callbacks.append(Evaluate(config.schedule.eval_interval))
    wanted = config.checkpoint
    checkpointer = Checkpointer(
        config.checkpoint_dir,
        retention=Retention(wanted.keep_last, wanted.keep_every),
        max_host_bytes=wanted.max_host_bytes,
        commit_timeout_s=wanted.commit_timeout_s,
        stall_timeout_s=wanted.stall_timeout_s,
        local=config.local_checkpoint_dir,
    )
    callbacks.append(SaveCheckpoints(checkpointer, wanted.save_interval, wanted.save_at_end))
    callbacks.append(Drills(env.supervision.drill, env.rank, env.supervision.attempt))
    if config.profile.profile_step_start is not None:
        callbacks.append(Profile(config, env.rank))
    callbacks.append(Beat())
    return callbacks


def assemble_job(config: RunConfig, device: torch.device) -> TrainingJob:
    """Build what a step computes with: groups, model, optimizer, balancer; no data, telemetry or start state yet.

    The dry run of the planner stops here. Collective.
    """
    pg_collection = build_process_groups(config.parallel, config.run.seed, config.model.num_query_groups)
    model = build_model(config, pg_collection, device)
    optimizer = build_optimizer(config, model, pg_collection)
    scheduler = build_scheduler(config, optimizer)
    balancer = BiasBalancer(
        {layer.layer_number - 1: layer.mlp.router for chunk in model for layer in chunk.module.layers},
        config.optimizer.moe_router_bias_update_rate,
        config.optimizer.skip_expert_target,
    )
    job = TrainingJob(
        config=config,
        device=device,
        pg_collection=pg_collection,
        model=model,
        p2p=ZayaP2PCommunicator(pg_collection.pp, model[0].config),
        optimizer=optimizer,
        scheduler=scheduler,
        balancer=balancer,
        train_data=[],
        valid_dataset=None,
        state=TrainState(),
        events=EventStream(),
        timer=StepTimer(device),
    )
    finalize = model[0].config.finalize_model_grads_func
    model[0].config.finalize_model_grads_func = job.timer.around(finalize)
    return job


def build_job(config: RunConfig, env: RankContext, device: torch.device) -> TrainingJob:
    """Build everything a rank needs, and load the checkpoint that the run starts from. Collective.

    Raises:
        ConfigError, DataError, CheckpointError: with the remedy in the message.
    """
    job = assemble_job(config, device)
    job.heartbeat = Heartbeat(env.supervision.heartbeat_file)
    pg_collection, model = job.pg_collection, job.model
    datasets = _build_data(config, env)
    job.valid_dataset = datasets.valid
    job.state.data_fingerprint = order_fingerprint(datasets.train)
    rows = table.rows_of(model, config.optimizer.optimizer, pg_collection.pp)
    job.parameters, job.optimizer_summary = _count_parameters(config, rows), table.summary(rows)
    job.peak_tflops = config.telemetry.peak_tflops or peak_tflops(device)
    news: list[Event] = []
    if config.local_checkpoint_dir is not None:
        recover(config.checkpoint_dir, config.local_checkpoint_dir)
    start = checkpoint_to_load(config)
    if start is not None:
        report = load_job(job, *start)
        job.resumed_from = f"{start[0]} iteration {report.iteration}"
        news.append(
            Loaded(report.iteration, str(report.folder), report.seconds, report.bytes_read, len(report.skipped))
        )
    job.attempt = env.supervision.attempt
    if job.attempt:
        news.append(Restarted(job.state.iteration, job.attempt, list(env.supervision.causes)))
    if job.state.iteration < config.schedule.train_iters:
        sampler = ResumableSampler(
            config.schedule.train_samples,
            job.state.consumed_samples,
            config.schedule.micro_batch_size,
            pg_collection.dp.rank(),
            pg_collection.dp.size(),
        )
        job.train_data = [iter(build_dataloader(datasets.train, sampler, config.data.num_workers)) for _ in model]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda received, frame: setattr(job, "stop_signal", received))
    job.events = _build_events(config, env)
    for event in news:
        job.events.emit(event)
    if env.rank == 0:
        (config.run_dir / "optimizer.txt").write_text(table.text(rows), encoding="utf-8")
    job.heartbeat.beat("first step", job.state.iteration)
    return job


def release_job(job: TrainingJob) -> None:
    """Free a job's memory and process groups, for the next job of this process. Collective; ends the job's use.

    Hooks of Megatron-Core's DistributedDataParallel, and views of parameters that its optimizer keeps, hold the model
    through autograd's nodes, where the garbage collector does not follow: gradients, optimizer state, sockets and
    threads would stay.
    """
    for chunk in job.model:
        chunk.grad_accs.clear()
        chunk.config.grad_scale_func = None
    job.model.clear()
    del job.optimizer, job.scheduler, job.balancer
    gc.collect()
    release_process_groups()
