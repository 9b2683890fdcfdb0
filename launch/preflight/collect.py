"""Runs the tools of a node and keeps their texts, so that a verdict can be checked, or repeated elsewhere, later."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.preflight import parse
from launch.preflight.limits import Limits

TIMEOUT_S = 20.0
ABSENT = "absent: "


def run(*command: str) -> str:
    """Return what a tool prints; a text that begins with `absent: ` says why there is none."""
    if not shutil.which(command[0]):
        return f"{ABSENT}{command[0]} is not installed"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"{ABSENT}{' '.join(command)} did not answer within {TIMEOUT_S:g} s"
    if done.returncode:
        return f"{ABSENT}{' '.join(command)}: exit status {done.returncode}: {done.stderr.strip()[-300:]}"
    return done.stdout


def collect(limits: Limits) -> dict[str, str]:
    """Return the texts that the checks of these limits need, by name; tools that no check asks for are not run."""
    texts = {}
    if limits.gpus:
        texts["amd-smi metric"] = run("amd-smi", "metric", "--json")
        if texts["amd-smi metric"].startswith(ABSENT):
            texts["rocm-smi"] = run("rocm-smi", "--showmeminfo", "vram", "--showtemp", "--json")
        if limits.full_mesh:
            texts["amd-smi topology"] = run("amd-smi", "topology")
    if limits.nics:
        texts["rdma link"] = run("rdma", "link")
        texts["ibv_devinfo"] = run("ibv_devinfo", "-v")
        for interface in _interfaces(texts["rdma link"], limits.nics):
            texts[f"ethtool {interface}"] = run("ethtool", interface)
            texts[f"ethtool -i {interface}"] = run("ethtool", "-i", interface)
        if limits.nic_neighbours:
            texts["lldpctl"] = run("lldpctl", "-f", "keyvalue")
    if limits.max_clock_offset_s is not None:
        texts["chronyc"] = run("chronyc", "tracking")
    return texts | {f"version {name}": found_version(name) for name in limits.versions}


def _interfaces(rdma_link: str, nics: list[str]) -> list[str]:
    """Network interfaces of the wanted RDMA devices."""
    if rdma_link.startswith(ABSENT):
        return []
    return [interface for device, (_, interface) in parse.rdma_link(rdma_link).items() if device in nics and interface]


def found_version(name: str) -> str:
    """Return the version of the kernel, the GPU driver, ROCm, Python, or of an installed package."""
    files = {"driver": "/sys/module/amdgpu/version", "rocm": "/opt/rocm/.info/version"}
    if name == "kernel":
        return platform.release()
    if name == "python":
        return sys.version.split()[0]
    if name in files:
        path = Path(files[name])
        return path.read_text().strip() if path.exists() else f"{ABSENT}{path} is not there"
    try:
        return version(name)
    except PackageNotFoundError:
        return f"{ABSENT}no package {name}"


def shared_memory_gib() -> float:
    """Size of /dev/shm."""
    return shutil.disk_usage("/dev/shm").total / 2**30


def memory_gib() -> float:
    """Memory of the node."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
