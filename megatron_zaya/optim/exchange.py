"""Orthogonalise matrices whose pieces are spread over a grid of ranks, in place, in bounded memory.

Runs the plan of `pieces.py`: pieces go to the owner of their matrix in one all-to-all, the owner iterates, the results
go back in another. While an owner iterates on wave k, the pieces of wave k + 1 and the results of wave k - 1 travel;
matrices that lie whole on one rank are done while the first wave's pieces travel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megatron_zaya.optim.newton_schulz import newton_schulz
from megatron_zaya.optim.pieces import Matrix, Plan, Slot, messages, workspaces
from megatron_zaya.optim.scratch import Scratch


@dataclass(frozen=True)
class Grid:
    """The ranks that hold the pieces of the same matrices: T tensor-parallel x D data-parallel."""

    group: ProcessGroup | None
    """All of them; None for a grid of one rank."""
    group_ranks: tuple[int, ...]
    """Rank in ``group`` of the plan's rank t * D + d."""
    tp_size: int
    dp_size: int
    rank: int
    """This rank's t * D + d."""


@dataclass(frozen=True)
class Wave:
    """What this rank does in one wave."""

    matrix: Matrix | None
    """The one that it orthogonalises."""
    ranges: tuple[tuple[int, int, int], ...]
    """(slot, first element of the shard, elements) of what it sends, in the order in which it is packed."""
    outgoing: list[int]
    """Elements to each rank of the group."""
    incoming: list[int]
    """Elements from each rank of the group."""


def _wave(plan: Plan, number: int, grid: Grid, shard_starts: Sequence[int]) -> Wave:
    owners = sorted(plan.waves[number].items(), key=lambda item: grid.group_ranks[item[0]])
    ranges = []
    for _, index in owners:
        matrix = plan.matrices[index]
        for piece in matrix.pieces:
            if piece.rank == grid.rank:
                ranges.append((matrix.slot, piece.start - shard_starts[matrix.slot], piece.numel))
    outgoing, incoming = [0] * len(grid.group_ranks), [0] * len(grid.group_ranks)
    for (holder, owner), numel in messages(plan, number).items():
        if holder == grid.rank:
            outgoing[grid.group_ranks[owner]] = numel
        if owner == grid.rank:
            incoming[grid.group_ranks[holder]] = numel
    own = plan.waves[number].get(grid.rank)
    return Wave(None if own is None else plan.matrices[own], tuple(ranges), outgoing, incoming)


class ShardedOrthogonalizer:
    """Replaces the gradient shards of one grid by their orthogonalised update, in place."""

    def __init__(self, plan: Plan, slots: Sequence[Slot], grid: Grid, steps: int, dtype: torch.dtype) -> None:
        """Prepare.

        Args:
            plan: equal on all ranks of the grid.
            slots: the parameters of the plan.
            grid: who takes part.
            steps: Newton-Schulz iterations.
            dtype: type to iterate in, and of what travels.
        """
        self.grid, self.steps, self.dtype = grid, steps, dtype
        self.shard_starts = [slot.owned(grid.rank % grid.dp_size, grid.dp_size)[0] for slot in slots]
        self.workspace = workspaces(plan, grid.tp_size * grid.dp_size)[grid.rank]
        self.local = [plan.matrices[index] for index in plan.local.get(grid.rank, ())]
        self.waves = [_wave(plan, number, grid, self.shard_starts) for number in range(len(plan.waves))]

    @torch.no_grad()
    def __call__(self, shards: Sequence[Tensor | None], scratch: Scratch) -> None:
        """Run. Collective over the grid.

        Args:
            shards: for each slot the flat range that this rank owns, any float type; None where it owns nothing.
            scratch: where the buffers come from.
        """
        size, dtype = self.workspace, self.dtype
        outbound, inbound = ([scratch.empty(size.send, dtype) for _ in range(2)] for _ in range(2))
        matrices = [[scratch.empty(size.matrix, dtype) for _ in range(2)] for _ in range(2)]
        gram = scratch.empty(2 * size.gram, dtype)

        arriving = self._send_pieces(0, shards, outbound[0], matrices[0][0])
        for matrix in self.local:
            self._orthogonalize_local(matrix, shards, matrices[1], gram)
        returning = None
        for number, wave in enumerate(self.waves):
            even, odd = number % 2, 1 - number % 2
            arriving.wait()
            arriving = self._send_pieces(number + 1, shards, outbound[odd], matrices[odd][0])
            result = self._orthogonalize_arrived(wave.matrix, matrices[even], gram)
            if returning is not None:
                returning.wait()
                self._store_results(number - 1, shards, inbound[odd])
            returning = self._all_to_all(inbound[even], wave.outgoing, result, wave.incoming)
        if returning is not None:
            returning.wait()
            self._store_results(len(self.waves) - 1, shards, inbound[(len(self.waves) - 1) % 2])

    def _all_to_all(self, target: Tensor, incoming: list[int], source: Tensor, outgoing: list[int]) -> Work:
        """Start an exchange; as bytes, which every backend carries."""
        size = self.dtype.itemsize
        return torch.distributed.all_to_all_single(
            target[: sum(incoming)].view(torch.uint8),
            source[: sum(outgoing)].view(torch.uint8),
            [count * size for count in incoming],
            [count * size for count in outgoing],
            group=self.grid.group,
            async_op=True,
        )

    def _pieces(self, number: int, shards: Sequence[Tensor | None], packed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (range of a shard, its place in the packed buffer) of a wave."""
        position = 0
        for slot, start, numel in self.waves[number].ranges:
            shard = shards[slot]
            assert shard is not None, "the plan names a piece that this rank does not hold"
            yield shard[start : start + numel], packed[position : position + numel]
            position += numel

    def _send_pieces(
        self, number: int, shards: Sequence[Tensor | None], packed: Tensor, arrived: Tensor
    ) -> Work | None:
        if number == len(self.waves):
            return None
        for piece, place in self._pieces(number, shards, packed):
            place.copy_(piece)
        wave = self.waves[number]
        return self._all_to_all(arrived, wave.incoming, packed, wave.outgoing)

    def _store_results(self, number: int, shards: Sequence[Tensor | None], packed: Tensor) -> None:
        for piece, place in self._pieces(number, shards, packed):
            piece.copy_(place)

    def _orthogonalize_local(
        self, matrix: Matrix, shards: Sequence[Tensor | None], buffers: list[Tensor], gram: Tensor
    ) -> None:
        (piece,), shard = matrix.pieces, shards[matrix.slot]
        assert shard is not None, "the plan names a piece that this rank does not hold"
        values = shard.narrow(0, piece.start - self.shard_starts[matrix.slot], piece.numel)
        source, target = (buffer[: matrix.numel] for buffer in buffers)
        source.copy_(values)
        values.copy_(self._iterate(matrix, source, target, gram))

    def _orthogonalize_arrived(self, matrix: Matrix | None, buffers: list[Tensor], gram: Tensor) -> Tensor:
        """Return the result of this rank's matrix of a wave, in the order in which its pieces arrived."""
        if matrix is None:
            return buffers[1]
        source, target = (buffer[: matrix.numel] for buffer in buffers)
        source, target = assemble(matrix, self.grid.group_ranks, source, target)
        self._iterate(matrix, source, target, gram)
        return disassemble(matrix, self.grid.group_ranks, target, source)

    def _iterate(self, matrix: Matrix, source: Tensor, target: Tensor, gram: Tensor) -> Tensor:
        shape, short = (matrix.rows, matrix.cols), min(matrix.rows, matrix.cols)
        first, second = (gram[i * short * short : (i + 1) * short * short].view(short, short) for i in range(2))
        newton_schulz(source.view(shape), target.view(shape), first, second, self.steps)
        return target


def _arrival_offsets(matrix: Matrix, group_ranks: Sequence[int]) -> list[int] | None:
    """Return where each piece lies among all that arrived (by rank of the group); None if already in order."""
    order = sorted(range(len(matrix.pieces)), key=lambda i: group_ranks[matrix.pieces[i].rank])
    if order == list(range(len(order))):
        return None
    starts = accumulate((matrix.pieces[i].numel for i in order), initial=0)
    offsets = dict(zip(order, starts, strict=False))
    return [offsets[i] for i in range(len(order))]


def _slabs(matrix: Matrix, flat: Tensor) -> list[Tensor]:
    sizes = [rows * cols for rows, cols in matrix.slabs]
    return [part.view(shape) for part, shape in zip(flat.split(sizes), matrix.slabs, strict=True)]


def assemble(matrix: Matrix, group_ranks: Sequence[int], arrived: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Turn pieces in order of arrival into the flat matrix.

    Returns:
        The buffer that holds it, and the other one, which is free.
    """
    offsets = _arrival_offsets(matrix, group_ranks)
    if offsets is not None:
        position = 0
        for piece, offset in zip(matrix.pieces, offsets, strict=True):
            spare[position : position + piece.numel].copy_(arrived[offset : offset + piece.numel])
            position += piece.numel
        arrived, spare = spare, arrived
    if matrix.tp_axis == 1 and len(matrix.slabs) > 1:
        columns = [cols for _, cols in matrix.slabs]
        for target, slab in zip(
            spare.view(matrix.rows, matrix.cols).split(columns, dim=1), _slabs(matrix, arrived), strict=True
        ):
            target.copy_(slab)
        arrived, spare = spare, arrived
    return arrived, spare


def disassemble(matrix: Matrix, group_ranks: Sequence[int], flat: Tensor, spare: Tensor) -> Tensor:
    """Turn the flat matrix back into pieces in order of arrival; return the buffer that holds them."""
    if matrix.tp_axis == 1 and len(matrix.slabs) > 1:
        columns = [cols for _, cols in matrix.slabs]
        for slab, source in zip(
            _slabs(matrix, spare), flat.view(matrix.rows, matrix.cols).split(columns, dim=1), strict=True
        ):
            slab.copy_(source)
        flat, spare = spare, flat
    offsets = _arrival_offsets(matrix, group_ranks)
    if offsets is not None:
        position = 0
        for piece, offset in zip(matrix.pieces, offsets, strict=True):
            spare[offset : offset + piece.numel].copy_(flat[position : position + piece.numel])
            position += piece.numel
        flat = spare
    return flat
