"""The table applied to whole state dicts of torch tensors: for tests, benchmarks and small models."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_zaya.config.sections import ModelConfig
from megatron_zaya.convert.hf import HF
from megatron_zaya.convert.table import Layout
from megatron_zaya.convert.table import Tensor as Named


def _move(
    state: Mapping[str, torch.Tensor], sources: tuple[Named, ...], targets: tuple[Named, ...]
) -> dict[str, torch.Tensor]:
    flat = [state[source.name].reshape(-1) for source in sources]
    joined = torch.cat(flat) if len(flat) > 1 else flat[0]
    pieces = joined.split([target.numel for target in targets])
    return {target.name: piece.view(target.shape) for target, piece in zip(targets, pieces, strict=True)}


def from_hf(state: Mapping[str, torch.Tensor], config: ModelConfig, layout: Layout = HF) -> dict[str, torch.Tensor]:
    """Return our global state of another program's state dict (tensors share memory where they can).

    Raises:
        KeyError: a tensor that the configuration asks for is missing.
    """
    return {n: t for pair in layout.pairs(config) for n, t in _move(state, pair.theirs, pair.ours).items()}


def to_hf(state: Mapping[str, torch.Tensor], config: ModelConfig, layout: Layout = HF) -> dict[str, torch.Tensor]:
    """Return another program's state dict of our global state; a tied head is not repeated."""
    return {n: t for pair in layout.pairs(config) for n, t in _move(state, pair.ours, pair.theirs).items()}
