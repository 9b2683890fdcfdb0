"""Operations whose backward pass is written out, because autograd's makes more passes over memory.

Each is plain torch, equal to its formula up to rounding, and used on every device unless it says otherwise. Where a
gradient is the sum of slices, it is written in place instead of padding each slice with zeros and adding.
"""

from __future__ import annotations

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
        normed_TH = x_TH * inverse_T1
        product_TH = grad_TH * normed_TH
        along_T1 = (product_TH @ weight_H).div_(x_TH.shape[-1]).unsqueeze(-1)
        grad_x = (grad_TH * weight_H).addcmul_(normed_TH, along_T1, value=-1).mul_(inverse_T1)
        return grad_x, product_TH.sum(0), None


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of the last dimension; torch's own kernel where it has one (not in fp32 on a CPU)."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
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
        grad_a = grad * a_scale_H, a_scale_grad_H, sum_H * a_scale_H
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
        grad_weight_T1 = (grad_up_TF * up_TF).sum(-1, keepdim=True)
        torch.ops.aten.silu_backward(grad_TF * up_TF, gate_TF, grad_input=grad_gate_TF)
        return grad_gate_up.mul_(weight_T1), grad_weight_T1


def weighted_swiglu(gate_up: Tensor, weight_T1: Tensor) -> Tensor:
    """Return weight * silu(gate) * up, [T, F], of the [T, 2F] rows [gate | up]."""
    return _WeightedSwiGLU.apply(gate_up, weight_T1)


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = cos.shape[-1]
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
        out[..., 2 * half :] = rest
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: turn the pairs (i, i + W/2) of the first W = 2 * cos.shape[-1] of the last dimension.

    ``cos`` and ``sin`` broadcast against ``x``; the other components pass.
    """
    return _Rotation.apply(x, cos, sin)


class _CausalTaps(Function):
    @staticmethod
    def forward(ctx: Any, x_XRD: Tensor, weight_kXDD: Tensor, bias_X1D: Tensor, step: int) -> Tensor:
        ctx.save_for_backward(x_XRD, weight_kXDD)
        ctx.step = step
        rows = x_XRD.shape[1] - (len(weight_kXDD) - 1) * step
        out = torch.baddbmm(bias_X1D, x_XRD[:, :rows], weight_kXDD[0])
        for tap, weight_XDD in enumerate(weight_kXDD[1:], start=1):
            out.baddbmm_(x_XRD[:, tap * step : tap * step + rows], weight_XDD)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_XRD, weight_kXDD = ctx.saved_tensors
        rows, step = grad_XTD.shape[1], ctx.step
        grad_x, grad_weight = torch.zeros_like(x_XRD), torch.empty_like(weight_kXDD)
        for tap, weight_XDD in enumerate(weight_kXDD):
            window = slice(tap * step, tap * step + rows)
            grad_x[:, window].baddbmm_(grad_XTD, weight_XDD.transpose(1, 2))
            torch.bmm(x_XRD[:, window].transpose(1, 2), grad_XTD, out=grad_weight[tap])
        return grad_x, grad_weight, grad_XTD.sum(1, keepdim=True), None


def causal_taps(x_XRD: Tensor, weight_kXDD: Tensor, bias_X1D: Tensor, step: int) -> Tensor:
    """Return out[t] = bias + sum over taps j of x[t + j * step] weight[j], one matrix product per head X and tap.

    The R rows of ``x_XRD`` are ``(taps - 1) * step`` more than those of the result [X, T, D].
    """
    return _CausalTaps.apply(x_XRD, weight_kXDD, bias_X1D, step)


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


class _RowPermutation(Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order_T: Tensor, inverse_T: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_T)
        return x_TH.index_select(0, order_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None]:
        inverse_T = ctx.saved_tensors[0]
        return grad_TH.index_select(0, inverse_T), None, None


def permute_rows(x_TH: Tensor, order_T: Tensor, inverse_T: Tensor) -> Tensor:
    """Return ``x_TH[order_T]`` for a permutation and its inverse: backward is a gather too, not a scatter-add."""
    return _RowPermutation.apply(x_TH, order_T, inverse_T)


class _ScaleToLength(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, length_X1: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        smallest = torch.finfo(x.dtype).eps
        inverse = norm.clamp_min(smallest).reciprocal_()
        ctx.save_for_backward(x, length_X1, inverse, norm > smallest)
        return x * (inverse * length_X1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, length_X1, inverse, unclamped = ctx.saved_tensors
        along = (grad * x).sum(-1, keepdim=True).mul_(inverse)
        scale = inverse * length_X1
        grad_x = (grad * scale).addcmul_(x, along * scale * inverse * unclamped, value=-1)
        return grad_x, along.flatten(0, -3).sum(0)


def scale_to_length(x: Tensor, length_X1: Tensor) -> Tensor:
    """Return length * x / |x| over the last dimension of [..., X, D]; a norm below the dtype's epsilon counts as it."""
    return _ScaleToLength.apply(x, length_X1)
