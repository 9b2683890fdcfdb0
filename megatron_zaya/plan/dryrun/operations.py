"""Floating-point operations of one torch operation: matrix products and attention, two per multiply-add."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _product(a: Tensor, b: Tensor) -> int:
    """[.., M, K] x [.., K, N]."""
    return 2 * prod(a.shape) * b.shape[-1]


def _attention(q: Tensor, k: Tensor, is_causal: tuple, products: float) -> int:
    """``products`` matrix products of [S, D] x [D, T] or [S, T] x [T, D] per head; a causal mask halves them.

    ``is_causal`` is empty where the argument was left at its default, False.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691), section 4.1: backward is 2.5 times forward.
    """
    batch, heads, rows, width = q.shape
    return int(products * 2 * batch * heads * rows * k.shape[2] * width * (0.5 if is_causal and is_causal[0] else 1.0))


def operation_flops(function: Any, args: tuple, result: Any) -> int:
    """Return the operations that ``function(*args)`` does on an accelerator's matrix units, 0 for anything else."""
    if function in (aten.mm.default, aten.bmm.default, aten.mm.out, aten.bmm.out):
        return _product(args[0], args[1])
    if function in (aten.addmm.default, aten.baddbmm.default, aten.baddbmm_.default):
        return _product(args[1], args[2])
    if function is aten._grouped_mm.default:
        a, b = args[0], args[1]
        return 2 * prod(a.shape) * b.shape[-1]
    if function in (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ):
        return _attention(args[0], args[1], args[4:5], products=2)
    if function is aten._scaled_dot_product_flash_attention_backward.default:
        return _attention(args[1], args[2], args[11:12], products=5)
    if function is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return _attention(args[1], args[2], args[7:8], products=5)
    return 0
