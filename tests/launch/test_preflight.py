"""Preflight: parsers on recorded outputs, checks against limits, the judge of measurements, and both tiers for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.preflight import parse
from launch.preflight.checks import check_node
from launch.preflight.judge import judge
from launch.preflight.limits import Limits
from tests.launch.conftest import BIN, ENVIRONMENT

RECORDED = Path(__file__).parent / "recorded"
NICS = ["ionic_0", "ionic_1"]


def text(name: str) -> str:
    return (RECORDED / name).read_text()


def texts(**changes: str) -> dict[str, str]:
    found = {
        "amd-smi metric": text("amd_smi_metric.json"),
        "amd-smi topology": text("amd_smi_topology.txt"),
        "rdma link": text("rdma_link.txt").replace("DOWN physical_state DISABLED", "ACTIVE physical_state LINK_UP"),
        "ibv_devinfo": text("ibv_devinfo.txt").replace("PORT_DOWN (1)", "PORT_ACTIVE (4)"),
        "chronyc": text("chronyc.txt"),
        "ethtool benic0p1": text("ethtool.txt"),
        "ethtool -i benic0p1": text("ethtool_i.txt"),
        "lldpctl": "lldp.benic0p1.chassis.name=r0l1\nlldp.benic1p1.chassis.name=r1l1\n",
        "version driver": "6.14.14",
    }
    return found | {name.replace("_", " ", 1) if name.startswith("version") else name: v for name, v in changes.items()}


LIMITS = Limits(
    nic_neighbours={"ionic_0": "r0l*", "ionic_1": "r1l*"},
    gpus=2, gpu_memory_gib=190, min_gpu_clock_mhz=2000, full_mesh=True, nics=NICS, nic_rate_gbps=200,
    min_shared_memory_gib=0.01, min_free_disk_gib={"/": 0.001}, min_memory_gib=1, versions={"driver": "6.14.14"},
)  # fmt: skip


def failing(limits: Limits, given: dict[str, str]) -> dict[str, str]:
    return {f.check: f.line() for f in check_node(given, limits) if not f.ok}


def test_recorded_outputs_are_read():
    first, second = parse.amd_smi_metric(text("amd_smi_metric.json"))
    assert (first.memory_gib, first.max_clock_mhz, first.temperature_c) == (pytest.approx(191.98, abs=0.01), 2100, 41)
    assert (second.correctable, second.uncorrectable, second.index) == (3, 0, 1)
    older = json.dumps(json.loads(text("amd_smi_metric.json"))["gpu_data"])
    assert parse.amd_smi_metric(older) == [first, second], "older tools print the list alone"
    assert [round(gpu.used_gib, 1) for gpu in parse.rocm_smi(text("rocm_smi.json"))] == [0.3, 32.0]
    assert parse.rdma_link(text("rdma_link.txt")) == {"ionic_0": (True, "benic0p1"), "ionic_1": (False, "benic1p1")}
    assert parse.ibv_devinfo(text("ibv_devinfo.txt")) == [
        parse.Nic("ionic_0", True, 400.0, "1.117.1-a-63"),
        parse.Nic("ionic_1", False, 200.0, "1.110.0-a-79"),
    ]
    assert parse.ethtool(text("ethtool.txt")) == (True, 400.0)
    assert parse.ethtool_firmware(text("ethtool_i.txt")) == "1.117.1-a-63"
    assert parse.chrony_offset(text("chronyc.txt")) == pytest.approx(2.13e-5, rel=1e-2)


def test_a_healthy_node_passes():
    assert failing(LIMITS, texts()) == {}
    assert len(check_node(texts(), LIMITS)) >= 13


@pytest.mark.parametrize(
    ("limits", "changes", "check", "message"),
    [
        ({"gpus": 8}, {}, "gpus", "2 (wanted: 8)"),
        ({"gpu_memory_gib": 250}, {}, "gpu memory (GiB)", "191.984 on GPU 0"),
        ({"max_correctable_ecc": 2}, {}, "correctable ECC", "3 on GPU 1"),
        ({"min_gpu_clock_mhz": 2200}, {}, "gpu clock (MHz)", "remove the clock cap"),
        ({}, {"amd-smi metric": "absent: amd-smi is not installed"}, "gpus", "amd-smi is not installed"),
        ({}, {"amd-smi metric": "{}"}, "gpus", "not understood"),
        ({}, {"amd-smi topology": "LINK TYPE TABLE:\nGPU0 SELF PCIE\nGPU1 PCIE SELF\n"}, "xgmi", "broken mesh"),
        (
            {},
            {"rdma link": "link ionic_0/1 state ACTIVE netdev a", "ibv_devinfo": ""},
            "nics present",
            "missing ionic_1",
        ),
        ({}, {"rdma link": "link ionic_0/1 state DOWN netdev a"}, "nics active", "down: ionic_0"),
        ({"nic_rate_gbps": 400}, {}, "nic rate (Gb/s)", "ionic_1 200"),
        ({"nic_firmware": "1.117.1-a-63"}, {}, "nic firmware", "ionic_1 1.110.0-a-79"),
        ({"nic_firmware": "2"}, {"ibv_devinfo": "absent: no"}, "nic firmware", "ionic_0 1.117.1-a-63"),
        ({}, {"ethtool benic0p1": "Speed: 100000Mb/s\nLink detected: no\n"}, "nics active", "down: ionic_0"),
        ({"nic_neighbours": {"ionic_0": "r1l*"}}, {}, "nic rails", "ionic_0 at r0l1 (wanted: ionic_0 at r1l*)"),
        ({}, {"lldpctl": "absent: lldpctl is not installed"}, "nic rails", "lldpctl is not installed"),
        ({"max_clock_offset_s": 1e-6}, {}, "clock offset (s)", "wanted: at most 1e-06 s"),
        (
            {},
            {"chronyc": "System time : 0.0 seconds\nLeap status     : Not synchronised\n"},
            "clock offset (s)",
            "not sync",
        ),
        ({"min_free_disk_gib": {"/": 1e9}}, {}, "free space in / (GiB)", "at least 1e+09"),
        ({"min_shared_memory_gib": 1e9}, {}, "shared memory (GiB)", "mount /dev/shm larger"),
        ({"versions": {"driver": "6.16.6"}}, {}, "version of driver", "6.14.14 (wanted: 6.16.6)"),
    ],
)
def test_every_check_can_fail_and_says_why(limits, changes, check, message):
    found = failing(LIMITS.model_copy(update=limits), texts() | changes)
    assert check in found
    assert message in found[check]


def ranks(nodes: int = 4, per_node: int = 2, **slow: float) -> list[dict]:
    """Figures of a healthy cluster; `slow` is figure -> factor on host n2, rail 1."""
    records = []
    for rank in range(nodes * per_node):
        host, rail = f"n{rank // per_node}", rank % per_node
        record = {
            "rank": rank,
            "host": host,
            "rail": rail,
            "size_bytes": 1 << 28,
            "gemm_tflops": 600.0,
            "memory_gbs": 4000.0,
        }
        source = f"n{(rank // per_node - 1) % nodes}"
        factor = slow.get("link", 1.0) if "n2" in (host, source) and rail == 1 else 1.0
        record["rail.send_recv_from"] = {source: 46.0 * factor}
        if host == "n2" and rail == 1:
            record |= {name: record[name] * factor for name, factor in slow.items() if name in record}
        records.append(record)
    return records


@pytest.mark.parametrize(
    ("slow", "check", "said"),
    [
        ({"gemm_tflops": 0.7}, "gemm_tflops", "420 on rank 5"),
        ({"memory_gbs": 0.5}, "memory_gbs", "2000 on rank 5"),
        ({"link": 0.4}, "rail.send_recv", "slow to all neighbours on rail 1"),
    ],
)
def test_the_slow_node_is_found_and_nobody_else(slow, check, said):
    findings = judge(ranks(**slow), Limits(), {})
    bad = {host: [f for f in found if not f.ok] for host, found in findings.items()}
    assert [host for host, found in bad.items() if found] == ["n2"]
    assert (bad["n2"][0].check, said in str(bad["n2"][0].found)) == (check, True)


def test_figures_against_the_planner():
    records = [record | {"rail.all_reduce": 30.0} for record in ranks()]
    found = judge(records, Limits(network_share=0.9), {"rail.all_reduce": 44.0})
    assert all(any(f.check == "rail.all_reduce, absolute" and not f.ok for f in own) for own in found.values())
    assert all(f.ok for own in judge(records, Limits(), {"rail.all_reduce": 44.0}).values() for f in own)


def test_both_tiers_on_this_machine(tmp_path):
    """The real tools, as far as they are here, and real measurements on two CPU ranks."""
    limits = {"max_clock_offset_s": None, "min_shared_memory_gib": 0.01, "versions": {"python": sys.version.split()[0]}}
    site = {"slurm": {"gpus_per_node": 0}, "preflight": limits | {"min_gemm_tflops": 1e-6, "spread": 0.05}}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    command = [str(BIN / "zaya"), "preflight", "--site", "site.yaml", "--tier", "2", "--nproc", "2"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | ENVIRONMENT
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "preflight/measurements.json").read_text())
    assert figures["backend"] == "gloo"
    assert all(r["gemm_tflops"] > 0 and r["memory_gbs"] > 0 and r["world.all_to_all"] > 0 for r in figures["ranks"])
    assert (tmp_path / "preflight/fail.txt").read_text() == ""
    history = [json.loads(line) for line in (tmp_path / "preflight/history.jsonl").read_text().splitlines()]
    assert [record["tier"] for record in history] == [1, 2]

    site["preflight"] = limits | {"gpus": 8, "versions": {"torch": "0.1"}}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    done = subprocess.run(command[:4], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert "version of torch" in done.stdout
    assert (tmp_path / "preflight/fail.txt").read_text() != ""
