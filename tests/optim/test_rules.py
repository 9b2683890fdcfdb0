"""The table of optimizer rules names every parameter of the model, and sends it where the issue of the design says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_zaya.optim.rules import RULES, rule_for
from tests.model.small import our_model, run_config


@pytest.fixture(scope="module")
def parameters(pg_collection):
    model = our_model(run_config(share_embeddings_and_output_weights=False), pg_collection)
    return dict(model.named_global_parameters())


def test_matrices_of_hidden_spaces_go_to_muon_and_nothing_else(parameters):
    muon = {name.split(".", 2)[2] for name in parameters if rule_for(name, "muon").algorithm == "muon"}
    attention = {f"self_attention.{name}" for name in ("linear_q", "linear_k", "linear_v", "linear_proj.weight")}
    router = {f"mlp.router.{name}.weight" for name in ("linear_down", "linear_1", "linear_2", "linear_out")}
    assert muon == attention | router | {"mlp.experts.linear_fc1", "mlp.experts.linear_fc2"}
    assert all(p.ndim >= 2 for name, p in parameters.items() if rule_for(name, "muon").algorithm == "muon")


def test_vectors_are_not_decayed_and_the_rest_is(parameters):
    for name, parameter in parameters.items():
        assert rule_for(name, "muon").weight_decay == (parameter.ndim > 1), name


def test_adam_takes_everything_with_the_same_decay(parameters):
    for name in parameters:
        ours, muon = rule_for(name, "adam"), rule_for(name, "muon")
        assert ours.algorithm == "adamw" and ours.weight_decay == muon.weight_decay


def test_every_rule_is_needed(parameters):
    used = {rule_for(name, "muon") for name in parameters}
    assert used == set(RULES)


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(LookupError, match=r"layers.0.mystery.*rules.py"):
        rule_for("layers.0.mystery", "muon")


def test_the_table_has_every_parameter_once_and_counts_the_released_model():
    """8.84 B parameters; 48 expert matrices and 9 others in each of 40 layers."""
    script = "import sys; from launch.cli import main; main()"
    run_file = Path(__file__).resolve().parents[2] / "configs" / "zaya1_8b.yaml"
    command = [sys.executable, "-c", script, "optimizer", "table", str(run_file), "optimizer.optimizer=muon"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Muon: 8,289,167,360 elements in 2,280 matrices; AdamW: 551,321,424 elements" in done.stdout
    fc1 = next(line for line in done.stdout.splitlines() if "linear_fc1" in line)
    assert fc1.split()[:3] == ["40", "x", "layers.*.mlp.experts.linear_fc1"]
    assert "16 x 2 x 2048 x 2048" in fc1 and "40 x 32" in fc1 and "gate and up apart" in fc1
