"""The ways to save and load that are compared. Each imports its library when it is made."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpointing.state import State, World, whole_shape


def fsync_tree(folder: Path) -> None:
    """Make everything below a folder durable."""
    for path in (*folder.rglob("*"), folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


class Method:
    """One way to save and load. ``save`` returns (stall, durable) in seconds of this rank."""

    def __init__(self, world: World) -> None:
        self.world = world

    def save(self, state: State, path: Path) -> tuple[float, float]:
        raise NotImplementedError

    def load(self, state: State, path: Path) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """End helpers."""

    def blocking(self, path: Path, call: Callable[[], Any]) -> tuple[float, float]:
        """Time a call that blocks; the first rank then syncs what the method did not."""
        start = time.monotonic()
        call()
        stall = time.monotonic() - start
        torch.distributed.barrier()
        if self.world.rank == 0:
            fsync_tree(path)
        torch.distributed.barrier()
        return stall, time.monotonic() - start


class Ours(Method):
    def __init__(self, world: World) -> None:
        from ckpt.checkpointer import Checkpointer

        super().__init__(world)
        self.checkpointer = Checkpointer(world.folder / "ours")
        self.number = 0

    def shards(self, state: State) -> list:
        from ckpt.shard import Shard

        shards = []
        for key, (tensor, split) in state.items():
            shape = whole_shape(tensor, split, self.world.ranks)
            offset = tuple(n * self.world.rank if axis == split else 0 for axis, n in enumerate(tensor.shape))
            copies = (self.world.rank, self.world.ranks) if split is None else (0, 1)
            shards.append(Shard(key, tensor, shape, offset, tuple(tensor.shape), None, *copies))
        return shards

    def save(self, state: State, path: Path) -> tuple[float, float]:
        self.number = int(path.name.split("_")[-1])
        shards = self.shards(state)
        start = time.monotonic()
        save = self.checkpointer.save(self.number, shards)
        stall = time.monotonic() - start
        self.checkpointer.wait(120)
        torch.distributed.barrier()
        assert save.error is None, save.error
        return stall, time.monotonic() - start

    def load(self, state: State, path: Path) -> None:
        report = self.checkpointer.load(self.shards(state), int(path.name.split("_")[-1]))
        assert not report.missing and not report.unexpected

    def close(self) -> None:
        self.checkpointer.close()


class Dcp(Method):
    asynchronous = False

    def __init__(self, world: World) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(world)
        self.mesh = init_device_mesh("cpu", (world.ranks,))
        self.stager = DefaultStager(StagingOptions(False, False, False, False)) if self.asynchronous else None

    def described(self, state: State) -> dict:
        from torch.distributed.tensor import DTensor, Shard

        return {
            key: tensor if split is None else DTensor.from_local(tensor, self.mesh, [Shard(split)], run_check=False)
            for key, (tensor, split) in state.items()
        }

    def save(self, state: State, path: Path) -> tuple[float, float]:
        import torch.distributed.checkpoint as dcp

        described = self.described(state)
        if not self.asynchronous:
            return self.blocking(path, lambda: dcp.save(described, checkpoint_id=path))
        start = time.monotonic()
        future = dcp.async_save(described, checkpoint_id=path, async_stager=self.stager)
        stall = time.monotonic() - start
        getattr(future, "upload_completion", future).result()
        torch.distributed.barrier()
        return stall, time.monotonic() - start

    def load(self, state: State, path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(self.described(state), checkpoint_id=path)

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class DcpAsync(Dcp):
    asynchronous = True


class Mcore(Method):
    fully_parallel = asynchronous = False

    def __init__(self, world: World) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        super().__init__(world)
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
        self.strategy = FullyParallelSaveStrategyWrapper(strategy, None, True) if self.fully_parallel else strategy
        self.queue = AsyncCallsQueue() if self.asynchronous else None

    def described(self, state: State) -> dict:
        from megatron.core.dist_checkpointing import ShardedTensor

        described = {}
        for key, (tensor, split) in state.items():
            offsets = [] if split is None else [(split, self.world.rank, self.world.ranks)]
            replica = self.world.rank if split is None else 0
            described[key] = ShardedTensor.from_rank_offsets(key, tensor, *offsets, replica_id=replica)
        return described

    def save(self, state: State, path: Path) -> tuple[float, float]:
        import torch
        from megatron.core import dist_checkpointing

        if self.world.rank == 0:
            path.mkdir(parents=True)
        torch.distributed.barrier()
        described, options = self.described(state), {"sharded_strategy": self.strategy}
        if self.queue is None:
            return self.blocking(path, lambda: dist_checkpointing.save(described, str(path), **options))
        start = time.monotonic()
        request = dist_checkpointing.save(described, str(path), async_sharded_save=True, **options)
        self.queue.schedule_async_request(request)
        stall = time.monotonic() - start
        self.queue.maybe_finalize_async_calls(blocking=True)
        if self.world.rank == 0:
            fsync_tree(path)
        torch.distributed.barrier()
        return stall, time.monotonic() - start

    def load(self, state: State, path: Path) -> None:
        from megatron.core import dist_checkpointing

        dist_checkpointing.load(self.described(state), str(path))

    def close(self) -> None:
        if self.queue is not None:
            self.queue.close()


class McoreAsync(Mcore):
    asynchronous = True


class McoreFullyParallel(Mcore):
    fully_parallel = True


class Safetensors(Method):
    """One file a rank with all that it holds: no deduplication, no other layout."""

    def save(self, state: State, path: Path) -> tuple[float, float]:
        from safetensors.torch import save_file

        path.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor for key, (tensor, _) in state.items()}
        return self.blocking(path, lambda: save_file(tensors, path / f"{self.world.rank}.safetensors"))

    def load(self, state: State, path: Path) -> None:
        from safetensors.torch import load_file

        if self.world.ranks == 1:
            raise NotImplementedError("files of another layout")
        loaded = load_file(path / f"{self.world.rank}.safetensors")
        for key, (tensor, _) in state.items():
            tensor.copy_(loaded[key])


METHODS = {
    "ours": Ours,
    "dcp_sync": Dcp,
    "dcp_async": DcpAsync,
    "mcore_sync": Mcore,
    "mcore_async": McoreAsync,
    "mcore_fully_parallel": McoreFullyParallel,
    "safetensors": Safetensors,
}
