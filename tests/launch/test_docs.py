"""The runbook and the container page name commands, files, options and categories that exist."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.site import load_site
from launch.supervise.policy import REMEDY
from tests.launch.conftest import REPOSITORY

PAGES = {name: (REPOSITORY / f"docs/{name}.md").read_text() for name in ("runbook", "containers")}


@pytest.mark.parametrize("page", PAGES)
def test_commands_options_and_files_exist(page):
    text = PAGES[page]
    for command in set(re.findall(r"`zaya ([^`]*)`", text)):
        words = command.split()
        options = [word.split("=")[0] for word in words if word.startswith("--")]
        names = []
        for word in words:
            if not re.fullmatch(r"[a-z]+", word) or word == "site":
                break
            names.append(word)
        shown = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, command
        assert all(option in shown.output for option in options), command
    for path in re.findall(r"\b((?:slurm|tests|tools|configs)/[\w./-]+\w)", text):
        assert (REPOSITORY / path).exists(), path
    for target in re.findall(r"\]\(\.\./([^)]+)\)", text):
        assert (REPOSITORY / target).exists(), target


def test_every_category_has_its_row():
    rows = re.findall(r"^\| `([a-z ]+)` \|", PAGES["runbook"], re.M)
    assert set(rows) == set(REMEDY)


def test_events_that_the_runbook_names_are_emitted():
    source = "".join(path.read_text() for path in (REPOSITORY / "launch/supervise").glob("*.py"))
    for event in ("nodes_absent", "straggler", "resubmitted", "incident", "training"):
        assert event in PAGES["runbook"] and f'"{event}"' in source


def test_build_arguments_are_documented():
    arguments = set(re.findall(r"^ARG (\w+)", (REPOSITORY / "Dockerfile.rocm").read_text(), re.M))
    assert arguments - {"MAX_JOBS", "REVISION"} == set(re.findall(r"`([A-Z][A-Z_0-9]+)`(?:,| \|)", PAGES["containers"]))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "slurm/sites").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_site_example_loads(path):
    assert load_site(path).name.replace("_", "-") == path.stem.replace("_", "-")
