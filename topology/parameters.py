"""Parameters of the cost model: published constants, version-dependent data, and the fitted values.

They live in `topology/data/mi300x.yaml`. Times are seconds, sizes bytes; `_s_per_gb` is seconds per 1e9
bytes. Invariant: `Fitted` has exactly the parameters that `zaya topology fit` reports as fitted.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from topology.errors import TopologyError
from topology.yamlio import read

DATA = Path(__file__).parent / "data"
DEFAULT = DATA / "mi300x.yaml"
CALIBRATION = DATA / "calibration.yaml"
Regime = Literal["low_latency", "bulk"]
REGIMES: tuple[Regime, Regime] = ("low_latency", "bulk")
Positive = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RegimeConstants(_Strict):
    """Published constants of one protocol family: start, hops across the network, payload share, trees."""

    base_s: Positive
    payload: Annotated[float, Field(gt=0, le=1)]
    net_hop_s: Positive
    net_start_s: Annotated[float, Field(ge=0)]
    net_start_range_s: tuple[float, float] | None = None
    tree_net_hop_s: Positive
    tree_efficiency: Annotated[float, Field(gt=0, le=1)]


class Constants(_Strict):
    """Everything published."""

    low_latency: RegimeConstants
    bulk: RegimeConstants
    channels_per_nic: Annotated[int, Field(ge=1)]
    chunk_bytes: Annotated[int, Field(ge=1)]


class VersionData(_Strict):
    """What a range of RCCL versions changes: payload across nodes, and sizes at which it forces a regime.

    `knees` maps an operation to the largest message (bytes) that may use the low-latency regime.
    """

    rccl: str
    net_payload: dict[Regime, float] = {}
    knees: dict[str, int] = {}


class Fitted(_Strict):
    """The fitted parameters, and nothing else.

    `nic_efficiency`: payload share of the line rate; `nic_message_s`: time per RDMA message; `*_hop_s`:
    one xGMI step; `*_serial_s_per_gb`: memory and copy work of a GPU that does not overlap with its
    links; `flat_congestion`: share of the NIC left in an all-to-all that crosses rails;
    `dispatch_exposed`: share of the forwarding inside a node that a hierarchical all-to-all does not
    hide.
    """

    nic_efficiency: Positive
    nic_message_s: Positive
    bulk_hop_s: Positive
    bulk_serial_s_per_gb: Positive
    low_latency_hop_s: Positive
    low_latency_serial_s_per_gb: Positive
    flat_congestion: Positive
    dispatch_exposed: Positive


class Parameters(_Strict):
    """The whole parameter file."""

    constants: Constants
    versions: list[VersionData]
    fitted: Fitted

    def version(self, rccl: str) -> VersionData:
        """The first version entry that covers `rccl` ("2.22.3"). Raises TopologyError when none does."""
        for entry in self.versions:
            if version_matches(rccl, entry.rccl):
                return entry
        raise TopologyError(
            "no cost-model data for this RCCL version",
            value=rccl,
            remedy="add it to topology/data/mi300x.yaml",
        )


def version_key(text: str) -> tuple[int, ...]:
    """Numbers of a version string: "2.22.3-hip" -> (2, 22, 3). Raises TopologyError without any number."""
    numbers = re.match(r"\D*(\d+(?:\.\d+)*)", text)
    if not numbers:
        raise TopologyError("not a version", value=text, remedy="write it like 2.22.3")
    return tuple(int(part) for part in numbers[1].split("."))


def version_matches(version: str, condition: str) -> bool:
    """True when `version` fulfils all comma-separated conditions such as ">=6.2,<7.3"; "" always holds."""
    have = version_key(version)
    for part in filter(None, (item.strip() for item in condition.split(","))):
        match = re.fullmatch(r"(>=|<=|<|>|==)\s*(\S+)", part)
        if not match:
            raise TopologyError("not a version condition", value=part, remedy="write it like >=6.2,<7.3")
        want = version_key(match[2])
        width = max(len(have), len(want))
        a, b = (tuple(v + (0,) * (width - len(v))) for v in (have, want))
        holds = {">=": a >= b, "<=": a <= b, "<": a < b, ">": a > b, "==": a == b}[match[1]]
        if not holds:
            return False
    return True


@cache
def load_parameters(path: Path = DEFAULT) -> Parameters:
    """Read a parameter file. Raises TopologyError naming the line of a malformed one."""
    return read(path).validate(Parameters)
