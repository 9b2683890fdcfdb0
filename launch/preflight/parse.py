"""What the tools of a node say, as data. One pure function per tool; recorded outputs are in tests/launch/recorded/.

Values that a tool does not know ("N/A") become None. A text that is not the tool's output raises ValueError.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_UNIT_GIB = {"B": 2**-30, "KB": 2**-20, "MB": 2**-10, "MIB": 2**-10, "GB": 1.0, "GIB": 1.0}


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver sees it. Memory in GiB, clocks in MHz, temperature in degrees Celsius."""

    index: int
    memory_gib: float | None = None
    used_gib: float | None = None
    max_clock_mhz: float | None = None
    temperature_c: float | None = None
    correctable: int | None = None
    uncorrectable: int | None = None


@dataclass(frozen=True)
class Nic:
    """One RDMA device."""

    name: str
    active: bool
    rate_gbps: float | None = None
    firmware: str | None = None


def _number(value: Any) -> float | None:
    """A number from 1200, "1200 MHz", {"value": 1200, "unit": "MHz"} or "N/A"."""
    if isinstance(value, dict):
        value = value.get("value")
    if isinstance(value, int | float):
        return float(value)
    match = re.match(r"\s*(-?\d+(?:\.\d+)?)", value) if isinstance(value, str) else None
    return float(match[1]) if match else None


def _gib(value: Any) -> float | None:
    number = _number(value)
    unit = value.get("unit", "MB") if isinstance(value, dict) else (re.sub(r"[\d.\s]", "", str(value)) or "MB")
    return None if number is None else number * _UNIT_GIB.get(unit.upper(), 2**-10)


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def amd_smi_metric(text: str) -> list[Gpu]:
    """`amd-smi metric --json`: a list, or since ROCm 6.4 an object with the list under gpu_data."""
    tree = json.loads(text)
    rows = tree.get("gpu_data") if isinstance(tree, dict) else tree
    if not isinstance(rows, list):
        raise ValueError("no list of GPUs")
    found = []
    for row in rows:
        clocks = [
            c.get("max_clk")
            for name, c in row.get("clock", {}).items()
            if name.startswith("gfx") and isinstance(c, dict)
        ]
        numbers = [n for n in map(_number, clocks) if n is not None]
        memory, ecc, heat = (row.get(key) or {} for key in ("mem_usage", "ecc", "temperature"))
        found.append(
            Gpu(
                index=int(row["gpu"]),
                memory_gib=_gib(memory.get("total_vram")),
                used_gib=_gib(memory.get("used_vram")),
                max_clock_mhz=max(numbers, default=None),
                temperature_c=_number(heat.get("hotspot")),
                correctable=_whole(ecc.get("total_correctable_count")),
                uncorrectable=_whole(ecc.get("total_uncorrectable_count")),
            )
        )
    return found


def rocm_smi(text: str) -> list[Gpu]:
    """`rocm-smi --showmeminfo vram --showtemp --json`, on nodes without amd-smi: memory and temperature."""
    tree = json.loads(text)
    found = []
    for name, row in tree.items():
        if not re.fullmatch(r"card\d+", name):
            continue
        total, used = (_number(row.get(f"VRAM Total {kind}Memory (B)")) for kind in ("", "Used "))
        found.append(
            Gpu(
                index=int(name.removeprefix("card")),
                memory_gib=None if total is None else total / 2**30,
                used_gib=None if used is None else used / 2**30,
                temperature_c=_number(row.get("Temperature (Sensor junction) (C)")),
            )
        )
    return sorted(found, key=lambda gpu: gpu.index)


def rdma_link(text: str) -> dict[str, tuple[bool, str]]:
    """`rdma link`: device -> (active, network interface)."""
    from topology.discover import parse_rdma_link

    return parse_rdma_link(text)


def ibv_devinfo(text: str) -> list[Nic]:
    """`ibv_devinfo -v`: state, firmware, and the rate as width times speed per lane."""
    found = []
    for block in re.split(r"^hca_id:", text, flags=re.M)[1:]:
        state, firmware = re.search(r"state:\s*(\w+)", block), re.search(r"fw_ver:\s*(\S+)", block)
        width, speed = re.search(r"active_width:\s*(\d+)X", block), re.search(r"active_speed:\s*([\d.]+)\s*Gbps", block)
        rate = float(speed[1]) * int(width[1]) if speed and width else None
        found.append(
            Nic(block.split()[0], bool(state and state[1] == "PORT_ACTIVE"), rate, firmware[1] if firmware else None)
        )
    return found


def ethtool(text: str) -> tuple[bool, float | None]:
    """`ethtool IF`: (link is up, Gb/s)."""
    speed = re.search(r"Speed:\s*(\d+)Mb/s", text)
    return bool(re.search(r"Link detected:\s*yes", text)), float(speed[1]) / 1e3 if speed else None


def ethtool_firmware(text: str) -> str | None:
    """`ethtool -i IF`: the firmware version."""
    match = re.search(r"^firmware-version:\s*(.+?)\s*$", text, re.M)
    return match[1] if match else None


def chrony_offset(text: str) -> float:
    """`chronyc tracking`: seconds by which the system clock is off, without sign. ValueError if not synchronised."""
    if re.search(r"Leap status\s*:\s*Not synchronised", text):
        raise ValueError("the clock is not synchronised")
    match = re.search(r"System time\s*:\s*([\d.]+) seconds", text)
    if not match:
        raise ValueError("no system time")
    return float(match[1])
