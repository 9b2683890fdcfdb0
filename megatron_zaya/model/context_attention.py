"""Attention of sequences that are split over ranks, or hold several documents: block by block, without a mask.

Each block of the plan (attention_plan.py) goes through a fused kernel that also returns the logarithm of its softmax
sum, and blocks that share queries are merged by it (online softmax). The backward pass gives each block the final
output and sum, so that the gradients of the blocks add up to those of the whole. Nothing of size [S, S] exists.

The keys and values of other ranks come in one of two ways (`parallel.cp_comm_type`, Megatron's names):

    all_gather  all of them at once; gathered anew in the backward pass, whose result is summed and scattered
    p2p         a ring: while a rank works on the keys of one rank, those of the next are on their way; the gradients
                of keys and values travel behind them, back to their owner
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_zaya.model.attention_kernels import block_backward, block_forward
from megatron_zaya.model.attention_plan import Piece, visible_pieces
from megatron_zaya.model.precision import wide_dtype
from megatron_zaya.parallel.sequence import LocalSequence, Span, exchange, gather_sequence, scatter_sum, wait


def _rows(x_SBXD: Tensor, sample: int | None, start: int, stop: int, flip: bool) -> Tensor:
    """Return a view [B, X, S, D] of some rows, or a copy in reverse order."""
    x = x_SBXD[start:stop] if sample is None else x_SBXD[start:stop, sample : sample + 1]
    return (x.flip(0) if flip else x).permute(1, 2, 0, 3)


class _Softmax:
    """Output [S, B, Q, D] and logarithm of the softmax sum [S, B, Q, 1] of the blocks seen so far."""

    def __init__(self, q_SBQD: Tensor, merges: bool) -> None:
        wide = wide_dtype(q_SBQD.dtype)
        self.out = q_SBQD.new_empty(q_SBQD.shape, dtype=wide if merges else q_SBQD.dtype)
        self.log_sum = q_SBQD.new_empty(*q_SBQD.shape[:3], 1, dtype=wide)

    def add(self, q_SBQD: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, pieces: tuple[Piece, ...]) -> None:
        for piece in pieces:
            flip = piece.shape == "late"
            rows = (piece.sample, piece.q_start, piece.q_stop)
            q = _rows(q_SBQD, *rows, flip)
            k, v = (_rows(x, piece.sample, piece.k_start, piece.k_stop, flip) for x in (k_TBKD, v_TBKD))
            out, log_sum = block_forward(q, k, v, causal=piece.shape != "full")
            log_sum = log_sum.unsqueeze(-1)
            if flip:
                out, log_sum = out.flip(2), log_sum.flip(2)
            out_so_far, sum_so_far = _rows(self.out, *rows, False), _rows(self.log_sum, *rows, False)
            if piece.shape == "causal":  # the diagonal comes first, and holds every row once
                out_so_far.copy_(out)
                sum_so_far.copy_(log_sum)
                continue
            total = torch.logaddexp(sum_so_far, log_sum)
            out_so_far.mul_((sum_so_far - total).exp_()).addcmul_(out, (log_sum - total).exp_())
            sum_so_far.copy_(total)


def _add_gradients(
    grad_out: Tensor,
    q_SBQD: Tensor,
    k_TBKD: Tensor,
    v_TBKD: Tensor,
    saved: tuple[Tensor, Tensor],
    pieces: tuple[Piece, ...],
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add what the blocks contribute to the gradients of q, k and v."""
    for piece in pieces:
        flip = piece.shape == "late"
        q_rows = (piece.sample, piece.q_start, piece.q_stop)
        k_rows = (piece.sample, piece.k_start, piece.k_stop)
        grad, q, out, log_sum = (_rows(x, *q_rows, flip) for x in (grad_out, q_SBQD, *saved))
        k, v = (_rows(x, *k_rows, flip) for x in (k_TBKD, v_TBKD))
        parts = block_backward(grad, q, k, v, out, log_sum.squeeze(-1), causal=piece.shape != "full")
        for total, rows, part in zip(grads, (q_rows, k_rows, k_rows), parts, strict=True):
            _rows(total, *rows, False).add_(part.flip(2) if flip else part)


def _zeros_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(x, dtype=wide_dtype(x.dtype), memory_format=torch.contiguous_format) for x in tensors)


def _gathered_keys(k_SBKD: Tensor, v_SBKD: Tensor, sequence: LocalSequence) -> tuple[Tensor, ...]:
    if sequence.group.size() == 1:
        return k_SBKD, v_SBKD
    return gather_sequence(torch.cat([k_SBKD, v_SBKD], dim=2), sequence.group).chunk(2, dim=2)


class _GatheredAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, q_SBQD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, sequence: LocalSequence, window: int | None
    ) -> Tensor:
        whole = (Span(0, sequence.length, 0),)
        ctx.sequence, ctx.pieces = sequence, visible_pieces(sequence.spans, whole, sequence.documents, window)
        softmax = _Softmax(q_SBQD, merges=any(piece.shape != "causal" for piece in ctx.pieces))
        softmax.add(q_SBQD, *_gathered_keys(k_SBKD, v_SBKD, sequence), ctx.pieces)
        out = softmax.out.to(q_SBQD.dtype)
        ctx.save_for_backward(q_SBQD, k_SBKD, v_SBKD, out, softmax.log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        keys, values = _gathered_keys(k, v, ctx.sequence)
        grad_q, grad_kv = _zeros_like(q, torch.cat([keys, values], dim=2))
        _add_gradients(grad_out, q, keys, values, saved, ctx.pieces, (grad_q, *grad_kv.chunk(2, dim=2)))
        grad_k, grad_v = scatter_sum(grad_kv, ctx.sequence.group).chunk(2, dim=2)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


class _RingAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, q_SBQD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, sequence: LocalSequence, window: int | None
    ) -> Tensor:
        ctx.sequence, ctx.window = sequence, window
        softmax = _Softmax(q_SBQD, merges=True)
        for pieces, keys_values in _around(torch.stack([k_SBKD, v_SBKD]), sequence, window):
            softmax.add(q_SBQD, *keys_values, pieces)
        out = softmax.out.to(q_SBQD.dtype)
        ctx.save_for_backward(q_SBQD, k_SBKD, v_SBKD, out, softmax.log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        (grad_q,) = _zeros_like(q)
        group = ctx.sequence.group
        after, before = (group.rank() + 1) % group.size(), (group.rank() - 1) % group.size()
        received, works = None, []
        for pieces, keys_values in _around(torch.stack([k, v]), ctx.sequence, ctx.window):
            (grad_kv,) = _zeros_like(keys_values)
            _add_gradients(grad_out, q, *keys_values, saved, pieces, (grad_q, *grad_kv))
            wait(works)
            if received is not None:
                grad_kv += received
            received, sent = torch.empty_like(grad_kv), grad_kv
            works = exchange([(sent, after)], [(received, before)], group)
        wait(works)
        return grad_q.to(q.dtype), received[0].to(k.dtype), received[1].to(v.dtype), None, None


def _around(keys_values: Tensor, sequence: LocalSequence, window: int | None) -> Any:
    """Yield, once for each rank, the blocks of its keys and the keys; the next are on their way meanwhile."""
    group = sequence.group
    size, rank = group.size(), group.rank()
    for step in range(size):
        is_last = step == size - 1
        if not is_last:
            incoming = torch.empty_like(keys_values)
            works = exchange([(keys_values, (rank + 1) % size)], [(incoming, (rank - 1) % size)], group)
        keys = sequence.spans_of((rank - step) % size)
        yield visible_pieces(sequence.spans, keys, sequence.documents, window), keys_values
        if not is_last:
            wait(works)
            keys_values = incoming


def attend_across(
    q_SBQD: Tensor,
    k_SBKD: Tensor,
    v_SBKD: Tensor,
    sequence: LocalSequence,
    window: int | None,
    cp_comm_type: str,
) -> Tensor:
    """Attend over whole sequences of which this rank holds a part. Collective.

    Args:
        q_SBQD: local queries; k_SBKD, v_SBKD: local keys and values.
        sequence: which rows they are, and where documents start.
        window: tokens that a query sees, itself included; None: all before it.
        cp_comm_type: "all_gather" or "p2p".

    Returns:
        [S, B, Q, D]; the logits are scaled by 1/sqrt(D).
    """
    in_ring = cp_comm_type == "p2p" and sequence.group.size() > 1
    function = _RingAttention if in_ring else _GatheredAttention
    return function.apply(q_SBQD, k_SBKD, v_SBKD, sequence, window)
