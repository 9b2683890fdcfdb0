"""The meta device as this rank's accelerator: shapes without memory, in a fake world of any size.

The dry run of the planner executes the real training code on torch's meta device, where a tensor is its shape and
dtype. Three things differ there from an accelerator and are bridged here, for the length of a block: meta has no fused
attention or norm of its own (the kernels that an accelerator would use are called by name), its random-number
generators do not exist, and torch's fake process group does not list it as a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from megatron.core.optimizer import clip_grads
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_zaya.compat import cpu
from megatron_zaya.model import experts

META = torch.device("meta")
KERNELS = ("accelerator", "cpu")
"""Whose kernels the meta device imitates. "cpu" exists to compare with real tensors on this machine."""


def _attention(kernels: str) -> Callable[..., Tensor]:
    """Return `F.scaled_dot_product_attention` as a fused kernel: the result, and one fp32 number a row for later."""
    aten = torch.ops.aten
    kernel: Any = aten._scaled_dot_product_flash_attention
    if kernels == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
    original = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if q.device != META:
            return original(q, k, v, mask, *args, **kwargs)
        return kernel(q, k, v, 0.0, bool(kwargs.get("is_causal")))[0]

    return attend


class _FusedRMSNorm(torch.autograd.Function):
    """What torch's fused kernel keeps: its input and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """Return `F.rms_norm` as the fused kernel that torch has for accelerators."""
    return _FusedRMSNorm.apply(x, weight)


def _l2_norm(chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool) -> Any:
    """Megatron-Core's own reads a number per tensor, inside a call that no mode sees."""
    return torch.stack([torch.norm(tensor) for tensor in tensor_lists[0]]).norm().view(1), None


def _generator(device: Any = "cpu") -> torch.Generator:
    return _TorchGenerator("cpu" if torch.device(device) == META else device)


_TorchGenerator = torch.Generator


@contextlib.contextmanager
def accelerator_on_meta(kernels: str = "accelerator") -> Iterator[torch.device]:
    """Let the meta device stand in for the accelerator during the block; yield it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.standing_in(META))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _attention(kernels)))
        stack.enter_context(patch.object(torch, "Generator", _generator))
        stack.enter_context(patch.object(clip_grads, "l2_norm_impl", _l2_norm))
        if kernels == "accelerator":
            stack.enter_context(patch.object(F, "rms_norm", _rms_norm))
        else:
            stack.enter_context(patch.object(experts, "runs_grouped", lambda *args: False))
        yield META


@contextlib.contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[ProcessGroup]:
    """Join a world of ``world_size`` ranks of which this process is ``rank`` and the only one that exists.

    Collectives return at once and leave their results undefined.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    capability = torch.distributed.Backend.backend_capability["fake"]
    if "meta" not in capability:
        capability.append("meta")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()
