"""Fit the cost model to the calibration data, and say honestly how well it does.

Levenberg-Marquardt on the logarithms of the parameters and of the times, so that every point counts by
its relative error and every parameter stays positive. Invariant: points marked `check` or `floor` never
enter it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from topology.cost import CostModel, GroupShape, Routing, bus_factor
from topology.errors import TopologyError
from topology.parameters import CALIBRATION, DEFAULT, Fitted, Parameters, load_parameters
from topology.yamlio import read

DEEPSEEK_ROUTING = Routing(topk=8, node_limit=4)  # of the published dispatch benchmark
Vector = npt.NDArray[np.float64]
_Rates = dict[Annotated[int, Field(gt=0)], Annotated[float, Field(gt=0)]]


class Curve(BaseModel):
    """One measured curve: exactly one of the four value maps, from size in bytes to the value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str
    op: str
    nodes: int
    per_node: int
    use: Literal["fit", "check", "floor"] = "fit"
    time_us: _Rates = {}
    bus_gb_per_s: _Rates = {}
    gb_per_s: _Rates = {}
    logical_gb_per_s: _Rates = {}

    @model_validator(mode="after")
    def _one_kind_of_value(self) -> Curve:
        if sum(map(bool, (self.time_us, self.bus_gb_per_s, self.gb_per_s, self.logical_gb_per_s))) != 1:
            raise ValueError("give exactly one of time_us, bus_gb_per_s, gb_per_s, logical_gb_per_s")
        return self


@dataclass(frozen=True)
class Point:
    """One calibration point with the model's answer; both as times in seconds."""

    curve: Curve
    size_bytes: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Signed relative error of the predicted time."""
        return self.predicted_s / self.measured_s - 1


def load_calibration(path: Path = CALIBRATION) -> list[Curve]:
    """Read measured curves. Raises TopologyError naming the line of a malformed one."""
    document = read(path)
    entries = document.data.get("curves")
    if not isinstance(entries, list):
        raise TopologyError("a calibration file needs a list `curves`", where=f"{path}:1")
    return [document.validate(Curve, ("curves", i)) for i in range(len(entries))]


def evaluate(model: CostModel, curves: list[Curve]) -> list[Point]:
    """Every point of every curve with the model's prediction."""
    return [point for curve in curves for point in _points(model, curve)]


def _points(model: CostModel, curve: Curve) -> list[Point]:
    shape = GroupShape(curve.nodes, curve.per_node)
    points = []
    for size, value in {
        **curve.time_us,
        **curve.bus_gb_per_s,
        **curve.gb_per_s,
        **curve.logical_gb_per_s,
    }.items():
        moved = size * bus_factor(curve.op, shape.ranks)
        if curve.op == "nic":
            predicted, moved = size / model.nic_rate(size), size
        else:
            predicted = model.time(curve.op, size, shape, DEEPSEEK_ROUTING if curve.op == "dispatch" else None)
        if curve.logical_gb_per_s:
            moved = model.dispatch_logical_bytes(size, curve.nodes, DEEPSEEK_ROUTING)
        measured = value * 1e-6 if curve.time_us else moved / (value * 1e9)
        points.append(Point(curve, size, measured, predicted))
    return points


def fit(model: CostModel, curves: list[Curve]) -> CostModel:
    """Return the model with `Fitted` replaced by the least-squares solution over the curves with use: fit.

    Raises TopologyError when there are fewer points than parameters.
    """
    used = [curve for curve in curves if curve.use == "fit"]
    names = list(Fitted.model_fields)
    start = np.log([getattr(model.parameters.fitted, name) for name in names])

    def with_vector(vector: Vector) -> CostModel:
        values = dict(zip(names, np.exp(vector).tolist(), strict=True))
        parameters = model.parameters.model_copy(update={"fitted": Fitted(**values)})
        return replace(model, parameters=parameters)

    def residuals(vector: Vector) -> Vector:
        points = evaluate(with_vector(vector), used)
        return np.log([point.predicted_s / point.measured_s for point in points])

    if len(residuals(start)) < len(names):
        raise TopologyError(f"too few calibration points for {len(names)} parameters")
    return with_vector(levenberg_marquardt(residuals, start))


def levenberg_marquardt(
    residuals: Callable[[Vector], Vector], start: Vector, iterations: int = 60, step: float = 1e-5
) -> Vector:
    """Minimise the sum of squares of `residuals` (Marquardt 1963) with a forward-difference Jacobian."""
    x, damping = start.copy(), 1e-3
    r = residuals(x)
    for _ in range(iterations):
        jacobian = np.stack([(residuals(x + step * e) - r) / step for e in np.eye(len(x))], axis=1)
        normal = jacobian.T @ jacobian
        scale = np.diag(np.maximum(np.diag(normal), 1e-12))
        move = np.linalg.solve(normal + damping * scale, -jacobian.T @ r)
        trial = residuals(x + move)
        if trial @ trial < r @ r:
            done = np.abs(move).max() < 1e-7
            x, r, damping = x + move, trial, max(damping / 3, 1e-12)
            if done:
                break
        else:
            damping = min(damping * 4, 1e12)
    return x


def mean_error(points: list[Point], smallest_bytes: int = 0) -> float:
    """Mean absolute relative error over points of at least `smallest_bytes`."""
    chosen = [abs(p.error) for p in points if p.size_bytes >= smallest_bytes]
    return float(np.mean(chosen)) if chosen else 0.0


def write_fitted(parameters: Parameters, path: Path = DEFAULT) -> None:
    """Rewrite the `fitted:` section of a parameter file and leave the rest, comments included, as it is."""
    head, _, _ = path.read_text(encoding="utf-8").partition("fitted:\n")
    values = {name: float(f"{value:.4g}") for name, value in parameters.fitted.model_dump().items()}
    body = yaml.safe_dump({"fitted": values}, sort_keys=False)
    path.write_text(head + body, encoding="utf-8")
    load_parameters.cache_clear()
