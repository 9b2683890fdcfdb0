"""Discovery from dumps in the formats of lldpctl, lldpcli, rdma, ibv_devinfo, sysfs and amd-smi."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from topology.cabling import check_cabling, congruent
from topology.cli import app
from topology.discover import discover, parse_amd_smi_topology, parse_ibv_devinfo, parse_lldp
from topology.emit.slurm import topology_conf
from topology.errors import TopologyError

RAILS = 4


def leaf_of(node: int, nic: int) -> str:
    return f"leaf-r{nic}-{node // 3}"


def write_dumps(folder: Path, nodes: int = 6, cables: dict[tuple[int, int], str | None] | None = None) -> Path:
    """Dumps of a small cluster; `cables` overrides the leaf of (node, nic), None leaves the cable out."""
    cables = cables or {}
    for node in range(nodes):
        home = folder / f"host{node}"
        home.mkdir(parents=True)
        plugged = {nic: cables.get((node, nic), leaf_of(node, nic)) for nic in range(RAILS)}
        # Devices are listed in another order than the rails, as kernels do: only the number counts.
        lines = [f"lldp.rail{nic}.chassis.name={leaf}\nlldp.rail{nic}.port.ifname=Ethernet{node}"
                 for nic, leaf in sorted(plugged.items(), reverse=True) if leaf]  # fmt: skip
        (home / "lldp.txt").write_text("\n".join(lines) + "\nlldp.eth0.chassis.name=mgmt\n")
        (home / "rdma_link.txt").write_text(
            "".join(
                f"link ionic_{nic}/1 state {'ACTIVE' if plugged[nic] else 'DOWN'} physical_state LINK_UP "
                f"netdev rail{nic}\n"
                for nic in (2, 0, 3, 1)
            )
        )
        (home / "sysfs.txt").write_text(
            "".join(
                f"/sys/class/infiniband/ionic_{nic}/ports/1/state:4: ACTIVE\n"
                f"/sys/class/infiniband/ionic_{nic}/ports/1/rate:400 Gb/sec (4X NDR)\n"
                for nic in range(RAILS)
                if plugged[nic]
            )
        )
        (home / "amd_smi_topology.txt").write_text(AMD_SMI)
    for leaf in {leaf_of(node, nic) for node in range(nodes) for nic in range(RAILS)}:
        home = folder / "switches" / leaf
        home.mkdir(parents=True)
        rail = leaf.split("-")[1]
        (home / "lldp.txt").write_text(
            f"""-------------------------------------------------------------------------------
LLDP neighbors:
-------------------------------------------------------------------------------
Interface:    Ethernet49/1, via: LLDP, RID: 1, Time: 0 day, 00:01:02
  Chassis:
    ChassisID:    mac 00:1c:73:00:00:01
    SysName:      spine-{rail}
  Port:
    PortID:       ifname Ethernet1/1
Interface:    Ethernet1/1, via: LLDP, RID: 2, Time: 0 day, 00:01:02
  Chassis:
    SysName:      host0
"""
        )
    return folder


AMD_SMI = """ACCESS TABLE:
             0000:0c:00.0 0000:22:00.0 0000:38:00.0 0000:5c:00.0
0000:0c:00.0 ENABLED      ENABLED      ENABLED      ENABLED

LINK TYPE TABLE:
             0000:0c:00.0 0000:22:00.0 0000:38:00.0 0000:5c:00.0
0000:0c:00.0 SELF         XGMI         XGMI         XGMI
0000:22:00.0 XGMI         SELF         XGMI         XGMI
0000:38:00.0 XGMI         XGMI         SELF         XGMI
0000:5c:00.0 XGMI         XGMI         XGMI         SELF

NUMA BW TABLE:
"""


def test_a_clean_cluster_is_discovered(tmp_path: Path) -> None:
    fabric = discover(write_dumps(tmp_path / "c"))
    assert (fabric.nodes, fabric.gpus_per_node, fabric.rails) == (6, 4, 4)
    assert fabric.spec.nics.rate_gbps == 400
    assert not fabric.rails_meet and len(fabric.usable_nodes) == 6
    assert congruent(fabric)
    assert "SwitchName=leaf1 Nodes=host[3-5]" in topology_conf(fabric)


def test_the_command_line_reads_a_folder_of_dumps(tmp_path: Path) -> None:
    folder = write_dumps(tmp_path / "c", cables={(2, 1): leaf_of(2, 3), (2, 3): leaf_of(2, 1)})
    result = CliRunner().invoke(app, ["show", str(folder)])
    assert result.exit_code == 0 and "cabling swapped: host2: NICs 1 and 3 are swapped" in result.output


def test_swapped_nics_are_named(tmp_path: Path) -> None:
    cables = {(2, 1): leaf_of(2, 3), (2, 3): leaf_of(2, 1)}
    fabric = discover(write_dumps(tmp_path / "c", cables=cables))
    findings = check_cabling(fabric)
    assert [(f.code, f.host) for f in findings] == [("swapped", "host2")]
    assert "NICs 1 and 3" in findings[0].message
    assert 2 not in fabric.usable_nodes and "plugged into rail 3" in fabric.why_unusable(2)


def test_leaf_sets_that_differ_by_rail_are_named(tmp_path: Path) -> None:
    cables = {(2, 2): leaf_of(3, 2), (3, 2): leaf_of(2, 2)}
    fabric = discover(write_dumps(tmp_path / "c", cables=cables))
    findings = check_cabling(fabric)
    assert [(f.code, f.host) for f in findings] == [("incongruent", "host2"), ("incongruent", "host3")]
    with pytest.raises(TopologyError, match="not congruent"):
        topology_conf(fabric)


def test_a_missing_cable_is_named(tmp_path: Path) -> None:
    fabric = discover(write_dumps(tmp_path / "c", cables={(0, 2): None}))
    assert [(f.code, f.host) for f in check_cabling(fabric)] == [("no-cable", "host0")]
    assert fabric.why_unusable(0) == "NIC 2 has no cable"


def test_without_switch_dumps_the_spine_is_an_assumption_that_is_said(tmp_path: Path) -> None:
    folder = write_dumps(tmp_path / "c")
    for path in sorted((folder / "switches").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    fabric = discover(folder)
    assert any("assumed" in note for note in fabric.notes) and len(fabric.usable_nodes) == 6


def test_dumps_without_lldp_are_refused(tmp_path: Path) -> None:
    (tmp_path / "host0").mkdir()
    with pytest.raises(TopologyError, match="no LLDP dump"):
        discover(tmp_path)


def test_parsers_read_the_tools_own_output() -> None:
    assert parse_lldp("lldp.rail0.chassis.name=leaf-a\nlldp.rail0.chassis.descr=Arista") == {"rail0": "leaf-a"}
    devinfo = "hca_id:\tionic_0\n\ttransport:\tInfiniBand (0)\n\t\tport:\t1\n\t\t\tstate:\t\tPORT_{} (4)\n"
    assert parse_ibv_devinfo(devinfo.format("ACTIVE")) == {"ionic_0": True}
    assert parse_ibv_devinfo(devinfo.format("DOWN")) == {"ionic_0": False}
    assert parse_amd_smi_topology(AMD_SMI) == (4, True)
    assert parse_amd_smi_topology(AMD_SMI.replace("XGMI         SELF", "PCIE         SELF")) == (4, False)
