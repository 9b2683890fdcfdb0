"""torch.distributed.checkpoint's interface on our checkpoints, for FSDP2 and other DTensor users.

    dcp.save(state, storage_writer=DcpWriter(folder))
    dcp.load(state, storage_reader=DcpReader(folder))     # from any number of ranks and any sharding

Its planner stays in the path (plans are gathered at each save), so this is for compatibility; the Checkpointer itself
is the fast way. What is no tensor is pickled by its planner; bytes that would do more than build plain values are
refused before the planner sees them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ckpt.checkpointer import Checkpointer
from ckpt.errors import CheckpointError
from ckpt.manifest import Manifest
from ckpt.memory import TORCH_DTYPES, targets_of
from ckpt.objects import OBJECT, as_bytes, unpack
from ckpt.reader import check_targets, read
from ckpt.shard import Shard, whole
from ckpt.steps import check_step


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


class DcpWriter(StorageWriter):
    """Writes a step into ``path``, which must hold none. Use one object for all saves of a job: it keeps its writer."""

    def __init__(self, path: Path | str, **options: Any) -> None:
        """Take the options of :class:`ckpt.checkpointer.Checkpointer`."""
        super().__init__()
        self.path = Path(path)
        self.options = options
        self.checkpointer: Checkpointer | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Go to another folder."""
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the checkpointer; the first time only."""
        if self.checkpointer is None:
            self.checkpointer = Checkpointer(self.path.parent, **self.options)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to prepare: the folder is made by the writer."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Nothing to prepare: every rank has a file of its own."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items; when this returns they are on the disk.

        Raises:
            CheckpointError: they are not.
        """
        assert self.checkpointer is not None, "set_up_storage_writer comes first"
        shards = [self._shard(item, planner) for item in plan.items]
        save = self.checkpointer.save_into(self.path, shards)
        self.checkpointer.wait_for_part(save)
        if save.error is not None:
            raise CheckpointError(f"{self.path}: {save.error}")
        sizes = [shard.data.numel() * shard.data.element_size() for shard in shards]
        return _done([WriteResult(item.index, size, None) for item, size in zip(plan.items, sizes, strict=True)])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Wait for the manifest; called on the first rank when all have written.

        Raises:
            CheckpointError: the step could not be completed.
        """
        assert self.checkpointer is not None, "set_up_storage_writer comes first"
        errors = [save.error for save in self.checkpointer.wait() if save.error is not None]
        if errors:
            raise CheckpointError(f"{self.path}: {errors[-1]}")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any path will do."""
        return True

    @staticmethod
    def _shard(item: WriteItem, planner: SavePlanner) -> Shard:
        data = planner.resolve_data(item)
        if item.type == WriteItemType.BYTE_IO:
            return whole(OBJECT + item.index.fqn, as_bytes(data.getbuffer()))
        place = item.tensor_data
        chunk = place.chunk
        return Shard(item.index.fqn, data, tuple(place.size), tuple(chunk.offsets), tuple(chunk.sizes))


class DcpReader(StorageReader):
    """Reads a step of any writer of this package from ``path``."""

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self.path = Path(path)
        self.manifest: Manifest | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Go to another folder."""
        self.manifest = None
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)

    def _read_manifest(self) -> Manifest:
        if self.manifest is None:
            self.manifest = check_step(self.path)
        return self.manifest

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Describe every tensor as one whole chunk: where its parts lie is resolved here, not by the planner."""
        described: dict[str, Any] = {}
        for key, info in self._read_manifest().tensors.items():
            if key.startswith(OBJECT):
                described[key.removeprefix(OBJECT)] = BytesStorageMetadata()
                continue
            size = torch.Size(info.shape)
            chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            properties = TensorProperties(dtype=TORCH_DTYPES[info.dtype])
            described[key] = TensorStorageMetadata(properties, size, [chunk])
        return Metadata(described)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to prepare."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to prepare."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planned tensors and objects.

        Raises:
            CheckpointError: something is damaged, or an object is of a type that is not harmless.
        """
        manifest = self._read_manifest()
        shards = []
        for item in plan.items:
            key = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                data = torch.empty(manifest.tensors[OBJECT + key].shape, dtype=torch.uint8)
                shards.append(whole(OBJECT + key, data))
            else:
                place = (manifest.tensors[key].shape, tuple(item.storage_offsets), tuple(item.lengths))
                shards.append(Shard(key, planner.resolve_tensor(item).detach(), *place))
        targets, copies = targets_of(shards)
        check_targets(manifest, targets, self.path)
        distributed = torch.distributed.is_initialized()
        read(self.path, manifest, targets, first_file=torch.distributed.get_rank() if distributed else 0)
        for destination, host in copies:
            destination.copy_(host)
        for item, shard in zip(plan.items, shards, strict=True):
            if item.type == LoadItemType.BYTE_IO:
                unpack(shard.data, shard.key)  # refuses what would run code; the planner unpickles anything
                planner.load_bytes(item, io.BytesIO(shard.data.numpy().tobytes()))
            else:
                planner.commit_tensor(item, shard.data)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any path will do."""
        return True
