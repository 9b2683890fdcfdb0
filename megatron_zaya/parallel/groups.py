"""From the parallel section of a run file to Megatron-Core's process groups and random-number streams."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_zaya.config.sections import ParallelConfig


def build_process_groups(parallel: ParallelConfig, seed: int) -> ProcessGroupCollection:
    """Create every process group of the layout; torch.distributed must be initialised. Collective.

    The groups are also registered with Megatron-Core's `parallel_state`, which a few of its functions still read;
    our own code takes them from the returned collection only.
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
    return ProcessGroupCollection.use_mpu_process_groups()


def release_process_groups() -> None:
    """Destroy every group that :func:`build_process_groups` made, but not the world. Collective.

    Megatron-Core forgets its groups without destroying them; their sockets and threads would stay.
    """
    for group in parallel_state._global_process_group_list or []:
        if group is not None:  # None stands for the world
            torch.distributed.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
