"""Shared fixtures: the CPU stand-ins and a world of one rank, for the tests of a module and gone after them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="module")
def pg_collection():
    """Megatron-Core's process groups of a world of one rank (no network: an in-process store)."""
    import torch

    from megatron_zaya.compat import cpu

    cpu.install()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron_zaya.config.sections import ParallelConfig
    from megatron_zaya.parallel.groups import build_process_groups, release_process_groups

    yield build_process_groups(ParallelConfig(), seed=1234)
    release_process_groups()
    torch.distributed.destroy_process_group()
