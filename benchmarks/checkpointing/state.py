"""The state of a rank: that of data parallelism with a sharded optimizer, and thousands of small tensors beside."""

from __future__ import annotations

from pathlib import Path

import torch

BIG_SHAPE, SMALL, SMALL_NUMEL = (1024, 1536), 2000, 512

State = dict[str, tuple[torch.Tensor, int | None]]
"""Name -> (tensor of this rank, dimension along which ranks split it, None for replicas)."""


class World:
    """What every method needs to know about this rank."""

    def __init__(self, rank: int, ranks: int, folder: Path) -> None:
        self.rank, self.ranks, self.folder = rank, ranks, folder


def count_big(ranks: int, gigabytes: float) -> int:
    """Return how many large weights a rank's state of ``gigabytes`` has, with their moments."""
    return max(1, round(gigabytes * 1e9 / (BIG_SHAPE[0] * BIG_SHAPE[1] * (2 + 12 / ranks))))


def make_state(ranks: int, big: int) -> State:
    """Return a rank's state with ``big`` large weights; replicas are equal on all ranks."""
    numel = BIG_SHAPE[0] * BIG_SHAPE[1]
    noise = torch.randn(numel + 1000, generator=torch.Generator().manual_seed(1))

    def tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        first = len(state) % 1000
        return noise[first : first + torch.Size(shape).numel()].to(dtype, copy=True).view(shape)

    state: State = {}
    for i in range(big):
        state[f"weight.{i}"] = (tensor(BIG_SHAPE, torch.bfloat16), None)
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            state[f"{kind}.{i}"] = (tensor((BIG_SHAPE[0] // ranks, BIG_SHAPE[1])), 0)
    for i in range(SMALL):
        state[f"small.{i}"] = (tensor((SMALL_NUMEL // ranks,)), 0)
        state[f"norm.{i}"] = (tensor((SMALL_NUMEL,)), None)
    return state


def change(state: State) -> None:
    """Change every tensor, as a training step does."""
    for tensor, _ in state.values():
        tensor.add_(1.0)


def whole_shape(tensor: torch.Tensor, split: int | None, ranks: int) -> tuple[int, ...]:
    """Return the shape of the global tensor."""
    return tuple(n * ranks if axis == split else n for axis, n in enumerate(tensor.shape))


def sizes(state: State, ranks: int) -> tuple[int, int]:
    """Return bytes of this rank's tensors, and bytes of the global tensors, each once."""
    held = {key: tensor.numel() * tensor.element_size() for key, (tensor, _) in state.items()}
    return sum(held.values()), sum(n * (1 if state[key][1] is None else ranks) for key, n in held.items())
