"""Wider than bf16: the helpers of the fp32 islands (`run.fp32_islands` says which there are)."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp64 for fp64, fp32 for everything else."""
    return dtype if dtype == torch.float64 else torch.float32


def at_least_fp32(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or unchanged if it is wider."""
    return x.to(wide_dtype(x.dtype))
