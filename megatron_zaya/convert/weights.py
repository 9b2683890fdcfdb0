"""Named tensors that are read in parts, wherever they lie, and views of them under other names and types. Torch-free.

Nothing holds a whole tensor: a reader asks for a run of elements, and every view below passes the question on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckpt.manifest import ITEM_BYTES, TensorInfo
from megatron_zaya.config.errors import did_you_mean
from megatron_zaya.config.sections import ModelConfig
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.convert.table import Layout, Pair, Tensor

Bytes = NDArray[np.uint8]
WIDENS = {("BF16", "F32"), ("F16", "F32")}
"""Changes of type that keep every value."""


def size_of(tensors: dict[str, TensorInfo]) -> int:
    """Return the bytes of tensors."""
    return sum(math.prod(info.shape) * info.item_bytes for info in tensors.values())


class Weights(Protocol):
    """Tensors by name."""

    where: str
    """What an error message calls them."""
    tensors: dict[str, TensorInfo]

    def read(self, name: str, start: int, out: Bytes) -> None:
        """Fill ``out`` with the elements of a tensor from element ``start`` on. Any thread may call it."""


@dataclass(frozen=True)
class _Run:
    """Elements of a target tensor that lie together in a source tensor."""

    source: str
    source_start: int
    start: int
    count: int


def _runs(sources: tuple[Tensor, ...], target_begin: int, target: Tensor) -> Iterable[_Run]:
    """Yield the runs of ``target``, which begins at element ``target_begin`` of the joined sources."""
    begin = 0
    for source in sources:
        low, high = max(begin, target_begin), min(begin + source.numel, target_begin + target.numel)
        if low < high:
            yield _Run(source.name, low - begin, low - target_begin, high - low)
        begin += source.numel


class Renamed:
    """The tensors of a model under the names of the other side of a table."""

    def __init__(self, source: Weights, pairs: Iterable[Pair], to_ours: bool) -> None:
        """Make a view; every tensor of the source must be in the table, and the other way round.

        Raises:
            ConvertError: a tensor is missing, left over or of another shape, or the parts of one differ in type.
        """
        self.where, self.tensors = source.where, {}
        self._source = source
        self._made_of: dict[str, list[_Run]] = {}
        moves = [(p.theirs, p.ours) if to_ours else (p.ours, p.theirs) for p in pairs]
        check_tensors(source, [tensor for sources, _ in moves for tensor in sources])
        for sources, targets in moves:
            dtypes = {source.tensors[tensor.name].dtype for tensor in sources}
            if len(dtypes) > 1:
                names = ", ".join(f"{t.name} {source.tensors[t.name].dtype}" for t in sources[:4])
                raise ConvertError(f"{source.where}: these become one tensor, but differ in type: {names}")
            begin = 0
            for target in targets:
                self.tensors[target.name] = TensorInfo(next(iter(dtypes)), target.shape)
                self._made_of[target.name] = list(_runs(sources, begin, target))
                begin += target.numel

    def read(self, name: str, start: int, out: Bytes) -> None:
        """Fill ``out`` from whatever source tensors hold these elements."""
        item = self.tensors[name].item_bytes
        stop = start + len(out) // item
        for run in self._made_of[name]:
            low, high = max(start, run.start), min(stop, run.start + run.count)
            if low < high:
                part = out[(low - start) * item : (high - start) * item]
                self._source.read(run.source, run.source_start + low - run.start, part)


def check_tensors(source: Weights, wanted: list[Tensor]) -> None:
    """Check that the source holds exactly the wanted tensors.

    Raises:
        ConvertError: a tensor is missing, left over or of another shape.
    """
    names = {tensor.name for tensor in wanted}
    missing = [tensor.name for tensor in wanted if tensor.name not in source.tensors]
    extra = sorted(set(source.tensors) - names)
    if missing:
        hint = did_you_mean(missing[0], extra)
        raise ConvertError(f"{source.where}: lacks {some(missing)}, which the model of the run file has{hint}")
    if extra:
        raise ConvertError(f"{source.where}: holds {some(extra)}, which the model of the run file does not have")
    for tensor in wanted:
        found = source.tensors[tensor.name].shape
        if found != tensor.shape:
            raise ConvertError(
                f"{source.where}: {tensor.name!r} has shape {list(found)}, {list(tensor.shape)} by the run file"
            )


def some(names: list[str]) -> str:
    """Return the first names and how many more there are."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Named:
    """Some tensors under other names, otherwise as they are."""

    def __init__(self, source: Weights, names: dict[str, str]) -> None:
        """Make a view; ``names`` are the source's by new name."""
        self.where, self._source, self._names = source.where, source, names
        self.tensors = {new: source.tensors[old] for new, old in names.items()}

    def read(self, name: str, start: int, out: Bytes) -> None:
        """Fill ``out`` from the tensor of the other name."""
        self._source.read(self._names[name], start, out)


class Retyped:
    """The same tensors in other types."""

    def __init__(self, source: Weights, dtypes: dict[str, str], rounding: bool = False) -> None:
        """Make a view.

        Args:
            source: the tensors.
            dtypes: wanted types by name; a tensor that is not named keeps its own.
            rounding: allow changes that lose bits.

        Raises:
            ConvertError: a change would lose bits, or is not one between floating-point types.
        """
        self.where, self._source = source.where, source
        self.tensors = {
            name: TensorInfo(dtypes.get(name, info.dtype), info.shape) for name, info in source.tensors.items()
        }
        for name, info in source.tensors.items():
            change = (info.dtype, self.tensors[name].dtype)
            if change[0] == change[1]:
                continue
            if not {*change} <= {"BF16", "F16", "F32"} or (not rounding and change not in WIDENS):
                raise ConvertError(
                    f"{source.where}: {name!r} is {change[0]} there and would lose bits as {change[1]}; set "
                    "run.precision to match, or allow it with --rounding"
                )

    def read(self, name: str, start: int, out: Bytes) -> None:
        """Fill ``out`` with converted elements."""
        theirs, ours = self._source.tensors[name].dtype, self.tensors[name].dtype
        if theirs == ours:
            self._source.read(name, start, out)
            return
        raw = np.empty(len(out) // ITEM_BYTES[ours] * ITEM_BYTES[theirs], dtype=np.uint8)
        self._source.read(name, start, raw)
        out[:] = narrow(widen(raw, theirs), ours)


def widen(raw: Bytes, dtype: str) -> NDArray[np.float32]:
    """Return the elements of BF16, F16 or F32 bytes as fp32."""
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32, copy=False)


def narrow(values: NDArray[np.float32], dtype: str) -> Bytes:
    """Return fp32 values as bytes of BF16 (to nearest, ties to even), F16 or F32. NaN stays NaN."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        rounded[np.isnan(values)] = 0x7FC0
        return rounded.view(np.uint8)
    return values.astype(np.float16 if dtype == "F16" else np.float32, copy=False).view(np.uint8)


_EXPONENTS = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}


def first_not_finite(raw: Bytes, dtype: str) -> int | None:
    """Return the position of the first NaN or infinity; None where there is none, or the type has none."""
    if dtype not in _EXPONENTS:
        return None
    kind, exponent = _EXPONENTS[dtype]
    bits = raw.view(kind)
    step = 1 << 18  # stays in the cache
    for begin in range(0, len(bits), step):
        part = bits[begin : begin + step] & kind(exponent)
        if len(part) and part.max() == exponent:
            return begin + int(part.argmax())
    return None


def check_finite(weights: Weights, name: str, start: int, raw: Bytes) -> None:
    """Check elements of a tensor, from element ``start`` on.

    Raises:
        ConvertError: one is NaN or infinite; says which.
    """
    info = weights.tensors[name]
    bad = first_not_finite(raw, info.dtype)
    if bad is not None:
        place = [int(i) for i in np.unravel_index(start + bad, info.shape)]
        raise ConvertError(f"{weights.where}: {name!r} holds NaN or infinity at {place}; nothing was written")


def to_ours(source: Weights, layout: Layout, model: ModelConfig) -> Renamed:
    """Return a source in ``layout`` under our names."""
    return Renamed(source, layout.pairs(model), to_ours=True)


def to_theirs(source: Weights, layout: Layout, model: ModelConfig) -> Renamed:
    """Return a source under our names in ``layout``."""
    return Renamed(source, layout.pairs(model), to_ours=False)
