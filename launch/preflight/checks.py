"""What was found against what a healthy node has: one finding per check. Pure, but for the file systems it looks at."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from launch.preflight import collect, parse
from launch.preflight.collect import ABSENT
from launch.preflight.limits import Limits
from launch.preflight.parse import Gpu, Nic


@dataclass(frozen=True)
class Finding:
    """One check of one node."""

    check: str
    ok: bool
    found: Any
    wanted: str
    remedy: str = ""

    def line(self) -> str:
        """The finding for people."""
        tail = f"; {self.remedy}" if self.remedy and not self.ok else ""
        return f"{'ok  ' if self.ok else 'FAIL'} {self.check}: {self.found} (wanted: {self.wanted}){tail}"


Texts = Mapping[str, str]


def check_node(texts: Texts, limits: Limits) -> list[Finding]:
    """Return the findings of all checks that the limits ask for."""
    findings: list[Finding] = []
    findings += _gpu_findings(texts, limits) if limits.gpus else []
    findings += _nic_findings(texts, limits) if limits.nics else []
    findings += _clock(texts, limits)
    findings += _room(limits)
    return findings + _versions(texts, limits)


def _read(texts: Texts, name: str, parser: Callable[[str], Any]) -> tuple[Any, str]:
    """Return (parsed, ""), or (None, why not)."""
    text = texts.get(name, f"{ABSENT}{name} was not collected")
    if text.startswith(ABSENT):
        return None, text.removeprefix(ABSENT)
    try:
        return parser(text), ""
    except (ValueError, KeyError, TypeError) as error:
        return None, f"output of {name} is not understood: {error}"


def _gpu_findings(texts: Texts, limits: Limits) -> list[Finding]:
    gpus, reason = _read(texts, "amd-smi metric", parse.amd_smi_metric)
    if gpus is None and "rocm-smi" in texts:
        gpus, reason = _read(texts, "rocm-smi", parse.rocm_smi)
    if gpus is None:
        return [
            Finding("gpus", False, reason, f"{limits.gpus} GPUs", "install the driver's tools, or run on a GPU node")
        ]
    remedy = "see dmesg for amdgpu, reboot or replace the board"
    findings = [Finding("gpus", len(gpus) == limits.gpus, len(gpus), str(limits.gpus), remedy)]
    least: list[tuple[str, str, float | None, str]] = [
        ("gpu memory (GiB)", "memory_gib", limits.gpu_memory_gib, remedy),
        ("gpu clock (MHz)", "max_clock_mhz", limits.min_gpu_clock_mhz, "remove the clock cap (amd-smi reset --clocks)"),
    ]
    most: list[tuple[str, str, float | None, str]] = [
        ("uncorrectable ECC", "uncorrectable", limits.max_uncorrectable_ecc, "replace the board"),
        ("correctable ECC", "correctable", limits.max_correctable_ecc, "watch the board"),
        ("temperature (C)", "temperature_c", limits.max_gpu_temperature_c, "see cooling"),
        ("memory in use (GiB)", "used_gib", limits.max_used_gpu_memory_gib, "end leftover processes (amd-smi process)"),
    ]
    for name, field, limit, advice in least:
        findings += _extreme(name, gpus, field, limit, advice, lowest=True)
    for name, field, limit, advice in most:
        findings += _extreme(name, gpus, field, limit, advice, lowest=False)
    if limits.full_mesh:
        findings.append(_mesh(texts, limits))
    return findings


def _extreme(name: str, gpus: list[Gpu], field: str, limit: float | None, remedy: str, lowest: bool) -> list[Finding]:
    """Compare the worst GPU with a limit; a value that the tool does not know is no finding."""
    known = [(getattr(gpu, field), gpu.index) for gpu in gpus if getattr(gpu, field) is not None]
    if limit is None or not known:
        return []
    value, index = min(known) if lowest else max(known)
    good = value >= limit if lowest else value <= limit
    bound = f"at {'least' if lowest else 'most'} {limit:g}"
    return [Finding(name, good, f"{value:g} on GPU {index}", bound, remedy)]


def _mesh(texts: Texts, limits: Limits) -> Finding:
    from topology.discover import parse_amd_smi_topology

    found, reason = _read(texts, "amd-smi topology", parse_amd_smi_topology)
    wanted = f"xGMI between all {limits.gpus} GPUs"
    if found is None:
        return Finding("xgmi", False, reason, wanted)
    count, mesh = found
    return Finding("xgmi", mesh and count == limits.gpus, f"{count} GPUs, {'full' if mesh else 'broken'} mesh", wanted,
                   "reseat or replace the board; a link is down")  # fmt: skip


def _nic_findings(texts: Texts, limits: Limits) -> list[Finding]:
    links, reason = _read(texts, "rdma link", parse.rdma_link)
    devices, why = _read(texts, "ibv_devinfo", parse.ibv_devinfo)
    if links is None and devices is None:
        return [Finding("nics", False, f"{reason}; {why}", ", ".join(limits.nics), "install rdma-core")]
    nics = {name: _by_ethtool(name, active, interface, texts) for name, (active, interface) in (links or {}).items()}
    for nic in devices or []:
        other = nics.get(nic.name, nic)
        rate, firmware = nic.rate_gbps or other.rate_gbps, nic.firmware or other.firmware
        nics[nic.name] = Nic(nic.name, nic.active and other.active, rate, firmware)
    missing = [name for name in limits.nics if name not in nics]
    down = [name for name in limits.nics if name in nics and not nics[name].active]
    findings = [
        Finding("nics present", not missing, f"missing {', '.join(missing)}" if missing else "all",
                ", ".join(limits.nics), "see lspci and dmesg"),
        Finding("nics active", not down, f"down: {', '.join(down)}" if down else "all", "all ports active",
                "see cable and switch port"),
    ]  # fmt: skip
    own = [nics[name] for name in limits.nics if name in nics]
    if limits.nic_rate_gbps is not None:
        least = limits.nic_rate_gbps
        slow = [f"{nic.name} {nic.rate_gbps:g}" for nic in own if nic.rate_gbps is not None and nic.rate_gbps < least]
        found = ", ".join(slow) or "all"
        findings.append(Finding("nic rate (Gb/s)", not slow, found, f"at least {least:g}", "see cable and switch port"))
    if limits.nic_firmware is not None:
        odd = [f"{n.name} {n.firmware}" for n in own if n.firmware != limits.nic_firmware]
        findings.append(Finding("nic firmware", not odd, ", ".join(odd) or "all", limits.nic_firmware, "update it"))
    if limits.nic_neighbours:
        findings.append(_rails(texts, links or {}, limits))
    return findings


def _by_ethtool(name: str, active: bool, interface: str, texts: Texts) -> Nic:
    """What ethtool says of the network interface of an RDMA device; it counts where ibv_devinfo is silent."""
    link, _ = _read(texts, f"ethtool {interface}", parse.ethtool)
    firmware, _ = _read(texts, f"ethtool -i {interface}", parse.ethtool_firmware)
    up, rate = link or (True, None)
    return Nic(name, active and up, rate, firmware)


def _rails(texts: Texts, links: Mapping[str, tuple[bool, str]], limits: Limits) -> Finding:
    """Every NIC must hang on the rail of its number: a swapped cable trains, slowly, until a collective hangs."""
    from topology.discover import parse_lldp

    wanted = ", ".join(f"{device} at {pattern}" for device, pattern in limits.nic_neighbours.items())
    neighbours, reason = _read(texts, "lldpctl", parse_lldp)
    if neighbours is None:
        return Finding("nic rails", False, reason, wanted, "install lldpd")
    seen = {device: neighbours.get(links.get(device, (False, device))[1], "nobody") for device in limits.nic_neighbours}
    wrong = [
        f"{device} at {seen[device]}" for device, p in limits.nic_neighbours.items() if not fnmatch(seen[device], p)
    ]
    return Finding("nic rails", not wrong, ", ".join(wrong) or "all", wanted, "swap the cables back")


def _clock(texts: Texts, limits: Limits) -> list[Finding]:
    if limits.max_clock_offset_s is None:
        return []
    offset, reason = _read(texts, "chronyc", parse.chrony_offset)
    wanted = f"at most {limits.max_clock_offset_s:g} s"
    if offset is None:
        return [
            Finding("clock offset (s)", False, reason, wanted, "set max_clock_offset_s: null where chrony does not run")
        ]
    return [Finding("clock offset (s)", offset <= limits.max_clock_offset_s, offset, wanted, "check chrony")]


def _room(limits: Limits) -> list[Finding]:
    findings = []
    for folder, least in limits.min_free_disk_gib.items():
        try:
            free: float | str = round(shutil.disk_usage(folder).free / 2**30, 2)
        except OSError as error:
            free = error.strerror or str(error)
        good = isinstance(free, float) and free >= least
        findings.append(Finding(f"free space in {folder} (GiB)", good, free, f"at least {least:g}", "free space"))
    sizes = [
        ("shared memory (GiB)", collect.shared_memory_gib(), limits.min_shared_memory_gib, "mount /dev/shm larger"),
        ("memory (GiB)", collect.memory_gib(), limits.min_memory_gib, "see dmidecode for failed modules"),
    ]
    for name, size, limit, remedy in sizes:
        if limit is not None:
            findings.append(Finding(name, size >= limit, round(size, 2), f"at least {limit:g}", remedy))
    return findings


def _versions(texts: Texts, limits: Limits) -> list[Finding]:
    findings = []
    for name, wanted in limits.versions.items():
        found = texts.get(f"version {name}", f"{ABSENT}not collected").removeprefix(ABSENT)
        findings.append(
            Finding(f"version of {name}", found == wanted, found, wanted, "bring the node's image up to date")
        )
    return findings
