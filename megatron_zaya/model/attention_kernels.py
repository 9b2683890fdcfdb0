"""Attention of one block with the logarithm of its softmax sum, forward and backward, by the best kernel there is.

torch's fused kernels for CPUs (all floating types) and accelerators (16-bit types); elsewhere the formula, some query
rows at a time. In the backward pass, output and logarithm may be those of a softmax over more keys than the block's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024


def _kernel_of(q: Tensor) -> str:
    if q.device.type in ("cpu", "meta"):
        return "cpu"
    return "flash" if q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 else "plain"


def block_forward(q_BQSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend; ``causal`` blocks are square, and row t sees the columns 0 .. t.

    Returns:
        Output [B, Q, S, D] and logarithm of the softmax sum [B, Q, S] in fp32 or wider.
    """
    kernel = _kernel_of(q_BQSD)
    if kernel == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BQSD, k_BKTD, v_BKTD, 0.0, causal)
    if kernel == "flash":
        out, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q_BQSD, k_BKTD, v_BKTD, 0.0, causal)
        return out, log_sum
    out = torch.empty_like(q_BQSD)
    log_sum = q_BQSD.new_empty(q_BQSD.shape[:3])
    for rows, logits_BKGST in _logits(q_BQSD, k_BKTD, causal):
        log_sum[:, :, rows] = logits_BKGST.logsumexp(-1).flatten(1, 2)
        out[:, :, rows] = (logits_BKGST.softmax(-1) @ v_BKTD.unsqueeze(2)).flatten(1, 2)
    return out, log_sum


def block_backward(
    grad_BQSD: Tensor,
    q_BQSD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    out_BQSD: Tensor,
    log_sum_BQS: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of one block."""
    kernel = _kernel_of(q_BQSD)
    tensors = (grad_BQSD, q_BQSD, k_BKTD, v_BKTD, out_BQSD, log_sum_BQS)
    if kernel == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, causal)
    if kernel == "flash":
        sizes = (None, None, q_BQSD.shape[2], k_BKTD.shape[2])
        # Random-number state for dropout, of which there is none.
        state = torch.zeros(2, dtype=torch.uint64, device=q_BQSD.device)
        unused = torch.zeros((), dtype=torch.uint64, device=q_BQSD.device)
        contiguous = (*tensors[:5], log_sum_BQS.contiguous())
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *contiguous, *sizes, 0.0, causal, state, unused
        )
    return _plain_backward(*tensors, causal)


def _logits(q_BQSD: Tensor, k_BKTD: Tensor, causal: bool) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows and their scaled logits [B, K, G, S, T], G query heads for each key head."""
    heads = k_BKTD.shape[1]
    for first in range(0, q_BQSD.shape[2], ROWS_AT_ONCE):
        rows = slice(first, min(first + ROWS_AT_ONCE, q_BQSD.shape[2]))
        q_BKGSD = q_BQSD[:, :, rows].unflatten(1, (heads, -1))
        logits = q_BKGSD @ k_BKTD.unsqueeze(2).transpose(-1, -2) / math.sqrt(q_BQSD.shape[-1])
        if causal:
            later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu_(1 + first)
            logits.masked_fill_(later, -math.inf)
        yield rows, logits


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups, scale = (k.shape[1], -1), 1 / math.sqrt(q.shape[-1])
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, logits_BKGST in _logits(q, k, causal):
        grad_rows, q_rows, out_rows = (x[:, :, rows].unflatten(1, groups) for x in (grad, q, out))
        prob = (logits_BKGST - log_sum[:, :, rows].unflatten(1, groups).unsqueeze(-1)).exp()
        grad_v += (prob.transpose(-1, -2) @ grad_rows).sum(2)
        grad_prob = grad_rows @ v.unsqueeze(2).transpose(-1, -2)
        grad_logits = prob * (grad_prob - (grad_rows * out_rows).sum(-1, keepdim=True)) * scale
        grad_q[:, :, rows] = (grad_logits @ k.unsqueeze(2)).flatten(1, 2)
        grad_k += (grad_logits.transpose(-1, -2) @ q_rows).sum(2)
    return grad_q, grad_k, grad_v
