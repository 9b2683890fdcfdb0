"""The tensors of a job as shards of global tensors: weights, optimizer, balancing, random state. Nothing is gathered.

With the distributed optimizer every data-parallel rank describes the ranges that it owns, of the weights as of their
master copies and moments; without it the data-parallel ranks hold equal copies and share the writing. Names and
global shapes are the same in both cases and in every layout, and loading fills the same tensors in place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from ckpt.mcore import shard_of
from ckpt.shard import Shard
from megatron_zaya.model.sharding import is_expert
from megatron_zaya.train.state import TrainingJob

RNG = "rng."


class Owned(NamedTuple):
    """What this rank's optimizer holds for a parameter."""

    parameter: Tensor
    """The model's."""
    flattened_range: tuple[int, int] | None
    """Which elements; None: all, as do the other data-parallel ranks."""
    main: Tensor
    """What the optimizer steps: a master copy, or (a view of) the parameter itself."""
    state: dict[str, Any]
    """Its moments and counters, by torch's names."""


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the parts of a chained optimizer that have parameters."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def owned_by(part: Any) -> Iterator[Owned]:
    """Yield what one part of the optimizer holds on this rank."""
    inner = part.optimizer
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            place = part._get_model_param_range_map(parameter)["param"]
            main = inner.param_groups[group]["params"][order]
            yield Owned(parameter, (place.start, place.end), main, inner.state[main])
        return
    masters = {}
    if hasattr(part, "float16_groups"):
        pairs = zip(chain(*part.float16_groups), chain(*part.fp32_from_float16_groups), strict=True)
        masters = {main: parameter for parameter, main in pairs}
    for main in chain(*(group["params"] for group in inner.param_groups)):
        yield Owned(masters.get(main, main), None, main, inner.state[main])


def _copies(job: TrainingJob, tensor: ShardedTensor) -> dict[str, int]:
    """Number this copy among the data-parallel ones, which share the writing; other copies write nothing."""
    groups = job.pg_collection
    writers = (groups.expt_dp if is_expert(tensor.data) else groups.dp_cp).size()
    *others, number = tensor.replica_id
    return {"replica_id": number if not any(others) else writers, "writers": writers}


def _own_range(tensor: ShardedTensor) -> dict[str, int]:
    """Data-parallel ranks hold different ranges; the other numbers still say which copy this is."""
    return {"replica_id": int(any(tensor.replica_id[:-1]))}


def _weights(job: TrainingJob, described: list[ShardedTensor], loading: bool) -> Iterator[Shard]:
    parts = [part for part in optimizer_parts(job.optimizer) if isinstance(part, DistributedOptimizer)]
    by_range = bool(parts) and not loading
    ranges = {owned.parameter: owned.flattened_range for part in parts for owned in owned_by(part)} if by_range else {}
    for tensor in described:
        parameter = tensor.data
        if parameter in ranges:
            start, stop = ranges[parameter]
            # The rest of a parameter may still be that of the step before: its gathering overlaps the next forward.
            data = parameter.detach().view(-1)[start:stop]
            yield shard_of(tensor, data=data, flattened_range=(start, stop), **_own_range(tensor))
        elif not (by_range and parameter.requires_grad):
            yield shard_of(tensor, **_copies(job, tensor))


def _optimizer(job: TrainingJob, described: list[ShardedTensor]) -> Iterator[Shard]:
    places = {tensor.data: tensor for tensor in described}
    for part in optimizer_parts(job.optimizer):
        for owned in owned_by(part):
            tensor = places[owned.parameter]
            copies = _copies(job, tensor) if owned.flattened_range is None else _own_range(tensor)
            states = {name: value for name, value in owned.state.items() if name != "step"}
            if owned.parameter.dtype != owned.main.dtype:
                states["master"] = owned.main
            for name, value in states.items():
                key = f"optimizer.{name}.{tensor.key}"
                yield shard_of(tensor, key, value, owned.flattened_range, **copies)


def _random_state() -> dict[str, Tensor]:
    """Return the state of every random generator as tensors of fixed sizes."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "words": torch.from_numpy(np.array([*words, *keys, position, has_gauss], dtype=np.int64)),
        "gauss": torch.tensor([gauss is not None, gauss or 0.0, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
    }
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return states | {f"tracker.{name}": state.clone() for name, state in tracker.items()}


def set_random_state(states: dict[str, Tensor]) -> None:
    """Take what :func:`_random_state` returned."""
    words, gauss = states["words"].tolist(), states["gauss"].tolist()
    random.setstate((3, tuple(words[:625]), gauss[1] if gauss[0] else None))
    np.random.set_state(("MT19937", np.array(words[625:1249], dtype=np.uint32), words[1249], words[1250], gauss[2]))
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    prefix = "tracker."
    tracker = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)


def random_shards(job: TrainingJob) -> dict[str, Shard]:
    """Describe the random state by name. It differs between model-parallel ranks, and so fits their layout only."""
    groups = job.pg_collection
    place = f"{RNG}pp{groups.pp.rank()}of{groups.pp.size()}.tp{groups.tp.rank()}of{groups.tp.size()}"
    shards = {}
    for name, state in _random_state().items():
        shape = tuple(state.shape)
        zero = (0,) * len(shape)
        shards[name] = Shard(f"{place}.{name}", state, shape, zero, shape, None, groups.dp_cp.rank())
    return shards


def job_shards(
    job: TrainingJob, *, with_optimizer: bool, loading: bool, allocate: Callable[[MegatronOptimizer], None]
) -> list[Shard]:
    """Describe the tensors of this rank, but for the random state.

    Args:
        job: the run.
        with_optimizer: False describes the weights only.
        loading: describe what to fill: whole parameters, not the ranges that this rank owns.
        allocate: makes optimizer state where there is none yet.
    """
    described = [t for chunk in job.model for t in chunk.module.sharded_state_dict().values()]
    shards = list(_weights(job, described, loading))
    if with_optimizer:
        allocate(job.optimizer)
        shards += _optimizer(job, described)
        shards += [shard_of(t, **_copies(job, t)) for t in job.balancer.sharded_state_dict(job.pg_collection).values()]
    return shards
