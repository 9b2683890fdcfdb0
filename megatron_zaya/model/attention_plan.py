"""Which blocks of the attention matrix are seen: rectangles and triangles, planned as numbers.

Token i sees token j if both are in one document, j <= i, and (in a sliding layer) i - j < window. Any part of that set
is a union of three shapes, none of which needs a mask of its own:

    full        every row sees every column
    causal      square; row t sees the columns 0 .. t
    late        square; row t sees the columns t .. n - 1 (what a window leaves of the past)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from megatron_zaya.parallel.sequence import Span

Shape = Literal["full", "causal", "late"]


class Piece(NamedTuple):
    """A block of the attention matrix: rows of the given queries, rows of the given keys."""

    sample: int | None
    """One sample of the micro-batch; None stands for all."""
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    shape: Shape


def _past(q0: int, q1: int, k0: int, k1: int, window: int | None) -> Iterator[tuple[int, int, int, int, Shape]]:
    """Yield the blocks of the queries q0 .. q1 and of the keys k0 .. k1 before them."""
    if window is not None:
        k0, q1 = max(k0, q0 - window + 1), min(q1, k1 + window - 1)
    if q0 >= q1 or k0 >= k1:
        return
    # The last query sees keys from q1 - window on, and so do all others.
    edge = k0 if window is None else min(max(k0, q1 - window), k1)
    if edge < k1:
        yield q0, q1, edge, k1, "full"
    if k0 < edge:
        # Of the earlier keys, queries up to k0 + window - 1 see all, each one after that one key less.
        turn = k0 + window - 1
        if q0 < turn:
            yield q0, turn, k0, edge, "full"
        yield turn, turn + edge - k0, k0, edge, "late"


def _in_document(q0: int, q1: int, k0: int, k1: int, window: int | None) -> Iterator[tuple[int, int, int, int, Shape]]:
    """Yield the blocks of the queries q0 .. q1 and the keys k0 .. k1 of one document."""
    yield from _past(q0, q1, k0, min(k1, q0), window)
    if k1 <= q0 or k0 >= q1:
        return
    assert k0 <= q0 and q1 <= k1, "keys cover the rows of a query chunk, or none of them"
    step = q1 - q0 if window is None else window
    for first in range(q0, q1, step):
        last = min(first + step, q1)
        yield first, last, first, last, "causal"
        if first > q0:
            yield from _past(first, last, q0, first, window)


@lru_cache(maxsize=1024)
def visible_pieces(
    queries: tuple[Span, ...],
    keys: tuple[Span, ...],
    documents: tuple[tuple[int, ...], ...] | None,
    window: int | None,
) -> tuple[Piece, ...]:
    """Return blocks that hold every pair of a query and a key it sees exactly once.

    Args:
        queries: the rows of the sequence that the queries are.
        keys: the rows that the keys are; each is equal to, contains, or is disjoint from each of the queries'.
        documents: for each sample where its documents start, and the sequence's length; None: one each.
        window: tokens that a query sees, itself included; None: all before it.
    """
    length = max(rows.stop for rows in (*queries, *keys))
    samples: Sequence[tuple[int | None, tuple[int, ...]]]
    samples = [(None, (0, length))] if documents is None else list(enumerate(documents))
    pieces = []
    for sample, starts in samples:
        for q in queries:
            for k in keys:
                for start, stop in pairwise(starts):
                    q0, q1 = max(q.start, start), min(q.stop, stop)
                    k0, k1 = max(k.start, start), min(k.stop, stop)
                    if q0 >= q1 or k0 >= k1:
                        continue
                    for a, b, c, d, shape in _in_document(q0, q1, k0, k1, window):
                        to_q, to_k = q.offset - q.start, k.offset - k.start
                        pieces.append(Piece(sample, a + to_q, b + to_q, c + to_k, d + to_k, shape))
    # Triangles on the diagonal first: they hold every row once, so the rest can be added to them.
    return tuple(sorted(pieces, key=lambda piece: piece.shape != "causal"))
