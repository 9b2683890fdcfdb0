"""Context parallelism: which rows of the sequence a rank holds, and what it needs from the others.

A sequence of S tokens is cut into 2 n equal chunks for n context-parallel ranks; rank r holds the chunks r and
2 n - 1 - r, in this order (zig-zag: early rows see few keys, late rows many, so every rank has equal work). The plans
are pure functions of numbers; the autograd Functions below them communicate, and their backward passes mirror.

    chunk     0 1 2 3 4 5 6 7        (n = 4)
    rank      0 1 2 3 3 2 1 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


class Span(NamedTuple):
    """Rows ``start`` .. ``stop`` of a sequence, found from row ``offset`` on in some tensor."""

    start: int
    stop: int
    offset: int


def chunks_of(rank: int, size: int) -> tuple[int, ...]:
    """Return the chunks that ``rank`` of ``size`` context-parallel ranks holds, in the order it holds them."""
    return (0,) if size == 1 else (rank, 2 * size - 1 - rank)


def owner_of(chunk: int, size: int) -> int:
    """Return the rank that holds ``chunk``."""
    return min(chunk, 2 * size - 1 - chunk)


def local_spans(length: int, rank: int, size: int) -> tuple[Span, ...]:
    """Return the rows of a sequence of ``length`` tokens that ``rank`` holds, with their place in its tensors."""
    chunks = chunks_of(rank, size)
    rows = length // (size * len(chunks))
    return tuple(Span(chunk * rows, (chunk + 1) * rows, slot * rows) for slot, chunk in enumerate(chunks))


def split_zigzag(x: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """Return the part of a whole sequence that ``rank`` holds; ``dim`` is the sequence dimension."""
    if size == 1:
        return x
    chunks = x.chunk(2 * size, dim=dim)
    return torch.cat([chunks[chunk] for chunk in chunks_of(rank, size)], dim=dim)


def merge_zigzag(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return the whole sequence of which ``parts[r]`` is what rank r holds."""
    if len(parts) == 1:
        return parts[0]
    first, second = zip(*(part.chunk(2, dim=dim) for part in parts), strict=True)
    return torch.cat([*first, *reversed(second)], dim=dim)


class HaloMove(NamedTuple):
    """The last rows of one chunk go in front of the next: slots count the chunks of a rank."""

    source: int
    source_slot: int
    target: int
    target_slot: int


def halo_plan(size: int) -> list[HaloMove]:
    """Return who needs whose last rows, in the order of the chunks; the first chunk of the sequence needs none."""
    moves = []
    for chunk in range(1, 2 * size if size > 1 else 1):
        source, target = owner_of(chunk - 1, size), owner_of(chunk, size)
        slots = chunks_of(source, size).index(chunk - 1), chunks_of(target, size).index(chunk)
        moves.append(HaloMove(source, slots[0], target, slots[1]))
    return moves


@dataclass(frozen=True)
class LocalSequence:
    """What this rank holds of the sequences of one micro-batch."""

    length: int
    """Tokens of a whole sequence."""
    group: ProcessGroup
    """The context-parallel ranks."""
    documents: tuple[tuple[int, ...], ...] | None = None
    """For each sample where its documents start, and the sequence's length; None: one document per sample."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(
        cls, length: int, batch: int, group: ProcessGroup, cu_seqlens: Tensor | None, device: torch.device
    ) -> LocalSequence:
        """Describe a micro-batch.

        Args:
            length: tokens of a whole sequence.
            batch: samples.
            group: the context-parallel ranks.
            cu_seqlens: integers, where documents start in the samples laid end to end, and batch * length; on the
                CPU, so that no kernel has to be waited for. A sample's start always is a document's start.
            device: where the model computes.

        Raises:
            ValueError: the boundaries do not fit the samples.
        """
        if cu_seqlens is None:
            return cls(length, group, None, device)
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] != batch * length or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(
                f"cu_seqlens must grow from 0 to {batch} x {length} = {batch * length}, the tokens of the micro-batch; "
                f"it is {starts if len(starts) < 9 else [*starts[:4], '...', *starts[-4:]]}"
            )
        samples = []
        for first in range(0, batch * length, length):
            inside = {start - first for start in starts if first < start < first + length}
            samples.append(tuple(sorted({0, length} | inside)))
        return cls(length, group, tuple(samples), device)

    @property
    def is_plain(self) -> bool:
        """Return whether this rank holds whole sequences of one document each."""
        return self.group.size() == 1 and self.documents is None

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The rows that this rank holds."""
        return local_spans(self.length, self.group.rank(), self.group.size())

    def spans_of(self, rank: int) -> tuple[Span, ...]:
        """Return the rows that another context-parallel rank holds."""
        return local_spans(self.length, rank, self.group.size())

    @cached_property
    def position_SB(self) -> Tensor:
        """Position of each local row in its document, int64; [S, 1] where every sample is one document."""
        rows = torch.cat([torch.arange(span.start, span.stop, device=self.device) for span in self.spans])
        if self.documents is None:
            return rows.unsqueeze(1)
        columns = []
        for starts in self.documents:
            starts = torch.tensor(starts, device=self.device)
            columns.append(rows - starts[torch.searchsorted(starts, rows, right=True) - 1])
        return torch.stack(columns, dim=1)


def exchange(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], group: ProcessGroup) -> list[Any]:
    """Start sending and receiving contiguous tensors; the numbers are ranks of ``group``. Return what to wait for."""
    operations = [dist.P2POp(dist.isend, x, dist.get_global_rank(group, peer), group) for x, peer in sends]
    operations += [dist.P2POp(dist.irecv, x, dist.get_global_rank(group, peer), group) for x, peer in receives]
    return dist.batch_isend_irecv(operations) if operations else []


def wait(works: list[Any]) -> None:
    """Wait for what :func:`exchange` started."""
    for work in works:
        work.wait()


def _move_rows(rows: list[Tensor], group: ProcessGroup, backward: bool) -> list[Tensor]:
    """Carry one block of rows per chunk along the plan (or against it); what nothing reaches is zero."""
    out = [torch.zeros_like(block) for block in rows]
    sends, receives = [], []
    for move in halo_plan(group.size()):
        if backward:
            move = HaloMove(move.target, move.target_slot, move.source, move.source_slot)
        if move.source == move.target == group.rank():
            out[move.target_slot].copy_(rows[move.source_slot])
        elif move.source == group.rank():
            sends.append((rows[move.source_slot].contiguous(), move.target))
        elif move.target == group.rank():
            receives.append((out[move.target_slot], move.source))
    wait(exchange(sends, receives, group))
    return out


class _ExchangeHalo(Function):
    @staticmethod
    def forward(ctx: Any, x_SBC: Tensor, rows: int, group: ProcessGroup) -> tuple[Tensor, ...]:
        ctx.rows, ctx.group, ctx.shape = rows, group, x_SBC.shape
        return tuple(_move_rows([chunk[-rows:] for chunk in x_SBC.chunk(2)], group, backward=False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_x = grads[0].new_zeros(ctx.shape)
        tails = _move_rows([grad.contiguous() for grad in grads], ctx.group, backward=True)
        for chunk, tail in zip(grad_x.chunk(2), tails, strict=True):
            chunk[-ctx.rows :] = tail
        return grad_x, None, None


def exchange_halo(x_SBC: Tensor, rows: int, group: ProcessGroup) -> tuple[Tensor, ...]:
    """Return the ``rows`` rows before each local chunk, from the ranks that hold them. Collective.

    Zero before the start of the sequence. A chunk has at least ``rows`` rows. With one rank there is one chunk, and
    nothing before it.
    """
    if group.size() == 1:
        return (x_SBC.new_zeros(rows, *x_SBC.shape[1:]),)
    return _ExchangeHalo.apply(x_SBC, rows, group)


def gather_sequence(x_SBC: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows of all ranks in the order of the sequence; not differentiable by itself. Collective."""
    if group.size() == 1:
        return x_SBC
    gathered = x_SBC.new_empty(group.size(), *x_SBC.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), x_SBC.contiguous(), group=group)
    return merge_zigzag(list(gathered), dim=0)


def scatter_sum(x_TBC: Tensor, group: ProcessGroup) -> Tensor:
    """Sum whole sequences over the ranks and return the rows of this one: the mirror of the gather. Collective."""
    if group.size() == 1:
        return x_TBC
    parts = torch.cat([split_zigzag(x_TBC, 0, rank, group.size()) for rank in range(group.size())])
    out = x_TBC.new_empty(len(x_TBC) // group.size(), *x_TBC.shape[1:])
    dist.reduce_scatter_tensor(out, parts, group=group)
    return out
