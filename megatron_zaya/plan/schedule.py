"""The order in which a pipeline rank runs its micro-batches, and what that order keeps alive. Pure arithmetic.

Orders are Megatron-Core's: 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2.1), interleaved 1F1B (section 2.2.2),
and GPipe (all forward passes first, arXiv 1811.06965).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Slot(NamedTuple):
    """One forward or backward pass of one micro-batch through one virtual stage (chunk) of a rank."""

    forward: bool
    microbatch: int
    chunk: int


def warmup_passes(pp: int, vp: int, microbatches: int, rank: int) -> int:
    """Return the forward passes of ``rank`` before its first backward pass, less one.

    Source: Megatron-Core, `get_pp_rank_microbatches`: without interleaving the stages after this one; with it twice
    as many, plus a full turn for each chunk after the first.
    """
    total = microbatches * vp
    if vp == 1:
        return min(total, pp - rank - 1)
    return min(total, (pp - rank - 1) * 2 + (vp - 1) * pp)


def _virtual(index: int, pp: int, vp: int, forward: bool) -> Slot:
    """Return the ``index``-th pass of one direction: turns of ``pp`` micro-batches through each chunk."""
    turn, inside = divmod(index, pp * vp)
    chunk = inside // pp
    return Slot(forward, turn * pp + inside % pp, chunk if forward else vp - 1 - chunk)


@lru_cache(maxsize=4096)
def passes(pp: int, vp: int, microbatches: int, rank: int, schedule: str = "1f1b") -> tuple[Slot, ...]:
    """Return every pass of ``rank``, in order."""
    total = microbatches * vp
    warmup = total if schedule == "gpipe" else warmup_passes(pp, vp, microbatches, rank)
    forward = [_virtual(i, pp, vp, True) for i in range(total)]
    backward = [_virtual(i, pp, vp, False) for i in range(total)]
    order = forward[:warmup]
    for index in range(warmup, total):
        order += [forward[index], backward[index - warmup]]
    return tuple(order + backward[total - warmup :])


@lru_cache(maxsize=4096)
def alive_chunks(pp: int, vp: int, microbatches: int, rank: int, schedule: str = "1f1b") -> tuple[tuple[int, ...], ...]:
    """Return the distinct numbers of live micro-batches per chunk, right after a forward pass; dominated ones left out.

    The pattern repeats after warm-up, so that more than a few turns of micro-batches change nothing.
    """
    if schedule == "1f1b":
        microbatches = min(microbatches, 4 * pp)
    counts = [0] * vp
    seen: set[tuple[int, ...]] = set()
    for slot in passes(pp, vp, microbatches, rank, schedule):
        counts[slot.chunk] += 1 if slot.forward else -1
        if slot.forward:
            seen.add(tuple(counts))
    return tuple(
        state
        for state in seen
        if not any(other != state and all(a >= b for a, b in zip(other, state, strict=True)) for other in seen)
    )
