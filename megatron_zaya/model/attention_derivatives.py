"""Operations of attention whose backward pass is written out: convolution, norm, rotation, values, windows.

As in derivatives.py: plain torch for every device, and compiled passes in fp32 on a CPU (fused.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_zaya.model import fused
from megatron_zaya.model.precision import at_least_fp32


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_D: Tensor, sin_h: Tensor) -> Tensor:
        ctx.save_for_backward(cos_D, sin_h)
        half = sin_h.shape[-1]
        out = x * cos_D
        out[..., :half].addcmul_(x[..., half : 2 * half], sin_h, value=-1)
        out[..., half : 2 * half].addcmul_(x[..., :half], sin_h)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos_D, sin_h = ctx.saved_tensors
        return _Rotation.apply(grad, cos_D, -sin_h), None, None


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding: turn the pairs (i, i + h) of the first 2h components of the last dimension.

    Args:
        x: [..., D].
        angles: [..., h] in fp32 or wider, broadcast against ``x``. Their cosines and sines are rounded to the dtype
            of ``x``, as in the released code.
    """
    cos = angles.cos().to(x.dtype)
    rest = cos.new_ones(*cos.shape[:-1], x.shape[-1] - 2 * cos.shape[-1])
    return _Rotation.apply(x, torch.cat([cos, cos, rest], dim=-1), angles.sin().to(x.dtype))


class _CausalTaps(Function):
    @staticmethod
    def forward(
        ctx: Any, x_XRD: Tensor, weight_kXDD: Tensor, bias_X1D: Tensor, step: int, rows: int, position_T: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x_XRD, weight_kXDD, position_T)
        ctx.step = step
        return _taps(x_XRD, weight_kXDD, bias_X1D, step, rows, position_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x_XRD, weight_kXDD, position_T = ctx.saved_tensors
        grad_x_XRD = torch.zeros_like(x_XRD)
        grad_weight = _taps_backward(grad_XTD, x_XRD, weight_kXDD, ctx.step, position_T, grad_x_XRD)
        return grad_x_XRD, grad_weight, grad_XTD.sum(1, keepdim=True), None, None, None


def _windows(taps: int, step: int, rows_in: int, rows_out: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield, for each tap from the last to the first, which rows of the input it adds to which of the output."""
    for tap in reversed(range(taps)):
        first = rows_in - rows_out - (taps - 1 - tap) * step  # the input row of output row 0; below 0 there is none
        yield tap, slice(max(first, 0), max(first + rows_out, 0)), slice(min(max(-first, 0), rows_out), rows_out)


def _taps(
    x_XRD: Tensor, weight_kXDD: Tensor, bias_X1D: Tensor, step: int, rows: int, position_T: Tensor | None
) -> Tensor:
    out_XTD = None
    for tap, source, target in _windows(len(weight_kXDD), step, x_XRD.shape[1], rows):
        window = _within_document(x_XRD[:, source], len(weight_kXDD) - 1 - tap, position_T, target)
        if out_XTD is None:
            out_XTD = torch.baddbmm(bias_X1D, window, weight_kXDD[tap])
        else:
            out_XTD[:, target].baddbmm_(window, weight_kXDD[tap])
    assert out_XTD is not None, "a convolution has at least one tap"
    return out_XTD


def _taps_backward(
    grad_XTD: Tensor,
    x_XRD: Tensor,
    weight_kXDD: Tensor,
    step: int,
    position_T: Tensor | None,
    grad_x_XRD: Tensor,
) -> Tensor:
    """Add to the gradient of x, and return that of the weights."""
    grad_weight = torch.empty_like(weight_kXDD)
    for tap, source, target in _windows(len(weight_kXDD), step, x_XRD.shape[1], grad_XTD.shape[1]):
        grad = _within_document(grad_XTD[:, target], len(weight_kXDD) - 1 - tap, position_T, target)
        grad_x_XRD[:, source].baddbmm_(grad, weight_kXDD[tap].transpose(1, 2))
        torch.bmm(x_XRD[:, source].transpose(1, 2), grad, out=grad_weight[tap])
    return grad_weight


def _within_document(x_XTD: Tensor, distance: int, position_T: Tensor | None, rows: slice) -> Tensor:
    """Return ``x_XTD`` with zero rows for those tokens of ``rows`` whose document does not reach that far back."""
    if position_T is None or distance == 0:
        return x_XTD
    return x_XTD.masked_fill((position_T[rows] < distance).unsqueeze(-1), 0)


def causal_taps(
    x_XRD: Tensor, weight_kXDD: Tensor, bias_X1D: Tensor, step: int, rows: int, position_T: Tensor | None = None
) -> Tensor:
    """Return out[t] = bias + sum over j of x[t - j * step] weight[taps - 1 - j]: a matrix product per head and tap.

    Args:
        x_XRD: the last ``rows`` rows are those of the result; those before them, if any, are only looked back at.
            Beyond them everything is zero.
        weight_kXDD: [taps, X, in, out].
        bias_X1D: bias.
        step: rows from one token to the next of its sequence (sequences of a batch are interleaved).
        rows: T.
        position_T: position of each token in its document: inputs from before the document count as zero.

    Returns:
        [X, T, D].
    """
    return _CausalTaps.apply(x_XRD, weight_kXDD, bias_X1D, step, rows, position_T)


class _BlockPairs(Function):
    @staticmethod
    def forward(ctx: Any, x_SBKD: Tensor, window: int) -> tuple[Tensor, Tensor]:
        x_nWBKD = x_SBKD.unflatten(0, (-1, window))
        ctx.window = window
        return x_SBKD[:window].clone(), torch.cat([x_nWBKD[:-1], x_nWBKD[1:]], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_first: Tensor, grad_pairs: Tensor) -> tuple[Tensor, None]:
        before, itself = grad_pairs.split(ctx.window, dim=1)
        grad = grad_pairs.new_empty(len(grad_pairs) + 1, *before.shape[1:])
        torch.add(grad_first, before[0], out=grad[0])
        torch.add(itself[:-1], before[1:], out=grad[1:-1])
        grad[-1] = itself[-1]
        return grad.flatten(0, 1), None


def pair_blocks(x_SBKD: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Cut the sequence into n + 1 blocks of W = ``window`` tokens.

    Returns:
        The first block [W, B, K, D], and each of the others behind its predecessor [n, 2W, B, K, D].
    """
    return _BlockPairs.apply(x_SBKD, window)


@lru_cache
def mean_coupling(query_heads: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix [X, X] over heads, queries then keys, that couples q and k around the convolutions.

    Each query head is averaged with its key head; each key head becomes the mean of its group of those.
    """
    group_of_QK = torch.eye(groups, dtype=dtype, device=device).repeat_interleave(query_heads // groups, dim=0)
    queries = torch.cat([torch.eye(query_heads, dtype=dtype, device=device), group_of_QK], dim=1) / 2
    return torch.cat([queries, group_of_QK.T @ queries * (groups / query_heads)])


class _NormalisedSum(Function):
    @staticmethod
    def forward(ctx: Any, conv_TXD: Tensor, qk_TXD: Tensor, coupling_XX: Tensor, length_X1: Tensor) -> Tensor:
        sum_TXD = torch.baddbmm(conv_TXD, coupling_XX.expand(len(qk_TXD), -1, -1), qk_TXD)
        norm = torch.linalg.vector_norm(sum_TXD, dim=-1, keepdim=True)
        smallest = torch.finfo(sum_TXD.dtype).eps
        inverse = norm.clamp_min(smallest).reciprocal_()
        ctx.save_for_backward(sum_TXD, coupling_XX, length_X1, inverse, norm > smallest)
        return sum_TXD * (inverse * length_X1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TXD: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        sum_TXD, coupling_XX, length_X1, inverse, unclamped = ctx.saved_tensors
        along = (grad_TXD * sum_TXD).sum(-1, keepdim=True).mul_(inverse)
        scale = inverse * length_X1
        grad_sum = (grad_TXD * scale).addcmul_(sum_TXD, along * scale * inverse * unclamped, value=-1)
        grad_qk = torch.bmm(coupling_XX.t().expand(len(grad_sum), -1, -1), grad_sum)
        return grad_sum, grad_qk, None, along.sum(0)


def normalised_sum(conv_TXD: Tensor, qk_TXD: Tensor, length_X1: Tensor, query_heads: int) -> Tensor:
    """Return length * x / |x| of x = convolved heads + mean coupling of the plain heads; |.| over D.

    A norm below the dtype's epsilon counts as it.
    """
    groups = qk_TXD.shape[1] - query_heads
    coupling_XX = mean_coupling(query_heads, groups, qk_TXD.dtype, qk_TXD.device)
    return _NormalisedSum.apply(conv_TXD, qk_TXD, coupling_XX, length_X1)


class _AttentionInputs(Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_TC: Tensor,
        weight_kXDD: Tensor,
        bias_X1D: Tensor,
        length_X1: Tensor,
        cos_Rh: Tensor,
        sin_Rh: Tensor,
        step: int,
        query_heads: int,
        current_width: int,
        position_T: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        qk_TXD, current_TV, delayed_TV = _parts_of(qkv_TC, weight_kXDD, current_width)
        conv_XTD = _taps(qk_TXD.transpose(0, 1), weight_kXDD, bias_X1D, step, len(qkv_TC), position_T)
        out_TXD, sum_TXD, inverse_TX = fused.heads(conv_XTD, qk_TXD, length_X1, cos_Rh, sin_Rh, query_heads)
        value_TV = qkv_TC.new_empty(len(qkv_TC), current_TV.shape[1] + delayed_TV.shape[1])
        value_TV[:, :current_width] = current_TV
        value_TV[:step, current_width:] = 0
        value_TV[step:, current_width:] = delayed_TV[:-step]
        if position_T is not None:
            value_TV[:, current_width:].masked_fill_((position_T == 0).unsqueeze(-1), 0)
        ctx.save_for_backward(qkv_TC, weight_kXDD, position_T, sum_TXD, inverse_TX, length_X1, cos_Rh, sin_Rh)
        ctx.numbers = step, query_heads, current_width
        return out_TXD, value_TV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TXD: Tensor, grad_value_TV: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TC, weight_kXDD, position_T, *of_heads = ctx.saved_tensors
        step, query_heads, current_width = ctx.numbers
        grad_qkv_TC = torch.empty_like(qkv_TC)
        grad_qk_TXD, grad_current_TV, grad_delayed_TV = _parts_of(grad_qkv_TC, weight_kXDD, current_width)
        grad_conv_XTD, grad_length_X1 = fused.heads_backward(grad_TXD, *of_heads, query_heads, grad_qk_TXD)
        x_XTD, grad_x_XTD = (x.transpose(0, 1) for x in (_parts_of(qkv_TC, weight_kXDD, 0)[0], grad_qk_TXD))
        grad_weight = _taps_backward(grad_conv_XTD, x_XTD, weight_kXDD, step, position_T, grad_x_XTD)
        grad_current_TV[:] = grad_value_TV[:, :current_width]
        grad_delayed_TV[:-step] = grad_value_TV[step:, current_width:]
        grad_delayed_TV[-step:] = 0
        if position_T is not None:
            grad_delayed_TV[:-step].masked_fill_((position_T[step:] == 0).unsqueeze(-1), 0)
        return grad_qkv_TC, grad_weight, grad_conv_XTD.sum(1, keepdim=True), grad_length_X1, *[None] * 6


def _parts_of(qkv_TC: Tensor, weight_kXDD: Tensor, current_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the views of q and k [T, X, D], and of the current and the delayed part of v [T, V]."""
    heads, width = weight_kXDD.shape[1:3]
    value = heads * width
    qk_TXD = qkv_TC[:, :value].unflatten(1, (heads, width))
    return qk_TXD, qkv_TC[:, value : value + current_width], qkv_TC[:, value + current_width :]


def attention_inputs(
    qkv_SBC: Tensor,
    weight_kXDD: Tensor,
    bias_X1D: Tensor,
    length_X1: Tensor,
    angles: Tensor,
    query_heads: int,
    current_width: int,
    position_SB: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Do :func:`causal_taps`, :func:`normalised_sum`, :func:`rotate` and the delay of the values in one go.

    Args:
        qkv_SBC: q and k heads, then values, of whole sequences; fp32 on a CPU, as all others (see fused.fits).
        weight_kXDD: taps of the one convolution of q and k; ``bias_X1D`` its bias.
        length_X1: of each head.
        angles: [S, B or 1, 1, h].
        query_heads: how many of the X heads are queries; the others are keys.
        current_width: how many of the V values are a token's own; the others come from the token before.
        position_SB: position of each token in its document, where there are several.

    Returns:
        q and k [S, B, X, D], and the values [S, B, V].
    """
    seq, batch = qkv_SBC.shape[:2]
    cos_Rh, sin_Rh = (x.flatten(0, 2) for x in (angles.cos(), angles.sin()))
    position_T = None if position_SB is None else position_SB.flatten()
    tensors = (qkv_SBC.flatten(0, 1), weight_kXDD, bias_X1D, length_X1, cos_Rh, sin_Rh)
    qk_TXD, value_TV = _AttentionInputs.apply(*tensors, batch, query_heads, current_width, position_T)
    return qk_TXD.unflatten(0, (seq, batch)), value_TV.unflatten(0, (seq, batch))


class _MergedConvolution(Function):
    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*weights)
        if fused.fits(*weights):
            return fused.merged_convolution(weights)
        first_aXD1, first_bias_X1D, second_bXDD, second_bias_X1D = _factors(weights)
        weight_kXDD = second_bXDD.new_zeros(len(first_aXD1) + len(second_bXDD) - 1, *second_bXDD.shape[1:])
        for tap, first_XD1 in enumerate(first_aXD1):
            weight_kXDD[tap : tap + len(second_bXDD)].addcmul_(first_XD1, second_bXDD)
        return weight_kXDD, torch.baddbmm(second_bias_X1D, first_bias_X1D, second_bXDD.sum(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kXDD: Tensor, grad_X1D: Tensor) -> tuple[Tensor, ...]:
        weights = ctx.saved_tensors
        if fused.fits(grad_kXDD, grad_X1D, *weights):
            return fused.merged_convolution_backward(grad_kXDD, grad_X1D, weights)
        first_aXD1, first_bias_X1D, second_bXDD, _ = _factors(weights)
        grad_first, grad_second = torch.empty_like(first_aXD1), torch.zeros_like(second_bXDD)
        for tap, first_XD1 in enumerate(first_aXD1):
            grad = grad_kXDD[tap : tap + len(second_bXDD)]
            grad_first[tap] = (grad * second_bXDD).sum((0, -1)).unsqueeze(-1)
            grad_second.addcmul_(first_XD1, grad)
        grad_second.addcmul_(first_bias_X1D.transpose(1, 2), grad_X1D)
        grad_first_bias = grad_X1D @ second_bXDD.sum(0).transpose(1, 2)
        joined = grad_first.permute(1, 2, 3, 0), grad_first_bias, grad_second.permute(1, 3, 2, 0), grad_X1D
        sizes = [len(weights[1]), len(weights[5])]
        parts = [x.reshape(sum(sizes), *w.shape[1:]).split(sizes) for x, w in zip(joined, weights[:4], strict=True)]
        grads = [part[stream] for stream in range(2) for part in parts]
        return tuple(grad.to(w.dtype) for grad, w in zip(grads, weights, strict=True))


def _factors(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return taps [a, X, D, 1] and bias [X, 1, D] of the first convolution, [b, X, in, out] and bias of the second."""
    joined = [at_least_fp32(torch.cat(pair)) for pair in zip(weights[:4], weights[4:], strict=True)]
    first, first_bias, second, second_bias = joined
    channels, width, taps = second.shape
    heads = channels // width
    first_aXD1 = first.view(heads, width, 1, -1).permute(3, 0, 1, 2)
    second_bXDD = second.view(heads, width, width, taps).permute(3, 0, 2, 1)
    return first_aXD1, first_bias.view(heads, 1, width), second_bXDD, second_bias.view(heads, 1, width)


def merged_convolution(q: dict[str, Tensor], k: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the one convolution that a depthwise and then a head-wise one amount to: nothing stands between them.

    The products of the weights are small next to those of the tokens.

    Args:
        q: of the query heads, in this order: depthwise weight [C, 1, k0], one per channel, and bias [C]; head-wise
            weight [C, D, k1], out before in, and bias [C].
        k: of the key heads.

    Returns:
        Weight [k0 + k1 - 1, X, in, out] and bias [X, 1, D] of all heads, at least fp32: tap k is the sum over
        a + b = k of first[a] second[b].
    """
    return _MergedConvolution.apply(*q.values(), *k.values())
