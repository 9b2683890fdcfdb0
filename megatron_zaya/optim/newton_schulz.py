"""Newton-Schulz iteration: a matrix towards the orthogonal matrix nearest to its direction (Muon's update).

Five steps of  X <- a X + b (X X^T) X + c (X X^T)^2 X  on X = G / |G|  drive every singular value into about
[0.7, 1.2] (Jordan et al. 2024; the coefficients maximise the slope at zero). The Gram matrix is that of the short side.
"""

from __future__ import annotations

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
EPS = 1e-7


def newton_schulz(x_MN: Tensor, out_MN: Tensor, gram_KK: Tensor, poly_KK: Tensor, steps: int) -> Tensor:
    """Orthogonalise without allocating.

    Args:
        x_MN: the matrix, in the type to compute in; destroyed.
        out_MN: receives the result.
        gram_KK, poly_KK: working space with K = min(M, N).
        steps: iterations, at least 1.

    Returns:
        ``out_MN``.
    """
    norm = torch.linalg.vector_norm(x_MN, dtype=torch.float32).clamp_min(EPS)
    # The two buffers alternate; start so that the last step writes into `out_MN`.
    source, target = (x_MN, out_MN) if steps % 2 else (out_MN, x_MN)
    torch.div(x_MN, norm.to(x_MN.dtype), out=source)
    wide = x_MN.shape[0] <= x_MN.shape[1]
    for _ in range(steps):
        torch.mm(source if wide else source.T, source.T if wide else source, out=gram_KK)
        torch.addmm(gram_KK, gram_KK, gram_KK, beta=B, alpha=C, out=poly_KK)
        left, right = (poly_KK, source) if wide else (source, poly_KK)
        torch.addmm(source, left, right, beta=A, out=target)
        source, target = target, source
    return source


def orthogonalize(matrix_MN: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the Newton-Schulz result for one matrix, computed and returned in ``dtype``; the input stays."""
    x_MN = matrix_MN.to(dtype, copy=True)
    gram_KK = x_MN.new_empty(2, min(x_MN.shape), min(x_MN.shape))
    return newton_schulz(x_MN, torch.empty_like(x_MN), gram_KK[0], gram_KK[1], steps)


def update_scale(rows: int, cols: int) -> float:
    """Return the factor that gives an orthogonal update the root mean square of AdamW's (Liu et al. 2025, 0.2)."""
    return 0.2 * max(rows, cols) ** 0.5
