"""Operations whose backward pass is written out, because autograd's makes more passes over memory.

Each is plain torch, equal to its formula up to rounding, and used on every device unless it says otherwise. Where a
gradient is the sum of slices, it is written in place instead of padding each slice with zeros and adding. In fp32 on a
CPU some of them run as one compiled pass over memory instead (fused.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_zaya.model import fused


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        if fused.fits(x, weight_H):
            out, inverse = fused.norm(x, weight_H, eps)
        else:
            mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
            inverse = mean_square.add_(eps).rsqrt_()
            out = (x * inverse).mul_(weight_H)
        ctx.save_for_backward(x, weight_H, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_H, inverse = ctx.saved_tensors
        if fused.fits(grad, x, weight_H):
            return *fused.norm_backward(grad, x, weight_H, inverse), None
        product = grad * x
        along = (product @ weight_H).unsqueeze(-1).mul_(inverse.square()).div_(x.shape[-1])
        grad_weight_H = inverse.flatten() @ product.flatten(0, -2)
        grad_x = torch.mul(grad, weight_H, out=product)
        return grad_x.addcmul_(x, along, value=-1).mul_(inverse), grad_weight_H, None


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, wide: bool = True) -> Tensor:
    """Root-mean-square norm of the last dimension, statistics and product in fp32 if ``wide``.

    That is what torch's own kernel does; it has none in fp32 on a CPU.
    """
    if wide and (x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64)):
        return F.rms_norm(x, weight_H.shape, weight_H, eps)
    return _RMSNorm.apply(x, weight_H, eps)


class _ScaledSum(Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, a_scale_H: Tensor, a_bias_H: Tensor, b: Tensor, b_scale_H: Tensor, b_bias_H: Tensor
    ) -> Tensor:
        ctx.save_for_backward(a, a_scale_H, a_bias_H, b, b_scale_H, b_bias_H)
        # The two biases are constants of the token: one vector, two fused multiply-adds over the stream.
        constant_H = torch.addcmul(a_bias_H * a_scale_H, b_bias_H, b_scale_H)
        if fused.fits(a, a_scale_H, b, b_scale_H):
            return fused.scaled_sum(a, a_scale_H, b, b_scale_H, constant_H)
        return torch.addcmul(constant_H, a, a_scale_H).addcmul_(b, b_scale_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        a, a_scale_H, a_bias_H, b, b_scale_H, b_bias_H = ctx.saved_tensors
        if fused.fits(grad, a, a_scale_H, b, b_scale_H):
            grad_a, grad_b, sums = fused.scaled_sum_backward(grad, a, a_scale_H, b, b_scale_H)
            sum_H, with_a_H, with_b_H = sums
        else:
            sum_H = grad.flatten(0, -2).sum(0)
            product = grad * a
            with_a_H = product.flatten(0, -2).sum(0)
            with_b_H = torch.mul(grad, b, out=product).flatten(0, -2).sum(0)
            grad_a, grad_b = torch.mul(grad, a_scale_H, out=product), grad * b_scale_H
        of_a = grad_a, with_a_H.addcmul_(sum_H, a_bias_H), sum_H * a_scale_H
        return *of_a, grad_b, with_b_H.addcmul_(sum_H, b_bias_H), sum_H * b_scale_H


def scaled_sum(
    a: Tensor, a_scale_H: Tensor, a_bias_H: Tensor, b: Tensor, b_scale_H: Tensor, b_bias_H: Tensor
) -> Tensor:
    """Return (a + a_bias) * a_scale + (b + b_bias) * b_scale; all have one dtype."""
    return _ScaledSum.apply(a, a_scale_H, a_bias_H, b, b_scale_H, b_bias_H)


class _WeightedSwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight_T1: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight_T1)
        if fused.fits(gate_up, weight_T1):
            return fused.swiglu(gate_up, weight_T1)
        gate_TF, up_TF = gate_up.chunk(2, dim=-1)
        return F.silu(gate_TF).mul_(up_TF).mul_(weight_T1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weight_T1 = ctx.saved_tensors
        if fused.fits(grad_TF, gate_up, weight_T1):
            return fused.swiglu_backward(grad_TF, gate_up, weight_T1)
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


class _RunProduct(Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_EOI: Tensor, runs: list[int]) -> Tensor:
        ctx.save_for_backward(x_TI, weight_EOI)
        ctx.runs = runs
        out = x_TI.new_empty(x_TI.shape[0], weight_EOI.shape[1])
        for x, weight, y in zip(x_TI.split(runs), weight_EOI.transpose(1, 2).unbind(), out.split(runs), strict=True):
            torch.mm(x, weight, out=y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TI, weight_EOI = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x_TI), torch.empty_like(weight_EOI)
        runs = ctx.runs
        inputs = (x_TI.split(runs), grad_TO.split(runs), grad_TO.t().split(runs, dim=1), weight_EOI.unbind())
        for x, grad, grad_OR, weight, gx, gw in zip(*inputs, grad_x.split(runs), grad_weight.unbind(), strict=True):
            torch.mm(grad, weight, out=gx)
            torch.mm(grad_OR, x, out=gw)
        return grad_x, grad_weight, None


def run_product(x_TI: Tensor, weight_EOI: Tensor, runs: list[int]) -> Tensor:
    """Multiply each run of rows (lengths sum to T) with its own matrix, one product after the other: [T, O]."""
    return _RunProduct.apply(x_TI, weight_EOI, runs)


def _take(x_TH: Tensor, order_T: Tensor, inverse_T: Tensor, count: int) -> Tensor:
    if fused.fits(x_TH):
        return fused.gather_rows(x_TH, order_T[:count], len(x_TH))
    return x_TH.index_select(0, order_T[:count])


def _spread(x_CH: Tensor, order_T: Tensor, inverse_T: Tensor, count: int) -> Tensor:
    if fused.fits(x_CH):
        return fused.gather_rows(x_CH, inverse_T, count)
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
