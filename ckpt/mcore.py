"""Megatron-Core's interface on our checkpoints. The only module here that imports Megatron-Core.

    install()                                                          # once; then plain dist_checkpointing does it:
    dist_checkpointing.save(state, folder, sharded_strategy=SaveStrategy())
    dist_checkpointing.load(state, folder)                             # 0.16: found by the folder's metadata.json
    dist_checkpointing.load(state, folder, sharded_strategy=LoadStrategy())  # 0.19, which has no registry any more

Megatron-Core writes its own small files (common.pt, metadata.json) around ours; only what passes through here is
hashed. Objects that it insists on pickling are read back through an allow-list of harmless types.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch import Tensor

from ckpt.checkpointer import Checkpointer
from ckpt.errors import CheckpointError
from ckpt.manifest import MANIFEST, Manifest
from ckpt.memory import TORCH_DTYPES, collector_off, targets_of
from ckpt.objects import OBJECT, pack, unpack
from ckpt.reader import check_targets, read
from ckpt.shard import Shard, whole
from ckpt.steps import check_step

try:
    from megatron.core.dist_checkpointing.strategies.base import (
        AsyncSaveShardedStrategy,
        LoadShardedStrategy,
        StrategyAction,
        register_default_strategy,
    )
except ImportError:  # 0.19: strategies are recognised by torch_dist's classes, and there is no registry
    from megatron.core.dist_checkpointing.strategies.torch import (
        TorchDistLoadShardedStrategy as LoadShardedStrategy,
    )
    from megatron.core.dist_checkpointing.strategies.torch import (
        TorchDistSaveShardedStrategy as AsyncSaveShardedStrategy,
    )

    register_default_strategy = None

BACKEND, VERSION = "zaya_ckpt", 1
_COMMON = "common_state"
"""Name under which Megatron-Core 0.19 passes what is equal on all ranks."""


def shard_of(
    described: ShardedTensor,
    key: str | None = None,
    data: Tensor | None = None,
    flattened_range: tuple[int, int] | None = None,
    replica_id: int | None = None,
    writers: int = 1,
) -> Shard:
    """Translate Megatron-Core's description of a tensor, or describe another tensor of the same place.

    Args:
        described: says which box of which global tensor it is.
        key: name instead of the described one.
        data: tensor instead of the described one.
        flattened_range: what ``data`` holds of the box; None is all of it.
        replica_id: number of this copy; if None the main replica is 0 and all others are 1.
        writers: copies that share the writing.
    """
    if replica_id is None:
        replica_id = 0 if _is_main(described.replica_id) else 1
    return Shard(
        key=key or described.key,
        data=described.data if data is None else data,
        global_shape=tuple(described.global_shape),
        global_offset=tuple(described.global_offset),
        local_shape=(1,) * described.prepend_axis_num + tuple(described.local_shape),
        flattened_range=flattened_range,
        replica_id=replica_id,
        writers=writers,
    )


def _is_main(replica_id: int | tuple[int, ...]) -> bool:
    return not any((replica_id,) if isinstance(replica_id, int) else replica_id)


def _wait_for_step(folder: str, save_id: str, timeout_s: float) -> None:
    """Return when the step is complete or has failed. Runs wherever Megatron-Core runs its asynchronous part."""
    deadline = time.monotonic() + timeout_s
    ends = Path(folder, MANIFEST), Path(folder, f"{save_id}.failed")
    while time.monotonic() < deadline and not any(path.exists() for path in ends):
        time.sleep(0.005)


class SaveStrategy(AsyncSaveShardedStrategy):
    """Saves sharded tensors and objects into the folder that Megatron-Core names; works with and without async."""

    def __init__(self, commit_timeout_s: float = 600.0, **options: Any) -> None:
        """Take the options of :class:`ckpt.checkpointer.Checkpointer`."""
        super().__init__(BACKEND, VERSION)
        self.timeout_s = commit_timeout_s
        self.options = options
        self.checkpointer: Checkpointer | None = None

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects come here too."""
        return True

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str, *_: Any) -> AsyncRequest:
        """Stage everything and return; the request's functions wait for the disk, and raise if the save failed."""
        folder = Path(checkpoint_dir)
        if self.checkpointer is None:
            self.checkpointer = Checkpointer(folder.parent, commit_timeout_s=self.timeout_s, **self.options)
        shards = []
        for value in nested_values(sharded_state_dict):
            if isinstance(value, ShardedTensor):
                shards.append(shard_of(value))
            elif value.key == _COMMON:
                if torch.distributed.get_rank() == 0:
                    torch.save(value.data, folder / "common.pt")  # where Megatron-Core looks for it first
            elif _is_main(value.replica_id):
                shards.append(whole(OBJECT + value.unique_key, pack(value.data)))
        save = self.checkpointer.save_into(folder, shards)

        def finish() -> None:
            assert self.checkpointer is not None
            self.checkpointer.wait(self.timeout_s + 60)
            errors: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(errors, save.error)
            failed = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
            if failed:
                raise CheckpointingException(f"{folder}: not saved; {'; '.join(failed[:3])}")

        waiting = (str(folder), save.save_id, self.timeout_s + 60) if save.error is None else ("", "", 0.0)
        return AsyncRequest(_wait_for_step, waiting, [finish])

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str) -> None:
        """Save and wait."""
        self.async_save(sharded_state_dict, checkpoint_dir).execute_sync()


class LoadStrategy(LoadShardedStrategy):
    """Loads what :class:`SaveStrategy` saved, into any layout."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects come from here too."""
        return True

    @collector_off()
    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str, *_: Any) -> dict[str, Any]:
        """Fill the described tensors in place and return the state with plain tensors and objects.

        Raises:
            CheckpointError: something asked for is missing, differs, or is damaged.
        """
        folder = Path(checkpoint_dir)
        manifest = check_step(folder)
        reading = _Reading(folder, manifest)
        dict_list_map_inplace(reading.ask, sharded_state_dict)
        reading.run()
        dict_list_map_inplace(reading.answer, sharded_state_dict)
        return sharded_state_dict

    def load_tensors_metadata(self, checkpoint_dir: Path | str, *_: Any) -> dict[str, ShardedTensor]:
        """Describe the tensors of a step, unsharded and without data."""
        return {key: value for key, value in self.load_sharded_metadata(checkpoint_dir).items() if _is_tensor(value)}

    def load_sharded_metadata(self, checkpoint_dir: Path | str, *_: Any) -> dict[str, Any]:
        """Describe tensors and objects of a step, without data."""
        described: dict[str, Any] = {}
        for key, info in check_step(Path(checkpoint_dir)).tensors.items():
            if key.startswith(OBJECT):
                unique = key.removeprefix(OBJECT)
                described[unique] = ShardedObject.empty_from_unique_key(unique)
                continue
            dtype, zero, one = TORCH_DTYPES[info.dtype], (0,) * len(info.shape), (1,) * len(info.shape)
            described[key] = ShardedTensor(key, None, dtype, info.shape, info.shape, zero, one)
        return described

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """Accept our own steps only."""
        if loaded_backend != BACKEND:
            raise CheckpointingException(f"this strategy reads {BACKEND!r}, the checkpoint says {loaded_backend!r}")

    def check_version_compatibility(self, loaded_version: int) -> None:
        """Accept the version that this program writes."""
        if loaded_version != VERSION:
            raise CheckpointingException(f"this strategy reads version {VERSION}, the checkpoint says {loaded_version}")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, ShardedTensor)


class _Reading:
    """Collects what is asked for, reads all of it at once, and hands it out."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.shards: list[Shard] = []
        self.fitted: list[tuple[Tensor, Tensor]] = []
        self.objects: dict[str, Tensor] = {}

    def ask(self, value: Any) -> Any:
        key = value.key if _is_tensor(value) else OBJECT + value.unique_key
        if key not in self.manifest.tensors:
            raise CheckpointError(f"{self.folder}: lacks {key!r}; is this another model?")
        stored = self.manifest.tensors[key]
        if not _is_tensor(value):
            self.objects[key] = torch.empty(stored.shape, dtype=torch.uint8)
            self.shards.append(whole(key, self.objects[key]))
            return value
        value.init_data("cpu")
        shard = shard_of(value)
        if value.allow_shape_mismatch and stored.shape != shard.global_shape:
            self.shards += self._what_fits(shard, stored.shape)
        else:
            self.shards.append(shard)
        return value

    def _what_fits(self, shard: Shard, stored: tuple[int, ...]) -> list[Shard]:
        """Ask for the part of a padded tensor that the step has; the rest keeps its values."""
        place = zip(shard.global_offset, shard.local_shape, stored, strict=True)
        size = tuple(max(0, min(offset + length, whole_size) - offset) for offset, length, whole_size in place)
        if 0 in size:
            return []
        part = torch.empty(size, dtype=shard.data.dtype)
        target = shard.data.detach().view(shard.local_shape)[tuple(slice(n) for n in size)]
        self.fitted.append((target, part))
        return [Shard(shard.key, part, stored, shard.global_offset, size)]

    def run(self) -> None:
        targets, copies = targets_of(self.shards)
        check_targets(self.manifest, targets, self.folder)
        read(self.folder, self.manifest, targets, first_file=torch.distributed.get_rank())
        for destination, part in copies + self.fitted:
            destination.copy_(part)

    def answer(self, value: Any) -> Any:
        if _is_tensor(value):
            return value.data.detach()
        key = OBJECT + value.unique_key
        return unpack(self.objects[key], key)


def install() -> None:
    """Let plain ``dist_checkpointing.load`` find our strategies by the folder's metadata.json (Megatron-Core 0.16)."""
    if register_default_strategy is not None:
        register_default_strategy(StrategyAction.LOAD_SHARDED, BACKEND, VERSION, LoadStrategy())
        register_default_strategy(StrategyAction.SAVE_SHARDED, BACKEND, VERSION, SaveStrategy())
