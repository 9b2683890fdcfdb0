"""How a table of names is written and read: one line maps tensors of ours to tensors of another program. Torch-free.

    _line("layers.{l}.self_attention.linear_v [K, H]",
          "model.layers.{l}.v_current.weight [K/2, H]", "model.layers.{l}.v_delayed.weight [K/2, H]")

Invariant: the elements of our tensors, one tensor after the other in row-major order, are those of theirs. So a
conversion moves runs of bytes and computes nothing, and the same line serves both directions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ckpt.manifest import TensorInfo
from megatron_zaya.config.sections import ModelConfig

_ENTRY = re.compile(r"^(\S+) \[(.*)\]$")


@dataclass(frozen=True)
class Tensor:
    """A tensor of either side."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Pair:
    """A line for one layer of one model: both sides hold the same elements in the same order."""

    ours: tuple[Tensor, ...]
    theirs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Line:
    """A line as it is written; `{l}` is the layer, `{2l}` and its kin are computed from it, `{e}` is every expert."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]


def line(ours: str | tuple[str, ...], *theirs: str) -> Line:
    """Write a line; where theirs gives no shape it is ours."""
    mine = (ours,) if isinstance(ours, str) else ours
    shape = mine[0][mine[0].index(" [") :]
    return Line(mine, tuple(name if name.endswith("]") else name + shape for name in theirs))


@dataclass(frozen=True)
class Layout:
    """The names of one program."""

    name: str
    once: tuple[Line, ...]
    untied: tuple[Line, ...]
    """Where the head has weights of its own."""
    every_layer: tuple[Line, ...]
    all_but_first: tuple[Line, ...]
    all_but_last: tuple[Line, ...] = ()
    last: tuple[Line, ...] = ()

    def pairs(self, model: ModelConfig) -> Iterator[Pair]:
        """Yield the lines of a model, wildcards filled in."""
        sizes = dimensions(model)
        tied = model.share_embeddings_and_output_weights
        for one in (*self.once, *(() if tied else self.untied)):
            yield _fill(one, 0, sizes)
        for layer in range(model.num_layers):
            lines = list(self.every_layer)
            lines += self.all_but_first if layer else ()
            lines += self.last if layer == model.num_layers - 1 else self.all_but_last
            for one in lines:
                yield _fill(one, layer, sizes)


def dimensions(model: ModelConfig) -> dict[str, int]:
    """Return the letters that shapes are written with."""
    q, k = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    ffn = model.moe_ffn_hidden_size
    return {
        "1": 1, "2": 2, "V": model.vocab_size, "H": model.hidden_size, "R": model.router_hidden_size,
        "Q": q, "K": k, "K/2": k // 2, "Q+K": q + k, "D": model.kv_channels, "G": model.num_query_groups,
        "T0": model.cca_time0, "T1": model.cca_time1,
        "E": model.num_moe_experts, "E+1": model.num_moe_experts + 1, "F": ffn, "2F": 2 * ffn,
    }  # fmt: skip


def _fill(one: Line, layer: int, sizes: dict[str, int]) -> Pair:
    pair = Pair(*(tuple(t for text in side for t in _tensors(text, layer, sizes)) for side in (one.ours, one.theirs)))
    assert sum(t.numel for t in pair.ours) == sum(t.numel for t in pair.theirs), f"the table's line {one} is wrong"
    return pair


def _tensors(text: str, layer: int, sizes: dict[str, int]) -> Iterator[Tensor]:
    match = _ENTRY.match(text)
    assert match, f"no shape in {text!r}"
    shape = tuple(sizes[letter] for letter in match.group(2).split(", "))
    name = match.group(1)
    for wildcard, number in (("{l}", layer), ("{2l}", 2 * layer), ("{2l+1}", 2 * layer + 1), ("{2l+2}", 2 * layer + 2)):
        name = name.replace(wildcard, str(number))
    for expert in range(sizes["E"] if "{e}" in name else 1):
        yield Tensor(name.replace("{e}", str(expert)), shape)


def our_tensors(model: ModelConfig, layout: Layout, dtype: str) -> dict[str, TensorInfo]:
    """Return our tensors; ``dtype`` is that of parameters, the balancing biases are always fp32."""
    return {
        tensor.name: TensorInfo("F32" if tensor.name.endswith("balancing_bias") else dtype, tensor.shape)
        for pair in layout.pairs(model)
        for tensor in pair.ours
    }
