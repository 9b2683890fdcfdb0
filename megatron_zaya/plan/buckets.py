"""Buckets of gradients and parameters: which tensors share one, where each starts, and the padding between them.

Tensors are laid down from the last made to the first. A bucket is closed when it is full; only the first virtual stage
of the first pipeline rank has more than one. Sources: Megatron-Core, `DistributedDataParallel` and
`_ParamAndGradBuffer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import inf, lcm
from typing import NamedTuple

from megatron_zaya.plan.shape import Layout, ModelShape
from megatron_zaya.plan.tensors import Tensor, chunk_tensors

ALIGNED = 64
"""Elements to a multiple of which a tensor's start is moved under ZeRO-1."""
ALIGNED_BUCKET = 128
"""The same for the end of a bucket, which the ranks divide too."""


class Bucket(NamedTuple):
    """One contiguous range of the gradients, and of the parameters."""

    numel: int
    """Elements, padding included."""
    places: tuple[tuple[Tensor, int], ...]
    """Each tensor and its first element."""


def bucket_elements(layout: Layout) -> int:
    """Return the elements after which a bucket is closed."""
    return layout.bucket_elements or max(40_000_000, 1_000_000 * layout.dp)


def fill(tensors: Iterable[Tensor], limit: float, multiple: int | None) -> list[Bucket]:
    """Lay tensors (in the order in which they were made) into buckets of about ``limit`` elements.

    Args:
        tensors: all of one buffer: dense or experts, of one virtual stage.
        limit: elements after which a bucket is closed.
        multiple: what ZeRO-1 pads a bucket to; None without it, when nothing is padded.
    """
    step, end_step = (ALIGNED, multiple) if multiple else (1, 1)
    buckets: list[Bucket] = []
    places: list[tuple[Tensor, int]] = []
    end = 0

    def close() -> None:
        nonlocal places, end
        buckets.append(Bucket(-(-end // end_step) * end_step, tuple(places)))
        places, end = [], 0

    for tensor in reversed(list(tensors)):
        start = -(-end // step) * step
        alone = tensor.is_tied and multiple is not None
        if alone and places:
            close()
            start = 0
        places.append((tensor, start))
        end = start + tensor.numel
        if end >= limit or alone:
            close()
    if places:
        close()
    return buckets


def rank_buckets(m: ModelShape, layout: Layout, pp_rank: int, is_expert: bool) -> tuple[Bucket, ...]:
    """Return all buckets of the dense or of the expert parameters of a pipeline rank, one virtual stage after another.

    Raises:
        ValueError: the model is no ZAYA.
    """
    split = Layout(  # what decides the tensors
        tp=1 if is_expert else layout.tp, ep=layout.ep if is_expert else 1, etp=layout.etp if is_expert else 1,
        pp=layout.pp, vp=layout.vp, stage_layers=layout.stage_layers,
    )  # fmt: skip
    limit = bucket_elements(layout) if layout.overlap_grad_reduce else inf
    ranks = layout.edp if is_expert else layout.dp * layout.cp
    multiple = lcm(ranks, ALIGNED_BUCKET) if layout.use_distributed_optimizer else None
    return _rank_buckets(m, split, pp_rank, is_expert, limit, multiple)


@lru_cache(maxsize=4096)
def _rank_buckets(
    m: ModelShape, split: Layout, pp_rank: int, is_expert: bool, limit: float, multiple: int | None
) -> tuple[Bucket, ...]:
    found: list[Bucket] = []
    for stage in range(pp_rank, split.stages, split.pp):
        tensors = [tensor for tensor in chunk_tensors(m, split, stage) if tensor.is_expert == is_expert]
        found += fill(tensors, limit if stage == 0 else inf, multiple)
    return tuple(found)
