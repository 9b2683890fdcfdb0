"""Compare two sets of weights: names, shapes, types and values, tensor by tensor; and what the two models answer.

Values are streamed in blocks, so folders of any size can be compared; only the logits need both models in memory.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ckpt.errors import CheckpointError
from ckpt.manifest import TensorInfo
from ckpt.steps import find_step
from megatron_zaya.config import RunConfig
from megatron_zaya.config.sections import ModelConfig
from megatron_zaya.convert import hf
from megatron_zaya.convert.commands import open_step
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.convert.folders import KINDS, kind_of
from megatron_zaya.convert.output import Progress, silent
from megatron_zaya.convert.safetensors_files import SafetensorsFolder, read_json
from megatron_zaya.convert.weights import Weights, size_of, to_ours, widen

TORCH_DIST = ".metadata"
"""A file that only Megatron-Core's checkpoints have."""
BLOCK_ELEMENTS = 1 << 21
FLOATS = {"BF16", "F16", "F32"}
_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class Side:
    """One of the two."""

    path: Path
    kind: str
    """"checkpoint", "torch_dist", "transformers" or "original"."""
    weights: Weights
    """Under our names in a checkpoint of ours or of Megatron-Core, else under their own."""
    model: ModelConfig | None
    """None where the folder does not say it in our terms."""

    def ours(self, model: ModelConfig) -> Weights:
        """Return the weights under our names."""
        return to_ours(self.weights, KINDS[self.kind].layout, model) if self.kind in KINDS else self.weights


@dataclass
class Difference:
    """One thing that differs."""

    name: str
    what: str


@dataclass
class Report:
    """The outcome."""

    a: str
    b: str
    tolerance: float
    tensors: int = 0
    elements: int = 0
    differences: list[Difference] = field(default_factory=list)
    logits: str = "not compared"

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def as_json(self) -> dict[str, Any]:
        """Return the content of the report file."""
        return {"equal": self.equal} | asdict(self)

    def summary(self) -> str:
        """Return a few lines for people."""
        head = f"{self.tensors} tensors, {self.elements} elements compared; logits: {self.logits}"
        shown = [f"  {d.name}: {d.what}" for d in self.differences[:20]]
        rest = len(self.differences) - len(shown)
        verdict = "equal" if self.equal else f"{len(self.differences)} DIFFERENCES"
        return "\n".join([f"{verdict}: {head}", *shown, *([f"  and {rest} more"] if rest else [])])


def open_side(path: Path, iteration: int | None = None) -> Side:
    """Open whatever lies at ``path``.

    Raises:
        ConvertError, CheckpointError: it is nothing that can be compared.
    """
    if not path.is_dir():
        raise ConvertError(f"{path}: no such folder")
    try:
        find_step(path, iteration)
    except CheckpointError:
        if iteration is not None:
            raise
        if (path / TORCH_DIST).exists():
            return _open_torch_dist(path)
        weights = SafetensorsFolder(path)
        kind = kind_of(path, list(weights.tensors))
        model = hf.model_config(read_json(path / "config.json"), path) if kind == "transformers" else None
        return Side(path, kind, weights, model)
    step, config = open_step(path, iteration)
    return Side(path, "checkpoint", step, config.model)


def _open_torch_dist(path: Path) -> Side:
    from megatron_zaya.convert.torch_dist import TorchDist, our_view

    stored = TorchDist(path)
    config = stored.run_state().get("config")
    model = None if config is None else RunConfig.model_validate(config).model
    return Side(path, "torch_dist", our_view(stored), model)


def verify(
    a: Path,
    b: Path,
    tolerance: float = 0.0,
    any_dtype: bool = False,
    logits: bool = True,
    progress: Progress = silent,
) -> Report:
    """Compare two sets of weights, in any of the layouts.

    Args:
        a: checkpoint or model folder.
        b: the other.
        tolerance: largest |a - b| of a tensor, relative to its largest |a|; 0 asks for equal bits.
        any_dtype: compare values of different floating-point types.
        logits: compare what both models answer to random tokens, if all tensors fit and transformers is installed.
        progress: told of bytes compared, of both sides.
    """
    first, second = open_side(a), open_side(b)
    report = Report(str(a), str(b), tolerance)
    model = first.model or second.model
    if first.kind == second.kind:
        left, right = first.weights, second.weights
    elif model is None:
        raise ConvertError(f"{a} and {b}: neither says in terms of this program which model it is")
    else:
        left, right = first.ours(model), second.ours(model)
    total = size_of(left.tensors) + size_of(right.tensors)
    fits = _compare_all(left, right, report, any_dtype, lambda size: progress(size, total))
    if logits and fits and model is not None:
        _compare_logits(first, second, model, report)
    return report


def _compare_all(left: Weights, right: Weights, report: Report, any_dtype: bool, done: Callable[[int], None]) -> bool:
    """Compare every tensor; return whether names and shapes are equal."""
    fits = True
    for name in sorted(set(left.tensors) ^ set(right.tensors)):
        fits = False
        report.differences.append(Difference(name, f"only in {report.a if name in left.tensors else report.b}"))
    for name, one in left.tensors.items():
        other = right.tensors.get(name)
        if other is None:
            continue
        if one.shape != other.shape:
            fits = False
            report.differences.append(Difference(name, f"shape {list(one.shape)} and {list(other.shape)}"))
            continue
        values = {one.dtype, other.dtype} <= FLOATS
        if one.dtype != other.dtype and not (any_dtype and values):
            report.differences.append(Difference(name, f"type {one.dtype} and {other.dtype}"))
            continue
        report.tensors += 1
        what = _compare(left, right, name, report.tolerance, done)
        report.elements += math.prod(one.shape)
        if what:
            report.differences.append(Difference(name, what))
    return fits


def _compare(left: Weights, right: Weights, name: str, tolerance: float, done: Callable[[int], None]) -> str | None:
    """Return how two tensors of equal shape differ, or None."""
    infos = left.tensors[name], right.tensors[name]
    numel = math.prod(infos[0].shape)
    bitwise = infos[0].dtype == infos[1].dtype
    differing, worst, scale, first = 0, 0.0, 0.0, 0
    for start in range(0, numel, BLOCK_ELEMENTS):
        count = min(BLOCK_ELEMENTS, numel - start)
        blocks = [np.empty(count * info.item_bytes, dtype=np.uint8) for info in infos]
        left.read(name, start, blocks[0])
        right.read(name, start, blocks[1])
        done(sum(map(len, blocks)))
        if bitwise and tolerance == 0.0 and np.array_equal(blocks[0], blocks[1]):
            continue
        x, y = (_values(block, info) for block, info in zip(blocks, infos, strict=True))
        unequal = (blocks[0] != blocks[1]).reshape(count, -1).any(axis=1) if bitwise else ~(x == y)
        if unequal.any() and not differing:
            first = start + int(unequal.argmax())
        differing += int(unequal.sum())
        error = np.abs(x - y)
        worst = max(worst, math.inf if np.isnan(error).any() else float(error.max()))
        scale = max(scale, float(np.abs(x).max()))
    if not differing or (tolerance > 0.0 and worst <= tolerance * scale):
        return None
    place = [int(i) for i in np.unravel_index(first, infos[0].shape)]
    return (
        f"{differing} of {numel} elements differ, first at {place}; largest |a - b| is {worst:.3g}, "
        f"largest |a| {scale:.3g}"
    )


def _values(block: np.ndarray, info: TensorInfo) -> np.ndarray:
    if info.dtype in FLOATS:
        return widen(block, info.dtype).astype(np.float64)
    return block.view(_INTEGERS[info.item_bytes]).astype(np.float64)


LOGITS_TOLERANCE = 1e-5
"""Of the largest logit, in fp32; it grows with a given tolerance."""


def _compare_logits(first: Side, second: Side, model: ModelConfig, report: Report) -> None:
    if importlib.util.find_spec("transformers") is None:
        report.logits = "not compared: transformers is not installed"
        return
    from megatron_zaya.convert.logits import logits_of_ours, logits_of_transformers, random_tokens

    tokens = random_tokens(model)
    answers = [
        logits_of_transformers(side.path, tokens)
        if side.kind == "transformers"
        else logits_of_ours(side.ours(model), model, tokens)
        for side in (first, second)
    ]
    scale = float(np.abs(answers[0]).max())
    error = float(np.abs(answers[0] - answers[1]).max()) / scale
    report.logits = f"largest difference {error:.2e} of the largest logit, {tokens.size} random tokens, fp32"
    allowed = max(LOGITS_TOLERANCE, 10 * report.tolerance)
    if not error <= allowed:
        report.differences.append(Difference("logits", f"{report.logits}; {allowed:g} is allowed"))
