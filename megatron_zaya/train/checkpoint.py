"""The whole state of a job as one sharded state dict and back: weights, optimizer, balancing, cursor, random state."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject

from ckpt.mcore import Checkpointer
from megatron_zaya.compat.mcore import allocate_adam_state, load_optimizer_state
from megatron_zaya.config import ConfigError, RunConfig
from megatron_zaya.train.state import TrainingJob, TrainState


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def _sharded_state(job: TrainingJob, with_optimizer: bool, loading: bool) -> dict[str, Any]:
    groups = job.pg_collection
    metadata = {"dp_cp_group": groups.dp_cp, "chained_optim_avoid_prefix": True}
    model: dict[str, Any] = {}
    for index, chunk in enumerate(job.model):
        model[f"model{index}"] = chunk.module.sharded_state_dict(metadata=metadata)
    state = dict(model)
    if not with_optimizer:
        return state
    state["optimizer"] = job.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    state["balancing"] = job.balancer.sharded_state_dict(groups)
    state["scheduler"] = job.scheduler.state_dict()
    state["train_state"] = dataclasses.asdict(job.state)
    state["config"] = job.config.model_dump(mode="json")
    # Random numbers differ between model-parallel ranks and are equal over data-parallel ones.
    shape, position = (groups.pp.size(), groups.tp.size()), (groups.pp.rank(), groups.tp.rank())
    replica = groups.dp_cp.rank()
    state["rng"] = ShardedObject("rng", _rng_state(), shape, position, replica_id=replica)
    return state


def save_job(checkpointer: Checkpointer, job: TrainingJob) -> Path:
    """Save the job under its iteration. Collective, blocking."""
    return checkpointer.save(job.state.iteration, _sharded_state(job, with_optimizer=True, loading=False))


def _check_same_model(saved: dict[str, Any], config: RunConfig, folder: Path) -> None:
    ours = config.model.model_dump(mode="json")
    differing = [
        f"{key}: {saved['model'].get(key)!r} there, {value!r} here"
        for key, value in ours.items()
        if saved["model"].get(key) != value
    ]
    if differing:
        raise ConfigError(f"checkpoint {folder} holds another model; model.{'; model.'.join(differing)}")


def load_job(job: TrainingJob, root: Path, iteration: int) -> None:
    """Load a step into the job, in place. Collective.

    With `checkpoint.load_optimizer: false` only the weights are taken and the run starts at iteration 0.

    Raises:
        ConfigError: the checkpoint holds another model, or was trained on other data.
        CheckpointError: it cannot be read.
    """
    checkpointer = Checkpointer(root)
    everything = job.config.checkpoint.load_optimizer
    _check_same_model(checkpointer.load_common(iteration)["config"], job.config, root)
    allocate_adam_state(job.optimizer)
    template = _sharded_state(job, everything, loading=True)
    state = checkpointer.load(iteration, template, partial=not everything)
    for index, chunk in enumerate(job.model):
        chunk.module.load_state_dict(state[f"model{index}"], strict=False)  # completeness was checked by the read
    if not everything:
        job.optimizer.reload_model_params()
        return
    load_optimizer_state(job.optimizer, state["optimizer"])
    job.balancer.load_state_dict(state["balancing"])
    job.scheduler.load_state_dict(state["scheduler"])
    loaded = TrainState(**state["train_state"])
    if loaded.data_fingerprint != job.state.data_fingerprint:
        raise ConfigError(
            f"checkpoint {root} (iteration {iteration}) was trained on another order of samples "
            f"({loaded.data_fingerprint} there, {job.state.data_fingerprint} here): data.*, run.seed or the number of "
            "epochs differ; restore them, or start from its weights with checkpoint.load_optimizer=false"
        )
    job.state = loaded
    _set_rng_state(state["rng"])
