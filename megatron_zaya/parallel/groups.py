"""From the parallel section of a run file to Megatron-Core's process groups and random-number streams."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_zaya.config.sections import ParallelConfig


def build_process_groups(
    parallel: ParallelConfig, seed: int, num_query_groups: int | None = None
) -> ProcessGroupCollection:
    """Create every process group of the layout; torch.distributed must be initialised. Collective.

    The groups are also registered with Megatron-Core's `parallel_state`, which a few of its functions still read;
    our own code takes them from the returned collection only.

    Args:
        parallel: the layout.
        seed: of the random-number streams.
        num_query_groups: key-value heads of the model. Where there are fewer than tensor-parallel ranks, the
            collection gets two groups more: `kv_shard` (the ranks that hold different heads) and `kv_replica` (the
            ranks that hold the same one).
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    tensor = parallel.tensor_model_parallel_size
    if num_query_groups is not None and tensor > num_query_groups:
        copies = tensor // num_query_groups
        collection.kv_shard = _group_of_this_rank(tensor, lambda rank: rank % copies)
        collection.kv_replica = _group_of_this_rank(tensor, lambda rank: rank // copies)
    return collection


def _group_of_this_rank(tensor: int, part: Callable[[int], int]) -> torch.distributed.ProcessGroup:
    """Split every tensor-parallel group of the world into parts; return the one this rank is in. Collective.

    Megatron-Core numbers ranks with the tensor-parallel one running fastest.
    """
    own = None
    for first in range(0, torch.distributed.get_world_size(), tensor):
        parts: dict[int, list[int]] = {}
        for rank in range(tensor):
            parts.setdefault(part(rank), []).append(first + rank)
        for ranks in parts.values():
            group = parallel_state.create_group(ranks)
            own = group if torch.distributed.get_rank() in ranks else own
    return own


def release_process_groups() -> None:
    """Destroy every group that :func:`build_process_groups` made, but not the world. Collective.

    Megatron-Core forgets its groups without destroying them; their sockets and threads would stay.
    """
    for group in parallel_state._global_process_group_list or []:
        if group is not None:  # None stands for the world
            torch.distributed.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
