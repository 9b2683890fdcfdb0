"""Router replay of whole runs: the expert of every token of every step, written to files or taken from them.

    zaya train run.yaml run.router_replay.record=choices      # choices/step_0000001.npy, ...
    zaya train run.yaml run.router_replay.replay=choices

A file holds integers [sample, layer, token]: the samples of the step's global batch in the order of the data, as an
inference engine would log them; the number of experts means skip. Layouts do not show, so any reads what any wrote.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_zaya.train.errors import TrainingError
from megatron_zaya.train.router_replay import check_choices, recording, replaying
from megatron_zaya.train.state import TrainingJob


@dataclass
class StepRouting:
    """What became of a step's choices."""

    divergence: tuple[float, float] | None = None
    """After a replay: the share of tokens that would have chosen otherwise, of all layers and of the worst."""


def choices_file(folder: str, iteration: int) -> Path:
    """Return the file of the step that ends with ``iteration``."""
    return Path(folder) / f"step_{iteration:07d}.npy"


@contextlib.contextmanager
def step_routing(job: TrainingJob) -> Iterator[StepRouting]:
    """Record or replay the choices of the one step in the block, as `run.router_replay` says. Collective.

    Raises:
        TrainingError: the file of the step cannot be read, or does not fit the step.
    """
    wanted, routing = job.config.run.router_replay, StepRouting()
    iteration = job.state.iteration + 1
    if wanted.record is not None:
        with recording(job) as record:
            yield routing
        _write_choices(choices_file(wanted.record, iteration), record.gather(), job)
    elif wanted.replay is not None:
        with replaying(job, read_choices(choices_file(wanted.replay, iteration), job)) as replay:
            yield routing
        routing.divergence = replay.overall_divergence()
    else:
        yield routing


def read_choices(path: Path, job: TrainingJob) -> Tensor:
    """Return this data-parallel rank's choices for the next step, int64 [micro-batch, layer, sample, token].

    Raises:
        TrainingError: the file cannot be read, holds another number of samples, layers or tokens, or no such expert.
    """
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: cannot be read as a .npy file of choices: {error}") from None
    config, dp = job.config, job.pg_collection.dp
    size = config.schedule.micro_batch_size
    wanted = (job.num_microbatches * size * dp.size(), config.model.num_layers, config.data.seq_length)
    if samples.shape != wanted or samples.dtype.kind not in "iu":
        raise TrainingError(
            f"{path}: holds {samples.dtype} {list(samples.shape)}; the step needs integers {list(wanted)}: samples, "
            "layers, tokens"
        )
    first = [(number * dp.size() + dp.rank()) * size for number in range(job.num_microbatches)]
    mine = np.stack([samples[begin : begin + size] for begin in first]).astype(np.int64)
    choices_MLBS = torch.from_numpy(mine).transpose(1, 2).contiguous()
    check_choices(job, choices_MLBS, str(path))
    return choices_MLBS


def _write_choices(path: Path, choices_MLBS: Tensor, job: TrainingJob) -> None:
    """Write a step's choices, of all data-parallel ranks, on the first rank; the file appears when it is complete."""
    groups = job.pg_collection
    if groups.pp.rank() or groups.tp.rank() or groups.cp.rank():
        return  # these know the same choices
    local = choices_MLBS.to(job.device, torch.int16)
    parts = [torch.empty_like(local) for _ in range(groups.dp.size())] if groups.dp.rank() == 0 else None
    as_bytes = None if parts is None else [part.view(torch.uint8) for part in parts]  # every backend carries them
    dist.gather(local.view(torch.uint8), as_bytes, group=groups.dp, group_dst=0)
    if parts is None:
        return
    samples_LS = torch.stack(parts, dim=1).transpose(2, 3).flatten(0, 2)  # from [M, DP, L, B, S]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        np.save(file, samples_LS.cpu().numpy())
    temporary.replace(path)
