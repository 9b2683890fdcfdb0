"""The planner against published measurements: every error with its sign, and how many parameters were fitted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from megatron_zaya.config import ConfigError
from megatron_zaya.plan.activations import Options
from megatron_zaya.plan.hardware import Network, accelerator
from megatron_zaya.plan.memory import GIB, Memory, plan_memory
from megatron_zaya.plan.shape import Batch, Layout, ModelShape, Precision
from megatron_zaya.plan.step_time import StepTime, model_flops_per_token, plan_step_time

POINTS = Path(__file__).parent / "data" / "calibration.yaml"
HELD_OUT = Path(__file__).parent / "data" / "held_out.yaml"
"""Points that no parameter has seen."""
FITTED = (
    "kernels that the host starts per layer of an unfused mixture of experts",
    "inner dimension at which products of MI300X and its successors reach half of their rate",
    "memory that driver and libraries of MI300X and its successors hold outside of torch",
)
"""Parameters that were adjusted to these points; all others are physics or published constants."""
MEMORY = ("states_gib", "activations_gib", "allocated_gib")
"""Figures of allocators and of papers that count tensors; the driver's (`device_gib`) hold allowances."""


@dataclass(frozen=True)
class Comparison:
    """One published figure and what the planner says."""

    point: str
    quantity: str
    measured: float
    predicted: float
    source: str

    @property
    def error(self) -> float:
        """Relative, positive where the planner says more."""
        return self.predicted / self.measured - 1

    def as_record(self) -> dict[str, Any]:
        """Return plain data."""
        return {**self.__dict__, "error": self.error}


def _predict(quantity: str, model: ModelShape, layout: Layout, batch: Batch, memory: Memory, time: StepTime) -> float:
    stage = memory.stages[0]
    flops = model_flops_per_token(model, batch.seq_length, whole_attention=True)
    tflops = time.tokens_per_gpu_s * flops / 1e12
    return {
        "states_gib": stage.states / GIB,
        "activations_gib": stage.activations / GIB,
        "allocated_gib": memory.worst.peak / GIB,
        "device_gib": memory.worst.total / GIB,
        "tflops": tflops,
        "tflops_with_recompute": tflops * (4 / 3 if layout.recompute == "full" else 1.0),
        "tokens_per_gpu_s": time.tokens_per_gpu_s,
        "step_s": time.step_s,
    }[quantity]


def compare(points_file: Path = POINTS) -> list[Comparison]:
    """Return every figure of a file of points.

    Raises:
        ConfigError: the file has another form, names an unknown model, field or quantity.
    """
    try:
        tree = yaml.safe_load(points_file.read_text(encoding="utf-8"))
        models = {name: ModelShape(**sizes) for name, sizes in tree["models"].items()}
        return [found for point in tree["points"] for found in _compare_point(point, models)]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"points {points_file}: {type(error).__name__}: {error}; see {POINTS.name}") from None


def _compare_point(point: dict[str, Any], models: dict[str, ModelShape]) -> list[Comparison]:
    model, device = models[point["model"]], accelerator(point["accelerator"])
    layout, batch = Layout(**_tuples(point["layout"])), Batch(**point["batch"])
    common: dict[str, Any] = {
        "precision": Precision(**point.get("precision", {})),
        "options": Options(**point.get("options", {})),
    }
    memory = plan_memory(model, layout, batch, allowances=device.allowances(), **common)
    time = plan_step_time(model, layout, batch, device, Network.of(device), **common)
    return [
        Comparison(
            point["name"], quantity, value, _predict(quantity, model, layout, batch, memory, time), point["source"]
        )
        for quantity, value in point["measured"].items()
    ]


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def summary(comparisons: list[Comparison]) -> dict[str, float]:
    """Return median and largest absolute errors of memory (allocator-level figures) and of time."""
    memory = [abs(c.error) for c in comparisons if c.quantity in MEMORY]
    time = [abs(c.error) for c in comparisons if c.quantity not in (*MEMORY, "device_gib")]
    found: dict[str, float] = {}
    for name, errors in (("memory", memory), ("time", time)):
        if errors:
            found |= {f"{name}_median_error": median(errors), f"{name}_largest_error": max(errors)}
    return found
