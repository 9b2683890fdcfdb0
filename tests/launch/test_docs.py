"""The runbook and the container page name events, categories and build arguments that exist."""

from __future__ import annotations

import re

import pytest

from launch.site import load_site
from launch.supervise.policy import REMEDY
from tests.launch.conftest import REPOSITORY

PAGES = {name: (REPOSITORY / f"docs/{name}.md").read_text() for name in ("runbook", "containers")}


def test_every_category_has_its_row():
    rows = re.findall(r"^\| `([a-z ]+)` \|", PAGES["runbook"], re.M)
    assert set(rows) == set(REMEDY)


def test_events_that_the_runbook_names_are_emitted():
    source = "".join(path.read_text() for path in (REPOSITORY / "launch/supervise").glob("*.py"))
    for event in ("nodes_absent", "straggler", "requeueing", "incident", "training"):
        assert event in PAGES["runbook"] and f'"{event}"' in source


def test_build_arguments_are_documented():
    arguments = set(re.findall(r"^ARG (\w+)", (REPOSITORY / "Dockerfile.rocm").read_text(), re.M))
    assert arguments - {"MAX_JOBS", "REVISION"} == set(re.findall(r"`([A-Z][A-Z_0-9]+)`(?:,| \|)", PAGES["containers"]))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "slurm/sites").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_site_example_loads(path):
    assert load_site(path).name.replace("_", "-") == path.stem.replace("_", "-")
