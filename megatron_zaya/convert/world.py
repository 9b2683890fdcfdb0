"""A distributed world of one rank, for Megatron-Core's sake: it asks for one whatever it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megatron_zaya.compat import cpu


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """Be a distributed world of one rank for the block, unless there is a world already."""
    cpu.install()
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron_zaya.parallel.groups import release_process_groups

    try:
        yield
    finally:
        release_process_groups()
        torch.distributed.destroy_process_group()
