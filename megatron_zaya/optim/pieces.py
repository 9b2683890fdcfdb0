"""Where the pieces of every Muon matrix lie, who orthogonalises it, and in which order. Pure arithmetic, no torch.

ZeRO-1 lays parameters one after the other into buckets and cuts each bucket into equal contiguous chunks, one per
data-parallel rank, wherever the cuts fall: a matrix may lie on one rank or on many. Under tensor parallelism each
rank of the tensor-parallel group holds a slab of it, cut again in the same way. A grid of T x D ranks (tensor x data
parallel) therefore holds each matrix as a list of pieces; in (t, d) order they make up the slabs of t = 0, 1, ...

Every rank computes the same plan from the same numbers, without communication. A matrix is orthogonalised once, by one
of the ranks that hold a piece. Matrices that span ranks are exchanged in waves of at most one per owner, so the working
space is a few matrices whatever the model's size, and all ranks run the same sequence of collectives: no deadlock.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Slot:
    """Place of one parameter in its bucket; equal on all ranks of the grid."""

    name: str
    local_shape: tuple[int, ...]
    """[stack ..., rows, columns] of a tensor-parallel rank."""
    start: int
    """First element in the bucket."""
    bucket_numel: int
    """Elements of the bucket, padding included; a multiple of the data-parallel size."""
    tp_axis: int = 0
    """What tensor parallelism splits: 0 rows, 1 columns."""
    copies: int = 1
    """Neighbouring tensor-parallel ranks that hold the same part: T where tensor parallelism splits nothing."""
    row_parts: int = 1
    """Logical matrices stored one below the other."""

    @property
    def numel(self) -> int:
        """Elements of a tensor-parallel rank."""
        return math.prod(self.local_shape)

    def owned(self, dp_rank: int, dp_size: int) -> tuple[int, int]:
        """Return the range [start, end) of the flattened local parameter that a data-parallel rank owns."""
        chunk = self.bucket_numel // dp_size
        start = min(max(dp_rank * chunk - self.start, 0), self.numel)
        end = min(max((dp_rank + 1) * chunk - self.start, 0), self.numel)
        return start, end


class Piece(NamedTuple):
    """A contiguous part of a matrix on one rank."""

    rank: int
    """t * D + d."""
    start: int
    """First element in the flattened local parameter."""
    numel: int


@dataclass(frozen=True)
class Matrix:
    """One logical matrix."""

    slot: int
    rows: int
    cols: int
    tp_axis: int
    """Along which axis the slabs are put together."""
    slabs: tuple[tuple[int, int], ...]
    """(rows, columns) of the slab of each tensor-parallel rank that holds one."""
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return self.rows * self.cols

    @property
    def work(self) -> int:
        """Multiplications of one Newton-Schulz step, relative."""
        short, long = sorted((self.rows, self.cols))
        return short * short * (2 * long + short)


@dataclass(frozen=True)
class Plan:
    """Who does what."""

    matrices: tuple[Matrix, ...]
    owners: tuple[int, ...]
    """Rank that orthogonalises each matrix."""
    local: dict[int, tuple[int, ...]]
    """By rank: matrices that lie whole on it."""
    waves: tuple[dict[int, int], ...]
    """Exchanges in order; each maps an owner to its matrix of this wave."""


def _slabs(slot: Slot, part: int, copy: int, tp_size: int) -> list[tuple[int, int, int]]:
    """Return (tensor-parallel rank, first local row, rows) of what makes up logical matrix ``part`` of a block."""
    rows, holders = slot.local_shape[-2], range(copy, tp_size, slot.copies)
    if slot.tp_axis == 1:
        size = rows // slot.row_parts
        return [(t, part * size, size) for t in holders]
    size = rows * len(holders) // slot.row_parts
    slabs = []
    for number, t in enumerate(holders):
        first, last = max(part * size, number * rows), min((part + 1) * size, (number + 1) * rows)
        if first < last:
            slabs.append((t, first - number * rows, last - first))
    return slabs


def _cut(slot: Slot, t: int, start: int, numel: int, dp_size: int) -> Iterator[Piece]:
    """Yield the pieces of a local range, one per data-parallel rank that owns some of it."""
    chunk = slot.bucket_numel // dp_size
    position, end = slot.start + start, slot.start + start + numel
    while position < end:
        d = position // chunk
        stop = min(end, (d + 1) * chunk)
        yield Piece(t * dp_size + d, position - slot.start, stop - position)
        position = stop


def matrices_of(index: int, slot: Slot, tp_size: int, dp_size: int) -> Iterator[Matrix]:
    """Yield the logical matrices of a parameter; a set of them for each copy."""
    rows, cols = slot.local_shape[-2:]
    parts = tp_size // slot.copies
    all_rows, all_cols = (rows * parts, cols) if slot.tp_axis == 0 else (rows, cols * parts)
    if all_rows % slot.row_parts:
        raise ValueError(f"{slot.name}: {all_rows} rows do not hold {slot.row_parts} equal matrices")
    stack = range(math.prod(slot.local_shape[:-2]))
    for stacked, part, copy in itertools.product(stack, range(slot.row_parts), range(slot.copies)):
        slabs = _slabs(slot, part, copy, tp_size)
        pieces = tuple(
            piece
            for t, first, count in slabs
            for piece in _cut(slot, t, (stacked * rows + first) * cols, count * cols, dp_size)
        )
        shapes = tuple((count, cols) for _, _, count in slabs)
        yield Matrix(index, all_rows // slot.row_parts, all_cols, slot.tp_axis, shapes, pieces)


def _choose_owners(matrices: Sequence[Matrix], ranks: int) -> list[int]:
    """Give each matrix to the least loaded of its holders; among equals to the one that holds most of it."""
    load = [0] * ranks
    owners = [0] * len(matrices)
    for index in sorted(range(len(matrices)), key=lambda i: (len(matrices[i].pieces) > 1, -matrices[i].work, i)):
        held: dict[int, int] = {}
        for piece in matrices[index].pieces:
            held[piece.rank] = held.get(piece.rank, 0) + piece.numel
        owner = min(held, key=lambda rank: (load[rank], -held[rank], rank))
        owners[index] = owner
        load[owner] += matrices[index].work
    return owners


def make_plan(slots: Sequence[Slot], tp_size: int, dp_size: int) -> Plan:
    """Return the plan for the parameters of one grid of ranks.

    Raises:
        ValueError: a parameter does not hold whole matrices.
    """
    matrices = [m for index, slot in enumerate(slots) for m in matrices_of(index, slot, tp_size, dp_size)]
    owners = _choose_owners(matrices, tp_size * dp_size)
    local: dict[int, list[int]] = {}
    queues: dict[int, list[int]] = {}
    for index, (matrix, owner) in enumerate(zip(matrices, owners, strict=True)):
        whole = len(matrix.pieces) == 1
        (local if whole else queues).setdefault(owner, []).append(index)
    waves = tuple(
        {owner: queue[number] for owner, queue in queues.items() if number < len(queue)}
        for number in range(max(map(len, queues.values()), default=0))
    )
    return Plan(tuple(matrices), tuple(owners), {rank: tuple(found) for rank, found in local.items()}, waves)


@dataclass(frozen=True)
class Workspace:
    """Elements that one rank needs while it orthogonalises, by buffer."""

    send: int
    """Its pieces of one wave; twice, and twice again for the results."""
    matrix: int
    """Its largest matrix; two in flight, and two results."""
    gram: int
    """Short side squared; two of them."""

    @property
    def numel(self) -> int:
        """All buffers together."""
        return 4 * self.send + 4 * self.matrix + 2 * self.gram


def messages(plan: Plan, number: int) -> dict[tuple[int, int], int]:
    """Return the elements that travel in a wave, by (holder, owner); an owner's own pieces are among them.

    Pieces go from holder to owner, results from owner to holder, in messages of the same sizes.
    """
    found: dict[tuple[int, int], int] = {}
    for owner, index in plan.waves[number].items():
        for piece in plan.matrices[index].pieces:
            found[piece.rank, owner] = found.get((piece.rank, owner), 0) + piece.numel
    return found


def workspaces(plan: Plan, ranks: int) -> list[Workspace]:
    """Return what each rank of the grid needs at most."""
    send, largest, gram = ([0] * ranks for _ in range(3))
    for number in range(len(plan.waves)):
        in_wave = [0] * ranks
        for (holder, _), numel in messages(plan, number).items():
            in_wave[holder] += numel
        send = [max(pair) for pair in zip(send, in_wave, strict=True)]
    for matrix, owner in zip(plan.matrices, plan.owners, strict=True):
        largest[owner] = max(largest[owner], matrix.numel)
        gram[owner] = max(gram[owner], min(matrix.rows, matrix.cols) ** 2)
    return [Workspace(*sizes) for sizes in zip(send, largest, gram, strict=True)]
