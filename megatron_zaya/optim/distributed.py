"""ZeRO-1 for both algorithms: Megatron-Core's distributed optimizer around MuonAdamW.

Megatron-Core owns the buffers, the fp32 masters, gradient norm, clipping and the gathering of parameters. This module
adds what Muon needs: which pieces of which matrices this rank's shards are. train/shards.py describes the state to
checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
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

    def model_and_main(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (model parameter, the fp32 shard of it that this rank owns)."""
        for parameter, (group, order) in self.model_param_group_index_map.items():
            yield parameter, self.optimizer.param_groups[group]["params"][order]

    def _main_shard(self, parameter: Tensor) -> Tensor | None:
        """Return the fp32 shard of a model parameter that this rank owns, or None."""
        if parameter not in self.model_param_group_index_map:
            return None
        group, order = self.model_param_group_index_map[parameter]
        return self.optimizer.param_groups[group]["params"][order]


def _tensor_parallel_place(parameter: Tensor, tp_size: int) -> dict[str, int]:
    """Return how (expert-)tensor parallelism splits the matrices of a parameter; stacked axes do not count."""
    first = parameter.ndim - 2
    for axis, group in shard_groups(parameter).items():
        if axis >= first:
            return {"tp_axis": axis - first, "copies": tp_size // group.size()}
    return {"copies": tp_size}
