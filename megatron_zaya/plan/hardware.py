"""Accelerators, and the time of one piece of work on them: a matrix product, a pass over memory, a collective.

Collectives are priced by `topology.cost`: on the fabric of a cluster file, or else on nodes of the accelerator's kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megatron_zaya.config import ConfigError
from megatron_zaya.plan.memory import GIB, Allowances
from topology.cost import CostModel, GroupShape, Routing
from topology.fabric import Fabric
from topology.parameters import load_parameters

DATA = Path(__file__).parent / "data" / "accelerators.yaml"
LAUNCH_S = 4e-6
"""Start of one kernel."""
FILL_S = 20e-6
"""Time in which a product fills and drains the accelerator, at the rate it reaches when full."""


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator; see data/accelerators.yaml for units and sources."""

    name: str
    memory_bytes: int
    peak_tflops: float
    matmul: float
    short_k: float
    """Inner dimension at which a product reaches half of its rate."""
    attention: float
    memory_gb_per_s: float
    switched: bool
    link_gb_per_s: float
    nic_gb_per_s: float
    per_node: int
    driver_gib: float = 1.5

    def allowances(self) -> Allowances:
        """Return what no shape shows, as far as it depends on the accelerator."""
        return Allowances(driver_bytes=self.driver_gib * GIB)

    def product_s(self, m: float, n: float, k: float, count: float = 1.0) -> float:
        """Return the time of ``count`` products [m, k] x [k, n], one after the other."""
        if min(m, n, k) <= 0:
            return 0.0
        flops = 2.0 * m * n * k
        rate = self.peak_tflops * 1e12 * self.matmul * k / (k + self.short_k)
        memory = 2.0 * (m * k + k * n + m * n) / (self.memory_gb_per_s * 1e9)
        return count * (max(flops / rate + FILL_S * min(1.0, flops / 2e11), memory) + LAUNCH_S)

    def attention_s(self, flops: float) -> float:
        """Return the time of fused attention."""
        return flops / (self.peak_tflops * 1e12 * self.attention)

    def traffic_s(self, size_bytes: float) -> float:
        """Return the time of a pass over memory."""
        return size_bytes / (self.memory_gb_per_s * 1e9)


@cache
def accelerators() -> dict[str, Accelerator]:
    """Return every accelerator that is known, by name."""
    table: dict[str, dict[str, Any]] = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return {name: Accelerator(name=name, **values) for name, values in table.items()}


def accelerator(name: str) -> Accelerator:
    """Return one accelerator. Raises ConfigError for an unknown name."""
    known = accelerators()
    if name not in known:
        raise ConfigError(f"accelerator {name!r} is unknown; known are {', '.join(known)} ({DATA.name} takes more)")
    return known[name]


@dataclass
class Network:
    """What connects the accelerators of a job; prices collectives."""

    cost: CostModel
    per_node: int
    switched: bool = False
    nics_per_node: int = 8

    def __post_init__(self) -> None:
        """Start without remembered prices."""
        self._known: dict[tuple[Any, ...], float] = {}

    @classmethod
    def of(cls, device: Accelerator, fabric: Fabric | None = None, nics_down: int = 0) -> Network:
        """Return the network of a cluster, or of whole nodes of ``device`` on a rail fabric."""
        if fabric is not None:
            return cls(CostModel.for_fabric(fabric), fabric.gpus_per_node, nics_per_node=8 - nics_down)
        cost = CostModel(load_parameters(), device.link_gb_per_s * 1e9, device.nic_gb_per_s * 1e9, 8e-7, "2.22.3")
        return cls(cost, device.per_node, device.switched, 8 - nics_down)

    def shape(self, stride: int, size: int) -> GroupShape:
        """Return the shape of a group whose members are ``stride`` ranks apart."""
        inside = max(1, min(size, self.per_node // stride)) if stride < self.per_node else 1
        return GroupShape(-(-size // inside), inside)

    def time_s(self, op: str, size_bytes: float, stride: int, size: int, skew: float = 1.0) -> float:
        """Return the time of one call. A relayed all-to-all is taken where a group spans nodes."""
        if size <= 1 or size_bytes <= 0:
            return 0.0
        key = (op, size_bytes, stride, size, skew)
        if key not in self._known:
            self._known[key] = self._price(op, size_bytes, self.shape(stride, size), skew)
        return self._known[key]

    def _price(self, op: str, size_bytes: float, shape: GroupShape, skew: float) -> float:
        cost = self.cost
        if self.switched and shape.per_node > 1 and op != "send_recv":
            # A switch gives a rank its whole rate to any number of peers; the model counts links of a mesh.
            cost = replace(cost, link_bytes_per_s=cost.link_bytes_per_s / (shape.per_node - 1))
        if shape.nodes > 1 and self.nics_per_node < 8:
            cost = replace(cost, nic_line_bytes_per_s=cost.nic_line_bytes_per_s * self.nics_per_node / 8)
        if op == "all_to_all":
            op = "all_to_all_relay" if shape.nodes > 1 else "all_to_all_flat"
        return cost.time(op, size_bytes, shape, Routing(skew=skew))
