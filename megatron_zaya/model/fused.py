"""Operations of the layers in one pass over memory each, in fp32 on a CPU: fused.c, where a compiler was at hand.

derivatives.py and attention_derivatives.py ask :func:`fits` and otherwise do the same in plain torch (docs/adr/0123).
All tensors are fp32 on the CPU and are made contiguous first; T rows of H, F or D columns. Sums over rows are taken in
blocks of rows, so results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 128
"""Rows whose sum comes back as one part: the constant of fused.c."""

_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _HeadShape(ctypes.Structure):
    """``shape`` in fused.c."""

    _fields_ = [(name, _COUNT) for name in ("queries", "keys", "width", "half", "repeat", "plain_stride", "tokens")]


_SIGNATURES = {
    "zaya_norm": [_POINTER, _POINTER, _FLOAT, _POINTER, _POINTER, _COUNT, _COUNT],
    "zaya_norm_backward": [_POINTER] * 6 + [_COUNT] * 2,
    "zaya_scaled_sum": [_POINTER] * 6 + [_COUNT] * 2,
    "zaya_scaled_sum_backward": [_POINTER] * 8 + [_COUNT] * 2,
    "zaya_swiglu": [_POINTER] * 3 + [_COUNT] * 2,
    "zaya_swiglu_backward": [_POINTER] * 5 + [_COUNT] * 2,
    "zaya_gather_rows": [_POINTER, _POINTER, _COUNT, _POINTER, _COUNT, _COUNT],
    "zaya_heads": [ctypes.POINTER(_HeadShape)] + [_POINTER] * 8,
    "zaya_heads_backward": [ctypes.POINTER(_HeadShape)] + [_POINTER] * 9,
    "zaya_merge": [_POINTER] * 6 + [_COUNT] * 5,
    "zaya_merge_backward": [_POINTER] * 8 + [_COUNT] * 5,
}


def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("megatron_zaya.model._fused")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError:  # torch's threads are not those of an OpenMP library that this one can use
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


LIBRARY = _library()
"""None where no compiler was at hand when the package was installed, or where torch has no OpenMP threads."""


def fits(*tensors: Tensor) -> bool:
    """Return whether fused.c can work on these: real tensors (none of a dry run's) in fp32 on a CPU."""
    return LIBRARY is not None and all(
        x.dtype == torch.float32 and x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) for x in tensors
    )


def _call(name: str, *arguments: Tensor | float | ctypes.Structure) -> None:
    assert LIBRARY is not None, "ask fits() first"
    getattr(LIBRARY, name)(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))


def _parts(rows: int, like: Tensor, *shape: int) -> Tensor:
    """Return room for what each block of ``rows`` rows gives."""
    return like.new_empty(-(-rows // BLOCK), *shape)


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def norm(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) * weight [..., H], and 1 / rms(x) [..., 1]."""
    x = x.contiguous()
    out, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    _call("zaya_norm", x, weight_H.contiguous(), eps, out, inverse, *_rows(x))
    return out, inverse


def norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    grad, x, (rows, width) = grad.contiguous(), x.contiguous(), _rows(x)
    grad_x, grad_weight = torch.empty_like(x), _parts(rows, x, width)
    _call("zaya_norm_backward", grad, x, weight_H.contiguous(), inverse, grad_x, grad_weight, rows, width)
    return grad_x, grad_weight.sum(0)


def scaled_sum(a: Tensor, a_scale_H: Tensor, b: Tensor, b_scale_H: Tensor, constant_H: Tensor) -> Tensor:
    """Return constant + a * a_scale + b * b_scale [..., H]."""
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a)
    _call("zaya_scaled_sum", a, a_scale_H.contiguous(), b, b_scale_H.contiguous(), constant_H, out, *_rows(a))
    return out


def scaled_sum_backward(
    grad: Tensor, a: Tensor, a_scale_H: Tensor, b: Tensor, b_scale_H: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a and b, and the sums [3, H] over all rows of grad, grad * a and grad * b."""
    grad, a, b, (rows, width) = grad.contiguous(), a.contiguous(), b.contiguous(), _rows(a)
    grad_a, grad_b, sums = torch.empty_like(a), torch.empty_like(b), _parts(rows, a, 3, width)
    tensors = (grad, a, a_scale_H.contiguous(), b, b_scale_H.contiguous(), grad_a, grad_b, sums)
    _call("zaya_scaled_sum_backward", *tensors, rows, width)
    return grad_a, grad_b, sums.sum(0)


def swiglu(gate_up: Tensor, weight_T1: Tensor) -> Tensor:
    """Return weight * silu(gate) * up [T, F] of the rows [gate | up]."""
    gate_up = gate_up.contiguous()
    out_TF = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _call("zaya_swiglu", gate_up, weight_T1.contiguous(), out_TF, *out_TF.shape)
    return out_TF


def swiglu_backward(grad_TF: Tensor, gate_up: Tensor, weight_T1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of [gate | up] and weight."""
    grad_TF, gate_up = grad_TF.contiguous(), gate_up.contiguous()
    grad_gate_up, grad_weight_T1 = torch.empty_like(gate_up), gate_up.new_empty(weight_T1.shape)
    tensors = (grad_TF, gate_up, weight_T1.contiguous(), grad_gate_up, grad_weight_T1)
    _call("zaya_swiglu_backward", *tensors, *grad_TF.shape)
    return grad_gate_up, grad_weight_T1


def gather_rows(x_CH: Tensor, index_T: Tensor, limit: int) -> Tensor:
    """Return row ``index_T[t]`` of ``x_CH`` for each t, and zeros where the index is not below ``limit``."""
    x_CH, index_T = x_CH.contiguous(), index_T.contiguous()
    out_TH = x_CH.new_empty(len(index_T), x_CH.shape[1])
    _call("zaya_gather_rows", x_CH, index_T, limit, out_TH, *out_TH.shape)
    return out_TH


def _head_shape(heads: Tensor, stride: int, cos_Rh: Tensor, query_heads: int) -> _HeadShape:
    tokens, count, width = heads.shape
    return _HeadShape(query_heads, count - query_heads, width, cos_Rh.shape[1], tokens // len(cos_Rh), stride, tokens)


def heads(
    convolved_XTD: Tensor, plain_TXD: Tensor, length_X1: Tensor, cos_Rh: Tensor, sin_Rh: Tensor, query_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated(length * s / |s|) of s = convolved + mean coupling of the plain heads, s, and 1 / |s| [T, X].

    Args:
        convolved_XTD: contiguous.
        plain_TXD: query heads, then key heads; heads are contiguous, tokens may have a stride.
        length_X1: of each head.
        cos_Rh: cosines of the angles of h pairs of components, a row for each T / R tokens; contiguous.
        sin_Rh: their sines.
        query_heads: how many of the X heads are queries.
    """
    out_TXD, sum_TXD = (plain_TXD.new_empty(plain_TXD.shape) for _ in range(2))
    inverse_TX = plain_TXD.new_empty(plain_TXD.shape[:2])
    shape = _head_shape(plain_TXD, plain_TXD.stride(0), cos_Rh, query_heads)
    tensors = (convolved_XTD, plain_TXD, length_X1.contiguous(), cos_Rh, sin_Rh, out_TXD, sum_TXD, inverse_TX)
    _call("zaya_heads", shape, *tensors)
    return out_TXD, sum_TXD, inverse_TX


def heads_backward(
    grad_TXD: Tensor,
    sum_TXD: Tensor,
    inverse_TX: Tensor,
    length_X1: Tensor,
    cos_Rh: Tensor,
    sin_Rh: Tensor,
    query_heads: int,
    grad_plain_TXD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the plain heads; return those of the convolved heads [X, T, D] and of the lengths."""
    tokens, count, width = sum_TXD.shape
    grad_convolved_XTD = sum_TXD.new_empty(count, tokens, width)
    grad_length = _parts(tokens, sum_TXD, *length_X1.shape)
    shape = _head_shape(sum_TXD, grad_plain_TXD.stride(0), cos_Rh, query_heads)
    tensors = (grad_TXD.contiguous(), sum_TXD, inverse_TX, length_X1.contiguous(), cos_Rh, sin_Rh)
    _call("zaya_heads_backward", shape, *tensors, grad_convolved_XTD, grad_plain_TXD, grad_length)
    return grad_convolved_XTD, grad_length.sum(0)


def _streams(weights: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], slice, tuple[int, ...]]]:
    """Yield the four weights of q and of k, which heads theirs are, and the sizes zaya_merge wants."""
    every = sum(len(weights[start + 1]) // weights[start + 2].shape[1] for start in (0, 4))
    first = 0
    for start in (0, 4):
        depthwise, bias, grouped, grouped_bias = (w.contiguous() for w in weights[start : start + 4])
        channels, width, taps1 = grouped.shape
        heads = channels // width
        sizes = (heads, width, depthwise.shape[2], taps1, every * width * width)
        yield [depthwise, bias, grouped, grouped_bias], slice(first, first + heads), sizes
        first += heads


def merged_convolution(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return weight [taps, X, in, out] and bias [X, 1, D]; see attention_derivatives.py for the weights."""
    streams = list(_streams(weights))
    (_, width, taps0, taps1, _), every = streams[0][2], streams[1][1].stop
    weight_kXDD = weights[0].new_empty(taps0 + taps1 - 1, every, width, width)
    bias_X1D = weights[0].new_empty(every, 1, width)
    for tensors, heads, sizes in streams:
        _call("zaya_merge", *tensors, weight_kXDD[:, heads], bias_X1D[heads], *sizes)
    return weight_kXDD, bias_X1D


def merged_convolution_backward(grad_kXDD: Tensor, grad_X1D: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of the weights."""
    grad_kXDD, grad_X1D = grad_kXDD.contiguous(), grad_X1D.contiguous()
    grads: list[Tensor] = []
    for (*tensors, _), heads, sizes in _streams(weights):
        new = [torch.empty_like(x) for x in tensors]
        _call("zaya_merge_backward", grad_kXDD[:, heads], grad_X1D[heads], *tensors, *new, *sizes)
        grads += [*new, grad_X1D[heads].flatten()]
    return tuple(grads)
