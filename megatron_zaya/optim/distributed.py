"""ZeRO-1 for both algorithms: Megatron-Core's distributed optimizer around MuonAdamW.

Megatron-Core owns the buffers, the fp32 masters, gradient norm, clipping and the gathering of parameters. This module
adds what Muon needs (which pieces of which matrices this rank's shards are) and describes the state to checkpoints as
ranges of named global tensors, so that any layout loads any other without gathering anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_zaya.model.sharding import shard_groups
from megatron_zaya.optim.exchange import Grid, ShardedOrthogonalizer
from megatron_zaya.optim.muon import MuonAdamW
from megatron_zaya.optim.newton_schulz import update_scale
from megatron_zaya.optim.pieces import Slot, make_plan
from megatron_zaya.optim.rules import Rule
from megatron_zaya.optim.scratch import Scratch, largest_free_region


class ShardedOptimizer(DistributedOptimizer):
    """Dense or expert parameters of this rank's stages; the inner optimizer is a :class:`MuonAdamW`."""

    optimizer: MuonAdamW

    def distribute_muon(self, rules: dict[Tensor, Rule], grid: Grid, steps: int, dtype: torch.dtype) -> None:
        """Plan who orthogonalises what; call once after construction. Every rank of the grid must.

        Args:
            rules: by model parameter.
            grid: the ranks that hold pieces of this rank's matrices.
            steps: Newton-Schulz iterations.
            dtype: type to iterate in.
        """
        placed = [
            (parameter, buffer.buckets[bucket], start)
            for buffer in self.buffers
            for parameter, (start, _, bucket) in buffer.param_index_map.items()
            if rules[parameter].algorithm == "muon"
        ]
        slots = [
            Slot(
                name=rules[parameter].pattern,
                local_shape=tuple(parameter.shape),
                start=start - bucket.offset,
                bucket_numel=bucket.grad_data.numel(),
                **_tensor_parallel_place(parameter, grid.tp_size),
                row_parts=rules[parameter].row_parts,
            )
            for parameter, bucket, start in placed
        ]
        self.plan = plan = make_plan(slots, grid.tp_size, grid.dp_size)
        scales = {m.slot: update_scale(m.rows, m.cols) for m in plan.matrices}
        shards = [self._main_shard(parameter) for parameter, _, _ in placed]
        self.optimizer.update_scales = {s: scales[i] for i, s in enumerate(shards) if s is not None}
        orthogonalizer = ShardedOrthogonalizer(plan, slots, grid, steps, dtype)
        device = self.buffers[0].grad_data.device
        buckets = [bucket.grad_data for buffer in self.buffers for bucket in buffer.buckets]
        self.scratch = Scratch(largest_free_region(buckets, grid.rank % grid.dp_size, grid.dp_size), device)

        def orthogonalize(directions: dict[Tensor, Tensor]) -> None:
            self.scratch.reset()
            orthogonalizer([None if shard is None else directions[shard] for shard in shards], self.scratch)

        self.optimizer.orthogonalize = orthogonalize

    def _main_shard(self, parameter: Tensor) -> Tensor | None:
        """Return the fp32 shard of a model parameter that this rank owns, or None."""
        if parameter not in self.model_param_group_index_map:
            return None
        group, order = self.model_param_group_index_map[parameter]
        return self.optimizer.param_groups[group]["params"][order]

    def _owned(self) -> Iterator[tuple[Tensor, slice, dict[str, Tensor]]]:
        """Yield (model parameter, its flat range that this rank owns, master and moments of that range)."""
        for parameter in self.model_param_group_index_map:
            owned = self._get_model_param_range_map(parameter)["param"]
            shard = self._main_shard(parameter)
            moments = {name: value for name, value in self.optimizer.state[shard].items() if name != "step"}
            yield parameter, slice(owned.start, owned.end), {"param": shard, **moments}

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict | None = None
    ) -> dict[str, Any]:
        """Describe masters and moments under the names of their parameters, without communication.

        Args:
            model_sharded_state_dict: the model's; it says where each parameter lies in its global tensor.
            is_loading: accepted for Megatron-Core; loading fills the same tensors in place.
            metadata: accepted for Megatron-Core.
        """
        places = {tensor.data: tensor for tensor in nested_values(model_sharded_state_dict)}
        tensors = {}
        for parameter, owned, state in self._owned():
            place = places[parameter]
            for first, offset, shape in blocks_of_range(place.local_shape, owned.start, owned.stop):
                for name, values in state.items():
                    data = values.detach()[first : first + math.prod(shape)].view(shape)
                    tensors[f"{name}.{place.key}.{first}"] = _block(
                        f"optimizer.{name}.{place.key}", data, place, offset
                    )
        return {"tensors": tensors, "steps_done": self.optimizer.steps_done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a checkpoint read into :meth:`sharded_state_dict`; the tensors were filled in place."""
        self.optimizer.set_steps_done(state_dict["steps_done"])


def _tensor_parallel_place(parameter: Tensor, tp_size: int) -> dict[str, int]:
    """Return how (expert-)tensor parallelism splits the matrices of a parameter; stacked axes do not count."""
    first = parameter.ndim - 2
    for axis, group in shard_groups(parameter).items():
        if axis >= first:
            return {"tp_axis": axis - first, "copies": tp_size // group.size()}
    return {"copies": tp_size}


def _block(key: str, data: Tensor, place: ShardedTensor, offset: tuple[int, ...]) -> ShardedTensor:
    """Describe a box of a parameter's local part, at ``offset`` in it."""
    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=place.global_shape,
        global_offset=tuple(a + b for a, b in zip(place.global_offset, offset, strict=True)),
        axis_fragmentations=None,  # boxes of any size
        replica_id=(*place.replica_id[:2], 0),  # data-parallel ranks hold different ranges
    )


def blocks_of_range(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Cut a range of a tensor's elements in row-major order into boxes: at most 2 n - 1 of them for n dimensions.

    Yields:
        (first element, counted from ``start``; offset of the box; shape of the box).
    """
    inner = math.prod(shape[1:])
    position = start
    while position < stop:
        row, within = divmod(position, inner)
        rows = (stop - position) // inner
        if within == 0 and rows:
            yield position - start, (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
            position += rows * inner
        else:
            end = min(stop, (row + 1) * inner)
            for first, offset, size in blocks_of_range(shape[1:], within, within + end - position):
                yield position - start + first, (row, *offset), (1, *size)
            position = end
