"""Cross-entropy of the head without the memory of its logits: exact, vocab-parallel, for any vocabulary size.

    loss_t = log sum_v exp(x_t . w_v) - x_t . w_label

The head's weight is taken in blocks of rows (V vocabulary entries in blocks of W). The forward pass keeps a running
maximum and sum per token, so a block's fp32 logits [T, W] are all that exists at a time. The backward pass computes the
blocks again from the saved log-sum: each gives its own rows of the weight's gradient, in one product over all tokens,
and adds to the gradient of x. Where all logits fit into the allowed memory there is one block, and it is kept instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_zaya.model.precision import at_least_fp32, wide_dtype


def _blocks(weight_VH: Tensor, label_T: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor, slice]]:
    """Yield (rows of the weight, index of each token's label in them, whether it is there, which rows)."""
    for start in range(0, len(weight_VH), width):
        block_WH = weight_VH[start : start + width]
        index_T = label_T - start
        inside_T = (index_T >= 0) & (index_T < len(block_WH))
        yield block_WH, index_T.clamp(0, len(block_WH) - 1), inside_T, slice(start, start + len(block_WH))


class _HeadLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_VH: Tensor,
        label_T: Tensor,
        width: int,
        tp_group: ProcessGroup,
        dtype: torch.dtype,
    ) -> Tensor:
        label_T = label_T - tp_group.rank() * len(weight_VH)
        top_T = x_TH.new_full((len(x_TH),), -torch.inf, dtype=dtype)
        total_T, wanted_T = torch.zeros_like(top_T), torch.zeros_like(top_T)
        for block_WH, index_T, inside_T, _ in _blocks(weight_VH, label_T, width):
            logits_TW = (x_TH @ block_WH.T).to(dtype)
            higher_T = torch.maximum(top_T, logits_TW.amax(dim=1))
            wanted_T = torch.where(inside_T, logits_TW.gather(1, index_T[:, None]).squeeze(1), wanted_T)
            exp_TW = logits_TW.sub_(higher_T[:, None]).exp_()
            total_T = total_T * (top_T - higher_T).exp_() + exp_TW.sum(dim=1)
            top_T = higher_T
        block_top_T = top_T
        if tp_group.size() > 1:
            top_T = top_T.clone()
            torch.distributed.all_reduce(top_T, op=torch.distributed.ReduceOp.MAX, group=tp_group)
            sums = torch.stack([total_T * (block_top_T - top_T).exp_(), wanted_T])
            torch.distributed.all_reduce(sums, group=tp_group)
            total_T, wanted_T = sums
        log_sum_T = top_T + total_T.log()
        kept = (exp_TW, block_top_T) if width >= len(weight_VH) else ()
        ctx.save_for_backward(x_TH, weight_VH, label_T, log_sum_T, *kept)
        ctx.width, ctx.dtype = width, dtype
        return log_sum_T - wanted_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x_TH, weight_VH, label_T, log_sum_T, *kept = ctx.saved_tensors
        grad_x_TH = torch.zeros_like(x_TH, dtype=wide_dtype(x_TH.dtype))
        grad_weight_VH = torch.empty_like(weight_VH)
        for block_WH, index_T, inside_T, rows in _blocks(weight_VH, label_T, ctx.width):
            if kept:
                exp_TW, block_top_T = kept
                grad_TW = exp_TW.mul_(((block_top_T - log_sum_T).exp_() * grad_T)[:, None])
            else:
                grad_TW = (x_TH @ block_WH.T).to(ctx.dtype).sub_(log_sum_T[:, None]).exp_().mul_(grad_T[:, None])
            grad_TW.scatter_add_(1, index_T[:, None], torch.where(inside_T, -grad_T, 0.0)[:, None])
            grad_TW = grad_TW.to(x_TH.dtype)
            grad_x_TH += grad_TW @ block_WH
            torch.mm(grad_TW.T, x_TH, out=grad_weight_VH[rows])
        return grad_x_TH.to(x_TH.dtype), grad_weight_VH, None, None, None, None


def head_loss(
    x_SBH: Tensor,
    weight_VH: Tensor,
    label_SB: Tensor,
    workspace_bytes: int,
    tp_group: ProcessGroup,
    sequence_parallel: bool = False,
    wide: bool = True,
) -> Tensor:
    """Return the cross-entropy of each token [S, B], fp32 (fp64 for fp64 inputs), equal on all ranks of ``tp_group``.

    Args:
        x_SBH: input of the head; this rank's part of the sequence under sequence parallelism.
        weight_VH: this rank's rows of the head's weight; rank r holds the vocabulary from r * V on.
        label_SB: int64, the whole sequence of the tensor-parallel group.
        workspace_bytes: how much wide logits may take at a time; at least one vocabulary entry for all tokens is taken.
        tp_group: tensor-parallel ranks.
        sequence_parallel: ``x_SBH`` is split over ``tp_group``.
        wide: logits are widened to fp32 before the softmax; False keeps the dtype of ``x_SBH``.
    """
    if sequence_parallel:
        x_SBH = gather_from_sequence_parallel_region(x_SBH, group=tp_group)
    elif tp_group.size() > 1:
        x_SBH = copy_to_tensor_model_parallel_region(x_SBH, group=tp_group)
    tokens = label_SB.numel()
    dtype = wide_dtype(x_SBH.dtype) if wide else x_SBH.dtype
    width = min(max(1, workspace_bytes // (dtype.itemsize * tokens)), len(weight_VH))
    x_TH = x_SBH.reshape(tokens, -1)
    loss_T = _HeadLoss.apply(x_TH, weight_VH, label_SB.reshape(-1), width, tp_group, dtype)
    return at_least_fp32(loss_T).view(label_SB.shape)
