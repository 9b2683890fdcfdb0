"""The command line on the shipped cluster: every subcommand, its JSON, its exit status, its user errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from topology.cli import app, parse_size
from topology.errors import TopologyError

ROOT = Path(__file__).parents[2]
SHIPPED = str(ROOT / "configs/clusters/mi300x_128x8_rails.yaml")
LOGS = Path(__file__).with_name("nccl_logs")


@pytest.fixture
def plan(tmp_path: Path) -> str:
    path = tmp_path / "plan.yaml"
    path.write_text("world_size: 1024\nexpert_model_parallel_size: 16\npipeline_model_parallel_size: 4\n")
    return str(path)


def call(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == status, result.output + str(result.exception)
    return result.output


def read_json(*arguments: str, status: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", status=status))


def test_show() -> None:
    assert "128 nodes x 8 MI300X = 1024 GPUs" in call("show", SHIPPED)
    assert "r7s3" in call("show", SHIPPED, "--switches")
    damaged = read_json("show", SHIPPED, "--fail", "leaf=r0l1")
    assert damaged["usable_nodes"] == 96 and damaged["unusable"]["zaya032"] == "NIC 0: leaf r0l1 is down"


def test_verify_proves_and_refuses(plan: str, tmp_path: Path) -> None:
    assert "legal: every pair" in call("verify", SHIPPED, plan)
    off = call("verify", SHIPPED, plan, "--no-pxn", status=1)
    assert "ILLEGAL ep: NCCL_PXN_DISABLE=0" in off and "proof: rank 0 (zaya000, rail 0) -> rank" in off
    bad = tmp_path / "bad.yaml"
    bad.write_text("world_size: 48\ntensor_model_parallel_size: 4\npipeline_model_parallel_size: 4\n")
    record = read_json("verify", SHIPPED, str(bad), status=1)
    assert not record["legal"] and record["nearest_legal_plan"]
    illegal = {row["kind"]: row for row in record["communicators"] if not row["legal"]}
    assert illegal["embd"]["witness"]["source_rail"] != illegal["embd"]["witness"]["target_rail"]


def test_verify_reads_a_whole_run_file(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: {num_layers: 40}\nparallel: {expert_model_parallel_size: 8}\ntelemetry: {}\n")
    assert read_json("verify", SHIPPED, str(run))["plan"].startswith("world 1024: tp1")


def test_cost_of_operations_and_plans(plan: str) -> None:
    record = read_json("cost", SHIPPED, "--nodes", "2", "--bytes", "1M,8G")
    rows = record["operations"]["all_reduce"]
    assert [row["size_bytes"] for row in rows] == [1 << 20, 1 << 33]
    assert 330 < rows[1]["bus_gb_per_s"] < 400
    dispatch = read_json("cost", SHIPPED, "--op", "dispatch", "--nodes", "2", "--bytes", "28M")
    assert dispatch["operations"]["dispatch"][0]["bus_gb_per_s"] == pytest.approx(82, rel=0.01)
    assert len(read_json("cost", SHIPPED, "--op", "all")["operations"]) == 9
    assert read_json("cost", SHIPPED, plan)["predicted_communication_s"] > 0


def test_place_emit_and_whatif(plan: str, tmp_path: Path) -> None:
    record = read_json("place", SHIPPED, plan, "--fail", "node=zaya003", "--shrink")
    assert len(record["hosts"]) == 120 and record["excluded"] == {"zaya003": "node is down"}
    assert "bound" in call("place", SHIPPED, plan)
    call("emit", SHIPPED, plan, "--out", str(tmp_path / "out"))
    assert len(list((tmp_path / "out").iterdir())) == 11
    assert call("emit", SHIPPED, plan, "--kind", "hostfile").count("\n") == 1024
    outcomes = read_json("whatif", SHIPPED, plan)
    assert [o["keeps_plan"] for o in outcomes] == [False, False, False, True]
    assert read_json("whatif", SHIPPED, plan, "--fail", "spine=r0s0")[0]["keeps_plan"]


def test_lint_exits_with_one_on_errors() -> None:
    assert "0 errors" in call("lint", str(LOGS / "healthy.log"), "--cluster", SHIPPED)
    shown = call("lint", str(LOGS / "cross-rail-edge.log"), status=1)
    assert "cross-rail-edge" in shown
    assert "n0:100:207 [7] NCCL INFO" in shown, "log lines are shown as they are, markup and emoji codes included"
    found = read_json("lint", *map(str, sorted(LOGS.glob("*.log"))), status=1)
    assert {"relay", "missing-nic", "odd-channels"} <= {issue["rule"] for issue in found}


def test_fit_prints_parameter_count_and_errors() -> None:
    text = call("fit", SHIPPED)
    assert "8 fitted parameters, 22 calibration points" in text
    record = read_json("fit", SHIPPED)
    assert record["mean_error_from_1_mib"] <= 0.07


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere.yaml"], "nowhere.yaml: cannot read the file"),
        (["show", SHIPPED, "--fail", "node=nobody"], "unknown node (got 'nobody')"),
        (["show", SHIPPED, "--fail", "nic=zaya000:9"], "no such NIC (got 9)"),
        (["show", SHIPPED, "--fail", "leaf=r9l9"], "unknown switch"),
        (["cost", SHIPPED, "--op", "gossip"], "--op: unknown operation (got 'gossip')"),
        (["cost", SHIPPED, "--bytes", "many"], "--bytes: not a size"),
        (["cost", SHIPPED, "--per-node", "9"], "no such group"),
        (["emit", SHIPPED, "PLAN"], "give either --out FOLDER or --kind NAME"),
        (["emit", SHIPPED, "PLAN", "--kind", "pdf"], "unknown output (got 'pdf')"),
        (["verify", SHIPPED, "PLAN", "--fail", "node=zaya000"], "only 1016 GPUs are usable"),
        (["lint", "nowhere.log"], "nowhere.log: cannot read the log"),
    ],
)
def test_user_errors_are_one_line_and_status_two(arguments: list[str], message: str, plan: str) -> None:
    result = CliRunner().invoke(app, [plan if a == "PLAN" else a for a in arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output


def test_sizes() -> None:
    assert [parse_size(text) for text in ("4096", "64K", "8M", "1GiB")] == [4096, 65536, 1 << 23, 1 << 30]
    with pytest.raises(TopologyError):
        parse_size("0")


def test_the_package_runs_as_a_module_and_imports_without_torch() -> None:
    heavy = {"torch", "megatron", "networkx", "scipy"}
    code = f"import sys, topology.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run(
        [sys.executable, "-m", "topology", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for command in ("show", "verify", "cost", "place", "emit", "whatif", "lint", "fit"):
        assert command in done.stdout
