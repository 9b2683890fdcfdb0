"""Every output of a placement, read back with an independent parser where there is one."""

from __future__ import annotations

import json
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from topology.build import fabric_from_text, load_fabric
from topology.cost import CostModel, GroupShape, bus_factor
from topology.emit import bundle
from topology.emit.bandwidth import expected_bandwidth
from topology.emit.environment import environment, known_defects, table
from topology.errors import TopologyError
from topology.fabric import Fabric
from topology.hostlist import expand
from topology.legality import verify
from topology.place import Placement, place
from topology.plan import Plan

SHIPPED = Path(__file__).parents[2] / "configs/clusters/mi300x_128x8_rails.yaml"


@pytest.fixture(scope="module")
def placement() -> Placement:
    damaged = load_fabric(SHIPPED).with_failures(nodes=["zaya005"], nics=[("zaya070", 3)])
    plan = Plan(world_size=1024, pipeline_model_parallel_size=4, expert_model_parallel_size=8)
    return place(damaged, plan, shrink=True)


def variables(fabric: Fabric, plan: Plan) -> dict[str, str]:
    found = environment(fabric, verify(fabric, plan))
    assert len({v.name for v in found}) == len(found), "no variable is set twice"
    return {v.name: v.value for v in found}


def changed(**software: str) -> Fabric:
    text = SHIPPED.read_text()
    for key, value in software.items():
        old = next(line for line in text.splitlines() if line.strip().startswith(f"{key}:"))
        text = text.replace(old, f"{old[: len(old) - len(old.lstrip())]}{key}: {value}")
    return fabric_from_text(text)


def test_hostfile_torchrun_and_rankfile_agree_with_the_rank_map(placement: Placement) -> None:
    hosts = [host for _, host, _ in placement.rank_map()]
    assert bundle.render(placement, "hostfile").splitlines() == hosts
    ranks = [line.split() for line in bundle.render(placement, "rankfile").splitlines()]
    assert [(int(a[1].split("=")[0]), a[1].split("=")[1]) for a in ranks] == list(enumerate(hosts))
    script = bundle.render(placement, "torchrun")
    for rank in (0, 17, 123):
        host = placement.hosts[rank]
        shell = f'hostname() {{ echo {host}; }}; {script}\necho "$NODE_RANK $MASTER_ADDR $NNODES $NPROC_PER_NODE"'
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(rank), placement.master, "124", "8"]
    stranger = subprocess.run(["bash", "-c", f"hostname() {{ echo x; }}; {script}"], capture_output=True, text=True)
    assert stranger.returncode == 1 and "not part of this placement" in stranger.stderr


def test_slurm_block_topology_covers_every_node_once(placement: Placement) -> None:
    block, tree = yaml.safe_load(bundle.render(placement, "topology-yaml"))
    nodes = [name for entry in block["block"]["blocks"] for name in expand(entry["nodes"])]
    assert sorted(nodes) == list(placement.fabric.node_names)
    assert block["block"]["block_sizes"] == [32, 64, 128]
    assert tree["tree"]["switches"][-1]["children"] == "leaf[0-3]"


def test_environment_file_is_shell_and_explains_every_variable(placement: Placement, tmp_path: Path) -> None:
    path = tmp_path / "env.sh"
    path.write_text(bundle.render(placement, "env"))
    done = subprocess.run(["bash", "-c", f"set -eu; . {path}; env"], capture_output=True, text=True, check=True)
    values = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert values["NCCL_PXN_DISABLE"] == "0" and values["NCCL_CROSS_NIC"] == "0"
    assert values["NCCL_IB_HCA"] == "=" + ",".join(f"ionic_{nic}" for nic in range(8))
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("export "):
            comment = " ".join(lines[max(0, number - 3) : number])
            assert "source: https://" in comment and "gate: " in comment, line
    for entry in table("variables"):
        assert entry.reason and entry.source.startswith("https://")


def test_versions_and_plans_gate_variables() -> None:
    fabric, wide = load_fabric(SHIPPED), Plan(world_size=1024)
    assert variables(fabric, wide)["NCCL_NET_PLUGIN"] == "librccl-anp.so"
    newer = variables(changed(rocm='"7.2.1"'), wide)
    assert newer["NCCL_NET_PLUGIN"] == "none" and newer["RCCL_AINIC_ROCE"] == "1"
    assert "NCCL_IB_TC" not in variables(changed(ainic="false"), wide)
    one_node = variables(fabric, Plan(world_size=8))
    assert one_node["NCCL_PXN_DISABLE"] == "1" and "NCCL_MIN_NCHANNELS" not in one_node
    one_leaf = fabric_from_text(
        SHIPPED.read_text()
        .replace("leaves_per_rail: 4\n", "leaves_per_rail: 1\n")
        .replace("nodes_per_leaf: 32", "nodes_per_leaf: 128")
    )
    assert variables(one_leaf, wide)["NCCL_IB_QPS_PER_CONNECTION"] == "1"
    assert variables(fabric, wide)["NCCL_IB_QPS_PER_CONNECTION"] == "2"


def test_known_defects_follow_the_versions() -> None:
    def defects(fabric: Fabric) -> set[str]:
        return {d.id for d in known_defects(fabric, verify(fabric, Plan(world_size=1024)))}

    assert "cross-nic-2.28" not in defects(load_fabric(SHIPPED))
    assert "cross-nic-2.28" in defects(changed(rccl='"2.28.3"'))
    assert "rings-not-rail-aligned" in defects(changed(rocm='"6.1.2"'))


def test_expected_bandwidth_is_the_model_with_thresholds_below() -> None:
    fabric = load_fabric(SHIPPED)
    rows = expected_bandwidth(fabric)
    model = CostModel.for_fabric(fabric)
    for row in rows:
        assert row.fail_gb_per_s < row.pass_gb_per_s < row.bus_gb_per_s
    row = next(r for r in rows if (r.op, r.nodes, r.per_node, r.size_bytes) == ("all_reduce", 2, 8, 1 << 33))
    seconds = model.all_reduce(1 << 33, GroupShape(2, 8))
    assert row.bus_gb_per_s == pytest.approx((1 << 33) * bus_factor("all_reduce", 16) / seconds / 1e9, rel=1e-3)
    # One NIC of eight missing must fail, and the published floor of 330 GB/s must not.
    assert row.bus_gb_per_s * 7 / 8 < row.pass_gb_per_s
    assert row.fail_gb_per_s < 330
    assert {r.nodes for r in rows} == {1, 2, 4, 8, 16, 32, 64, 128}


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.cells += tag == "td"


def test_pictures_are_well_formed_and_show_the_damage(placement: Placement) -> None:
    root = ET.fromstring(bundle.render(placement, "svg"))
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert sum(text.startswith("rail ") for text in texts) == 8
    assert any("31 of 32 nodes used" in text for text in texts)
    page = Balanced()
    page.feed(bundle.render(placement, "html"))
    assert page.cells == 6 * len(placement.cost.flows) + 4 * len(placement.verdicts)
    dot = bundle.render(placement, "dot")
    assert dot.count("{") == dot.count("}") == 1 and dot.count('"r0l0" -- ') == 4
    broken = place(load_fabric(SHIPPED).with_failures(switches=["r1l3"]), Plan(world_size=8))
    assert "r1l3: DOWN" in bundle.render(broken, "svg")


def test_names_are_escaped_in_pictures() -> None:
    fabric = fabric_from_text(SHIPPED.read_text().replace("name: mi300x-128x8-rails", 'name: "<script>&"'))
    found = place(fabric, Plan(world_size=8))
    ET.fromstring(bundle.render(found, "svg"))
    assert "<script>" not in bundle.render(found, "html")


def test_the_bundle_writes_everything_and_json_carries_the_plan(placement: Placement, tmp_path: Path) -> None:
    written, skipped = bundle.write_all(placement, tmp_path / "out")
    assert {path.name for path in written} == set(bundle.FORMATS.values()) and not skipped
    record = json.loads((tmp_path / "out/placement.json").read_text())
    assert record["hosts"] == placement.hosts and record["plan"]["world_size"] == 992
    assert record["excluded"] == {"zaya005": "node is down", "zaya070": "NIC 3 is down"}


def test_unknown_outputs_are_refused(placement: Placement) -> None:
    with pytest.raises(TopologyError, match="unknown output"):
        bundle.render(placement, "pdf")
