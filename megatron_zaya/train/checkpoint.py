"""The whole state of a job to a checkpoint and back: its tensors (shards.py), and the rest as one JSON value."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from ckpt.checkpointer import Checkpointer
from ckpt.restore import LoadReport
from ckpt.save import Save
from ckpt.steps import newest_valid
from megatron_zaya.compat.mcore import allocate_optimizer_state, set_steps_done, steps_done
from megatron_zaya.config import ConfigError, RunConfig
from megatron_zaya.preconditions import begins_phase
from megatron_zaya.train.shards import RNG, job_shards, optimizer_parts, random_shards, set_random_state
from megatron_zaya.train.state import TrainingJob, TrainState

logger = logging.getLogger(__name__)


def _common(job: TrainingJob) -> dict[str, Any]:
    """Return what is saved besides tensors, equal on all ranks."""
    return {
        "config": job.config.model_dump(mode="json"),
        "train_state": dataclasses.asdict(job.state),
        "scheduler": job.scheduler.state_dict(),
        "optimizer_steps": steps_done(optimizer_parts(job.optimizer)),
    }


def save_job(checkpointer: Checkpointer, job: TrainingJob) -> Save:
    """Start to save the job under its iteration; training may go on when this returns. All ranks call it."""
    shards = job_shards(job, with_optimizer=True, loading=False, allocate=allocate_optimizer_state)
    shards += random_shards(job).values()
    layout = job.config.parallel.model_dump(mode="json") | {"data_parallel_size": job.data_parallel_size}
    return checkpointer.save(job.state.iteration, shards, _common(job), layout=layout)


MAY_CHANGE_BETWEEN_PHASES = {"rotary_base", "sliding_rotary_base", "max_position_embeddings"}


def _check_same_model(saved: dict[str, Any], config: RunConfig, folder: Path, new_phase: bool) -> None:
    ours = config.model.model_dump(mode="json", exclude=MAY_CHANGE_BETWEEN_PHASES if new_phase else None)
    differing = [
        f"{key}: {saved['model'].get(key)!r} there, {value!r} here"
        for key, value in ours.items()
        if saved["model"].get(key) != value
    ]
    if differing:
        raise ConfigError(f"checkpoint {folder} holds another model; model.{'; model.'.join(differing)}")


def load_job(job: TrainingJob, root: Path, iteration: int | None) -> LoadReport:
    """Load a step into the job, in place. Collective.

    With `checkpoint.load_optimizer: false` only the weights are taken and the run starts at iteration 0. At the
    beginning of a phase weights, optimizer and balancing state are taken; cursor and schedule start at 0.

    Args:
        job: the run.
        root: folder of the steps.
        iteration: the step; None takes the newest that is valid.

    Raises:
        ConfigError: the checkpoint holds another model, or was trained on other data.
        CheckpointError: it cannot be read.
    """
    everything = job.config.checkpoint.load_optimizer
    new_phase = begins_phase(job.config, root)
    _check_same_model(newest_valid(root, iteration).common["config"], job.config, root, new_phase)
    shards = job_shards(job, with_optimizer=everything, loading=True, allocate=allocate_optimizer_state)
    generators = random_shards(job) if everything else {}
    checkpointer = Checkpointer(root)
    wanted = [*shards, *generators.values()]
    report = checkpointer.load(wanted, iteration, partial=not everything, optional=RNG)
    if not everything:
        job.optimizer.reload_model_params()
        return report
    common = report.common
    loaded = TrainState(**common["train_state"])
    set_steps_done(optimizer_parts(job.optimizer), common["optimizer_steps"])
    if new_phase:
        job.state.balancing_updates = loaded.balancing_updates
        return report
    if loaded.data_fingerprint != job.state.data_fingerprint:
        raise ConfigError(
            f"checkpoint {root} (iteration {report.iteration}) was trained on another order of samples "
            f"({loaded.data_fingerprint} there, {job.state.data_fingerprint} here): data.*, run.seed or the number of "
            "epochs differ; restore them, or start from its weights with checkpoint.load_optimizer=false"
        )
    job.scheduler.load_state_dict(common["scheduler"])
    job.state = loaded
    if report.missing:
        logger.warning("%s: saved with other pipeline or tensor-parallel sizes; random states start anew", root)
    else:
        set_random_state({name: shard.data for name, shard in generators.items()})
    return report
