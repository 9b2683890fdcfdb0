"""The cluster description as a user writes it: strict pydantic models of one short YAML.

Parametric keys (`rails`) describe the regular part; `switches` and `cabling` list what deviates from it.
Units are in the names: `_gbps` is gigabits per second and direction, `_s` seconds. Invariant: a spec that
validates has positive rates and consistent counts; cross-references are checked in `topology.build`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Base of all specs: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NodesSpec(Strict):
    """Compute nodes: a Slurm host list (or a list of names) and what is in one node."""

    names: str | list[str]
    gpus: Count = 8
    gpu_model: str = "MI300X"
    cpus: Count = 112


class ScaleUpSpec(Strict):
    """Links between the GPUs of one node: a full mesh (xGMI) of `link_gbps` per pair and direction."""

    kind: str = "xGMI"
    link_gbps: Positive = 512.0
    usable_fraction: Annotated[float, Field(gt=0, le=1)] = 0.75


class NicsSpec(Strict):
    """Back-end NICs of a node. `device` is a pattern with `{nic}`, the absolute NIC index."""

    model: str = "AMD Pensando Pollara 400"
    per_node: Count = 8
    rate_gbps: Positive = 400.0
    device: str = "ionic_{nic}"

    @field_validator("device")
    @classmethod
    def _is_a_pattern(cls, value: str) -> str:
        try:
            distinct = value.format(nic=0) != value.format(nic=1)
        except (KeyError, IndexError, ValueError):
            distinct = False
        if not distinct:
            raise ValueError("must be a pattern with {nic}, such as ionic_{nic}")
        return value


class RailsSpec(Strict):
    """The regular part of the fabric: `count` rails, each of leaves with `nodes_per_leaf` nodes and spines.

    `spine` is `per_rail` (rails-only: rails never meet), `shared` (rail-optimised: one spine layer joins all
    rails) or `none` (leaves are not joined at all). `uplink_ratio` is up-link over down-link bandwidth of a
    leaf; 1 is non-blocking. `spine_efficiency` is the share of up-link bandwidth left after ECMP collisions.
    """

    count: Count = 8
    leaves_per_rail: Count = 1
    nodes_per_leaf: Count
    spines_per_rail: Index = 0
    uplink_ratio: Positive = 1.0
    spine: Literal["per_rail", "shared", "none"] = "per_rail"
    spine_efficiency: Annotated[float, Field(gt=0, le=1)] = 1.0
    switch_model: str = ""
    switch_latency_s: Positive = 0.8e-6


class SwitchSpec(Strict):
    """A switch that the parametric part does not make, or other up-links for one that it makes."""

    name: str
    tier: Literal["leaf", "spine", "core"]
    rail: Index | None = None
    up: list[str] = []


class CableSpec(Strict):
    """One NIC plugged into another leaf than the regular one. `rail` is a cross-check and may be left out."""

    node: str
    nic: Index
    leaf: str
    rail: Index | None = None


class NicRef(Strict):
    """A NIC by node name and absolute index."""

    node: str
    nic: Index


class HealthSpec(Strict):
    """What is broken or taken out: nodes, single NICs, switches (leaf or spine)."""

    nodes_down: list[str] = []
    nics_down: list[NicRef] = []
    switches_down: list[str] = []


class SoftwareSpec(Strict):
    """Versions on the nodes: they gate variables and known defects. `pxn`: relay through a peer GPU is on."""

    rocm: str = "6.4.0"
    rccl: str = "2.22.3"
    ainic: bool = True
    pxn: bool = True
    traffic_class: Index = 104
    fifo_traffic_class: Index = 192
    gid_index: Index = 1
    socket_interface: str = "eth0"


class StorageSpec(Strict):
    """The separate storage and management network; never used by collectives."""

    model: str = ""
    rate_gbps: Positive = 200.0


class ClusterSpec(Strict):
    """The whole cluster file."""

    name: str
    nodes: NodesSpec
    rails: RailsSpec
    scale_up: ScaleUpSpec = ScaleUpSpec()
    nics: NicsSpec = NicsSpec()
    storage: StorageSpec | None = None
    software: SoftwareSpec = SoftwareSpec()
    switches: list[SwitchSpec] = []
    cabling: list[CableSpec] = []
    health: HealthSpec = HealthSpec()

    @model_validator(mode="after")
    def _counts_agree(self) -> ClusterSpec:
        if self.nodes.gpus % self.nics.per_node:
            raise ValueError(
                f"nics.per_node ({self.nics.per_node}) must divide nodes.gpus ({self.nodes.gpus}): "
                "every GPU uses exactly one NIC"
            )
        if self.nics.per_node % self.rails.count:
            raise ValueError(
                f"rails.count ({self.rails.count}) must divide nics.per_node ({self.nics.per_node}): "
                "every rail takes the same number of NICs of a node"
            )
        if self.rails.leaves_per_rail > 1 and self.rails.spine != "none" and self.rails.spines_per_rail == 0:
            raise ValueError("rails.leaves_per_rail > 1 needs rails.spines_per_rail >= 1 (or spine: none)")
        return self
