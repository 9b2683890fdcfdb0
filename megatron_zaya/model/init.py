"""Initial values of every parameter: one table, the same global model for every parallel layout.

Each tensor is drawn whole from a generator seeded by (run seed, global name, expert), and each rank keeps its part.
The first matching line of the table counts. Sources: Megatron-Core's scaled normal initialisation for the products
that write into the residual stream; torch's Conv1d default for the convolutions, so that the convolved and the mean
path start with equal weight (Zyphra's own training initialisation is not published; see docs/adr/0003).
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_zaya.model.sharding import is_expert, shard_groups
from megatron_zaya.model.transformer_config import ZayaTransformerConfig

Fill = Callable[[Tensor, torch.Generator], Tensor]


def _constant(value: float) -> Fill:
    return lambda tensor, generator: tensor.fill_(value)


def _normal(std: float) -> Fill:
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def _fan_in_uniform(tensor: Tensor, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(tensor[0].numel())
    return tensor.uniform_(-bound, bound, generator=generator)


def initialisation_table(config: ZayaTransformerConfig) -> list[tuple[str, Fill]]:
    """Return (name pattern, rule) lines; the first match counts."""
    std = config.init_method_std
    into_residual = std / math.sqrt(2 * config.num_layers)
    router = 1 / math.sqrt(config.router_hidden_size)
    return [
        ("*norm.weight", _constant(1.0)),
        ("*_scale", _constant(1.0)),
        ("input_scaling.scale", _constant(1.0)),
        ("*bias", _constant(0.0)),
        ("*.temperature", _constant(config.attention_temperature_init)),
        ("*.depthwise_weight", _fan_in_uniform),
        ("*.grouped_weight", _fan_in_uniform),
        ("*.linear_proj.weight", _normal(into_residual)),
        ("*.linear_fc2", _normal(into_residual)),
        # Two GELU layers on a normed state: a fan-in scale keeps the signal alive up to the logits ...
        ("*.router.linear_[12].weight", _normal(router)),
        # ... which start small, so that the first assignments are near uniform.
        ("*.router.linear_out.weight", _normal(std)),
        ("*", _normal(std)),
    ]


def _generator(device: torch.device, seed: int, name: str, expert: int | None) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{expert}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def _draw_local(parameter: Tensor, groups: dict, name: str, fill: Fill, seed: int, expert: int | None) -> Tensor:
    """Draw the whole tensor in fp32 and return this rank's part."""
    shape = [size * (groups[axis].size() if axis in groups else 1) for axis, size in enumerate(parameter.shape)]
    whole = fill(torch.empty(shape, device=parameter.device), _generator(parameter.device, seed, name, expert))
    for axis, group in groups.items():
        whole = whole.narrow(axis, group.rank() * parameter.shape[axis], parameter.shape[axis])
    return whole


@torch.no_grad()
def initialise(model: nn.Module, config: ZayaTransformerConfig, seed: int) -> None:
    """Fill every parameter of ``model`` (a ZayaModel stage) in place.

    Args:
        model: has ``named_global_parameters()``.
        config: its transformer configuration.
        seed: the run's seed.
    """
    table = initialisation_table(config)
    for name, parameter in model.named_global_parameters():
        fill = next(rule for pattern, rule in table if fnmatch.fnmatchcase(name, pattern))
        groups = shard_groups(parameter)
        if is_expert(parameter):
            first = groups[0].rank() * parameter.shape[0]
            within = {axis - 1: group for axis, group in groups.items() if axis > 0}
            for index, matrix in enumerate(parameter):
                matrix.copy_(_draw_local(matrix, within, name, fill, seed, first + index))
        else:
            parameter.copy_(_draw_local(parameter, groups, name, fill, seed, None))
