"""Operations whose backward pass is written out, because autograd's makes more passes over memory.

Each is plain torch, equal to its formula up to rounding, and used on every device unless it says otherwise. Where a
gradient is the sum of slices, it is written in place instead of padding each slice with zeros and adding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        mean_square_T1 = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True).square_().div_(x_TH.shape[-1])
        inverse_T1 = mean_square_T1.add_(eps).rsqrt_()
        ctx.save_for_backward(x_TH, weight_H, inverse_T1)
        return (x_TH * inverse_T1).mul_(weight_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TH, weight_H, inverse_T1 = ctx.saved_tensors
        product_TH = grad_TH * x_TH
        along_T = (product_TH @ weight_H).mul_(inverse_T1.flatten().square()).div_(x_TH.shape[-1])
        grad_weight_H = inverse_T1.flatten() @ product_TH
        grad_x_TH = torch.mul(grad_TH, weight_H, out=product_TH)
        return grad_x_TH.addcmul_(x_TH, along_T.unsqueeze(-1), value=-1).mul_(inverse_T1), grad_weight_H, None


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, wide: bool = True) -> Tensor:
    """Root-mean-square norm of the last dimension, statistics and product in fp32 if ``wide``.

    That is what torch's own kernel does; it has none in fp32 on a CPU.
    """
    if wide and (x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64)):
        return F.rms_norm(x, weight_H.shape, weight_H, eps)
    return _RMSNorm.apply(x.flatten(0, -2), weight_H, eps).view(x.shape)


class _ScaledSum(Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, a_scale_H: Tensor, a_bias_H: Tensor, b: Tensor, b_scale_H: Tensor, b_bias_H: Tensor
    ) -> Tensor:
        ctx.save_for_backward(a, a_scale_H, a_bias_H, b, b_scale_H, b_bias_H)
        # The two biases are constants of the token: one vector, two fused multiply-adds over the stream.
        constant_H = torch.addcmul(a_bias_H * a_scale_H, b_bias_H, b_scale_H)
        return torch.addcmul(constant_H, a, a_scale_H).addcmul_(b, b_scale_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        a, a_scale_H, a_bias_H, b, b_scale_H, b_bias_H = ctx.saved_tensors
        sum_H = grad.flatten(0, -2).sum(0)
        product = grad * a
        a_scale_grad_H = product.flatten(0, -2).sum(0).addcmul_(sum_H, a_bias_H)
        torch.mul(grad, b, out=product)
        b_scale_grad_H = product.flatten(0, -2).sum(0).addcmul_(sum_H, b_bias_H)
        grad_a = torch.mul(grad, a_scale_H, out=product), a_scale_grad_H, sum_H * a_scale_H
        return *grad_a, grad * b_scale_H, b_scale_grad_H, sum_H * b_scale_H


def scaled_sum(
    a: Tensor, a_scale_H: Tensor, a_bias_H: Tensor, b: Tensor, b_scale_H: Tensor, b_bias_H: Tensor
) -> Tensor:
    """Return (a + a_bias) * a_scale + (b + b_bias) * b_scale; all have one dtype."""
    return _ScaledSum.apply(a, a_scale_H, a_bias_H, b, b_scale_H, b_bias_H)


class _WeightedSwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight_T1: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight_T1)
        gate_TF, up_TF = gate_up.chunk(2, dim=-1)
        return F.silu(gate_TF).mul_(up_TF).mul_(weight_T1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weight_T1 = ctx.saved_tensors
        gate_TF, up_TF = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate_TF, grad_up_TF = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad_TF, F.silu(gate_TF), out=grad_up_TF)
        product_TF = grad_up_TF * up_TF
        grad_weight_T1 = product_TF.sum(-1, keepdim=True)
        torch.mul(grad_TF, up_TF, out=product_TF)
        torch.ops.aten.silu_backward(product_TF, gate_TF, grad_input=grad_gate_TF)
        return grad_gate_up.mul_(weight_T1), grad_weight_T1


def weighted_swiglu(gate_up: Tensor, weight_T1: Tensor) -> Tensor:
    """Return weight * silu(gate) * up, [T, F], of the [T, 2F] rows [gate | up]."""
    return _WeightedSwiGLU.apply(gate_up, weight_T1)


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
        ctx: Any, x_XRD: Tensor, weight_kXDD: Tensor, bias_X1D: Tensor, step: int, position_T: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x_XRD, weight_kXDD, position_T)
        ctx.step = step
        rows = x_XRD.shape[1] - (len(weight_kXDD) - 1) * step
        out = bias_X1D
        for tap, weight_XDD in enumerate(weight_kXDD):
            window = _within_document(x_XRD[:, tap * step : tap * step + rows], len(weight_kXDD) - 1 - tap, position_T)
            out = torch.baddbmm(bias_X1D, window, weight_XDD) if tap == 0 else out.baddbmm_(window, weight_XDD)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_XRD, weight_kXDD, position_T = ctx.saved_tensors
        rows, step = grad_XTD.shape[1], ctx.step
        grad_x, grad_weight = torch.empty_like(x_XRD), torch.empty_like(weight_kXDD)
        grad_x[:, rows:].zero_()  # the first tap fills the others
        for tap, weight_XDD in enumerate(weight_kXDD):
            window = slice(tap * step, tap * step + rows)
            grad = _within_document(grad_XTD, len(weight_kXDD) - 1 - tap, position_T)
            grad_x[:, window].baddbmm_(grad, weight_XDD.transpose(1, 2), beta=min(tap, 1))
            torch.bmm(x_XRD[:, window].transpose(1, 2), grad, out=grad_weight[tap])
        return grad_x, grad_weight, grad_XTD.sum(1, keepdim=True), None, None


def _within_document(x_XTD: Tensor, distance: int, position_T: Tensor | None) -> Tensor:
    """Return ``x_XTD`` with zero rows for tokens whose document does not reach ``distance`` tokens back."""
    if position_T is None or distance == 0:
        return x_XTD
    return x_XTD.masked_fill((position_T < distance).unsqueeze(-1), 0)


def causal_taps(
    x_XRD: Tensor, weight_kXDD: Tensor, bias_X1D: Tensor, step: int, position_T: Tensor | None = None
) -> Tensor:
    """Return out[t] = bias + sum over taps j of x[t + j * step] weight[j], one matrix product per head X and tap.

    The R rows of ``x_XRD`` are ``(taps - 1) * step`` more than those of the result [X, T, D]. With ``position_T``,
    the position of each token in its document, inputs from before the document count as zero.
    """
    return _CausalTaps.apply(x_XRD, weight_kXDD, bias_X1D, step, position_T)


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


class _RunProduct(Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_EOI: Tensor, runs: list[int]) -> Tensor:
        ctx.save_for_backward(x_TI, weight_EOI)
        ctx.runs = runs
        out = x_TI.new_empty(x_TI.shape[0], weight_EOI.shape[1])
        for x, weight, y in zip(x_TI.split(runs), weight_EOI, out.split(runs), strict=True):
            torch.mm(x, weight.t(), out=y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TI, weight_EOI = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x_TI), torch.empty_like(weight_EOI)
        parts = (x_TI.split(ctx.runs), grad_TO.split(ctx.runs), weight_EOI, grad_x.split(ctx.runs), grad_weight)
        for x, grad, weight, gx, gw in zip(*parts, strict=True):
            torch.mm(grad, weight, out=gx)
            torch.mm(grad.t(), x, out=gw)
        return grad_x, grad_weight, None


def run_product(x_TI: Tensor, weight_EOI: Tensor, runs: list[int]) -> Tensor:
    """Multiply each run of rows (lengths sum to T) with its own matrix, one product after the other: [T, O]."""
    return _RunProduct.apply(x_TI, weight_EOI, runs)


def _take(x_TH: Tensor, order_T: Tensor, inverse_T: Tensor, count: int) -> Tensor:
    return x_TH.index_select(0, order_T[:count])


def _spread(x_CH: Tensor, order_T: Tensor, inverse_T: Tensor, count: int) -> Tensor:
    if count == 0:
        return x_CH.new_zeros(len(order_T), x_CH.shape[1])
    return x_CH.index_select(0, inverse_T.clamp_max(count - 1)).index_fill_(0, order_T[count:], 0)


class _MovedRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order_T: Tensor, inverse_T: Tensor, count: int, back: bool) -> Tensor:
        ctx.save_for_backward(order_T, inverse_T)
        ctx.count, ctx.back = count, back
        return (_spread if back else _take)(x, order_T, inverse_T, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return (_take if ctx.back else _spread)(grad, *ctx.saved_tensors, ctx.count), None, None, None, None


def take_rows(x_TH: Tensor, order_T: Tensor, inverse_T: Tensor, count: int) -> Tensor:
    """Return rows ``order_T[:count]`` of a permutation and its inverse: backward is a gather too, not a scatter-add."""
    return _MovedRows.apply(x_TH, order_T, inverse_T, count, False)


def spread_rows(x_CH: Tensor, order_T: Tensor, inverse_T: Tensor, count: int) -> Tensor:
    """Undo :func:`take_rows`: put the rows back where they came from; the T - count others are zero."""
    return _MovedRows.apply(x_CH, order_T, inverse_T, count, True)


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


class _MergedTaps(Function):
    @staticmethod
    def forward(ctx: Any, first_aXD1: Tensor, second_bXDD: Tensor) -> Tensor:
        ctx.save_for_backward(first_aXD1, second_bXDD)
        taps0, taps1 = len(first_aXD1), len(second_bXDD)
        out = second_bXDD.new_zeros(taps0 + taps1 - 1, *second_bXDD.shape[1:])
        for a, first_XD1 in enumerate(first_aXD1):
            out[a : a + taps1].addcmul_(first_XD1, second_bXDD)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kXDD: Tensor) -> tuple[Tensor, Tensor]:
        first_aXD1, second_bXDD = ctx.saved_tensors
        grad_first, grad_second = torch.empty_like(first_aXD1), torch.zeros_like(second_bXDD)
        for a, first_XD1 in enumerate(first_aXD1):
            grad = grad_kXDD[a : a + len(second_bXDD)]
            grad_first[a] = (grad * second_bXDD).sum((0, -1)).unsqueeze(-1)
            grad_second.addcmul_(first_XD1, grad)
        return grad_first, grad_second


def merged_taps(first_aXD1: Tensor, second_bXDD: Tensor) -> Tensor:
    """Return the taps of a depthwise, then a full convolution: out[k] = sum over a + b = k of first[a] second[b].

    Args:
        first_aXD1: the factor of each of the D channels of head X, per tap.
        second_bXDD: the [in, out] matrix of each head, per tap.

    Returns:
        [taps of the first + taps of the second - 1, X, D, D].
    """
    return _MergedTaps.apply(first_aXD1, second_bXDD)
