"""`zaya ckpt` on real steps: what it prints, its exit status, and that it leaves good steps alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from ckpt.errors import CheckpointError
from launch.cli import app
from tests.ckpt.conftest import assert_equal, make_checkpointer, shards, tensors, zeros  # noqa: F401 (fixture)


@pytest.fixture
def steps(make_checkpointer, tmp_path):  # noqa: F811
    checkpointer = make_checkpointer()
    for iteration in (1, 2, 3):
        layout = {"tensor_model_parallel_size": 2, "data_parallel_size": 4}
        checkpointer.save(
            iteration, shards(tensors(iteration, big=2)), {"seed": 7}, layout=layout, score=iteration / 10
        )
        assert [save.error for save in checkpointer.wait(30)] == [None]
    return checkpointer


def zaya(*arguments):
    result = CliRunner().invoke(app, ["ckpt", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def damage(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_ls_and_info(steps):
    (steps.root / "iter_0000009.aa-1.partial").mkdir()
    (steps.root / "iter_0000002" / "manifest.json").write_text("{}")
    text = zaya("ls", steps.root).output
    assert "tp2 dp4" in text
    assert "NO:" in text
    assert "iter_0000009.aa-1.partial" in text
    value = json.loads(zaya("ls", steps.root, "--json").output)
    assert [(s["iteration"], s["valid"]) for s in value["steps"]] == [(1, True), (2, False), (3, True)]
    assert value["steps"][0]["bytes"] > 6_000_000
    text = zaya("info", steps.root, "--iteration", 1, "--tensors", "big*").output
    assert "iteration 1" in text
    assert "big.0  F32 [1000, 768]" in text
    assert "seed" in text
    assert json.loads(zaya("info", steps.root, "--json").output)["common"] == {"seed": 7}


def test_verify_names_the_damage(steps):
    assert zaya("verify", steps.root, "--all").exit_code == 0
    damage(steps.root / "iter_0000003" / "rank_00000.safetensors")
    result = zaya("verify", steps.root)
    assert result.exit_code == 1
    assert "rank_00000.safetensors: chunk" in result.output
    assert "big." in result.output
    assert zaya("verify", steps.root, "--iteration", 2).exit_code == 0


def test_diff_and_reshard(steps, tmp_path):
    other = tmp_path / "other"
    assert "3 files" in zaya("reshard", steps.root, other, "--files", 3, "--iteration", 2).output
    assert len(list((other / "iter_0000002").glob("*.safetensors"))) == 3
    same = zaya("diff", steps.root / "iter_0000002", other)
    assert (same.exit_code, "all tensors are equal" in same.output) == (0, True)
    differing = zaya("diff", steps.root / "iter_0000001", other)
    assert differing.exit_code == 1
    assert "big.0: 768000 of 768000 elements differ" in differing.output
    with pytest.raises(CheckpointError, match="is there already"):
        zaya("reshard", steps.root, other, "--iteration", 2)
    state = zeros(tensors(big=2))
    type(steps)(other).load(shards(state))
    assert_equal(state, tensors(2, big=2))
    zaya("reshard", steps.root, tmp_path / "one", "--iteration", 2)
    with safe_open(tmp_path / "one" / "iter_0000002" / "rank_00000.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors(big=2))


def test_prune(steps):
    with pytest.raises(CheckpointError, match="say what to keep"):
        zaya("prune", steps.root)
    assert "would go: 1; stays: 2, 3" in zaya("prune", steps.root, "--keep-last", 2, "--dry-run").output
    assert steps.iterations() == [1, 2, 3]
    assert "removed: 2; stays: 1, 3" in zaya("prune", steps.root, "--keep-best", 1).output
    assert steps.iterations() == [1, 3]


def test_bench(tmp_path):
    found = json.loads(zaya("bench", tmp_path, "--gigabytes", 0.03, "--json").output)
    assert all(found[key] > 0 for key in ("raw_write_gbps", "raw_read_gbps", "durable_gbps", "stall_gbps", "load_gbps"))
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_message(tmp_path):
    code = "from launch.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "ckpt", "ls", tmp_path / "no"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip() == f"zaya: {tmp_path / 'no'}: no such checkpoint folder"
