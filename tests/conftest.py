"""Shared fixtures: the CPU stand-ins and a world of one rank, for the tests of a module and gone after them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="run the long tests too (make test-soak)")


def pytest_collection_modifyitems(config, items):
    """Leave the long tests to `--soak`: what remains is the gate of every change, and has to stay short."""
    if config.getoption("--soak"):
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if not item.get_closest_marker("soak")]


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
