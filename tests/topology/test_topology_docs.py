"""Every command of docs/topology.md runs as written, and its figures are today's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from topology.build import load_fabric
from topology.cli import app
from topology.cost import CostModel
from topology.fit import evaluate, load_calibration, mean_error
from topology.lint.rules import RULES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/topology.md").read_text()
COMMANDS = re.findall(r"^\$ zaya topology (.*)$", TEXT, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_documentation_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(re.findall(r"```yaml\n(.*?)```", TEXT, re.S)[0])
    for folder in ("configs", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output


def test_the_python_of_the_documentation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", TEXT, re.S)[0], "docs/topology.md", "exec"), names)
    assert names["first"] == (0, "zaya000", 0)
    assert names["variables"]["NCCL_PXN_DISABLE"] == "0"
    assert 0.005 < names["seconds"] < 0.02 and names["thresholds"]


def test_the_figures_of_the_documentation_hold() -> None:
    points = evaluate(CostModel.for_fabric(load_fabric(ROOT / "configs/clusters/mi300x_128x8_rails.yaml")),
                      load_calibration())  # fmt: skip
    used = [p for p in points if p.curve.use == "fit"]
    mean, worst = re.findall(r"([\d.]+) % mean, ([\d.]+) % at most", TEXT)[0]
    assert mean_error(used) * 100 == pytest.approx(float(mean), abs=0.02)
    assert max(abs(p.error) for p in used) * 100 == pytest.approx(float(worst), abs=0.1)


def test_every_lint_rule_is_documented() -> None:
    source = (ROOT / "topology/lint/rules.py").read_text()
    rules = set(re.findall(r'Issue\(\s*"([a-z-]+)"', source))
    assert len(rules) >= len(RULES)
    assert {rule for rule in rules if f"`{rule}`" not in TEXT} == set()
    assert rules == {path.stem for path in (ROOT / "tests/topology/nccl_logs").glob("*.log")} - {"healthy"}
