"""README and tutorial are true: their commands run, in order, in a fresh copy of the repository.

The README's run is then looked at as a person would: its report is opened in a real browser. Transcripts, the page and
its screenshot stay in artefacts/, or where ZAYA_ARTEFACTS says.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_zaya.report.run import read_run, state_of
from tests.browser import missing, open_page
from tests.docs.blocks import REPOSITORY, shell_blocks

PAGES = ("README.md", "docs/tutorial.md")
LONGEST_S = 600.0
"""For one block, on a machine that is busy with other things."""
CHARTS = {"loss", "gradients", "throughput", "waiting", "progress", "checkpoints", "experts", "balance", "memory",
          "plan-1"}  # fmt: skip


def copy_repository(folder: Path) -> None:
    """Copy what a clone would have: tracked files, and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert listed.returncode == 0, listed.stderr
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)


def run_block(text: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a block in a shell; return its status and what it said. Whatever it started ends with it."""
    shell = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said = shell.communicate(timeout=LONGEST_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGTERM)
        said = shell.communicate(timeout=60)[0] + f"\nended after {LONGEST_S:g} s"
    return shell.returncode, said


@pytest.fixture(scope="module")
def artefacts() -> Path:
    """Folder of what is kept for people."""
    folder = Path(os.environ.get("ZAYA_ARTEFACTS", REPOSITORY / "artefacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def walk(page: str, folder: Path, transcript: Path) -> None:
    """Run the blocks of a page in a copy of the repository."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),  # the copy's own code, not that of the editable install
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    with transcript.open("w", buffering=1) as file:
        for block in (block for block in shell_blocks(page) if not block.reason):
            file.write(f"\n==> {block.name}\n{block.text}\n")
            status, said = run_block(block.text, folder, environment)
            file.write(said)
            assert status == 0, f"{block.name} ended with {status}:\n{block.text}\n{said}"


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory, artefacts) -> Path:
    """The copy of the repository after every block of the README has run."""
    folder = tmp_path_factory.mktemp("clone")
    copy_repository(folder)
    walk("README.md", folder, artefacts / "readme.txt")
    return folder


@pytest.fixture(scope="module")
def after_tutorial(after_readme, artefacts) -> Path:
    """The same after the tutorial, which goes on from the README."""
    walk("docs/tutorial.md", after_readme, artefacts / "tutorial.txt")
    return after_readme


def test_every_block_that_is_not_run_says_why_and_what_covers_it():
    for page in PAGES:
        for block in shell_blocks(page):
            assert block.language == "sh", f"{block.name}: what is executed is marked sh"
            assert not block.reason or block.covered_by, block.name
            assert all((REPOSITORY / path).exists() for path in block.covered_by), block.name


def test_the_readme_does_what_it_says(after_readme):
    run = read_run(after_readme / "runs/first")
    assert state_of(run).word == "finished" and not run.problems
    assert run.steps()["iteration"].tolist() == list(range(1, 21))
    assert run.steps()["loss"][-1] < run.steps()["loss"][0]


def test_the_report_looks_right_in_a_browser(after_readme, artefacts, tmp_path):
    if missing():
        pytest.skip(missing())
    page = after_readme / "runs/first/report/index.html"
    with open_page(page, tmp_path) as shown:
        assert shown.errors == []
        assert shown.requests == [page.resolve().as_uri()], "a page that needs nothing but itself"
        drawn = shown.evaluate("""[...document.querySelectorAll('figure[data-chart]')].map(figure => {
            const picture = figure.querySelector('svg'), box = picture.getBoundingClientRect();
            const marks = picture.querySelectorAll('path, image, use').length;
            return [figure.dataset.chart, box.width, box.height, marks, picture.getAttribute('aria-label')];
        })""")
        assert {name for name, *_ in drawn} == CHARTS
        for name, width, height, marks, label in drawn:
            assert width > 800 and height > 150 and marks > 5 and len(label) > 20, name
        assert shown.evaluate("document.documentElement.scrollWidth") == 1200, "nothing sticks out"
        text = shown.evaluate("document.body.innerText")
        for words in ("finished", "20 of 20", "2 checkpoints", "0 incidents"):
            assert words in text, words
        shown.screenshot(artefacts / "report.png")
    assert (artefacts / "report.png").read_bytes().startswith(b"\x89PNG")
    shutil.copytree(page.parent, artefacts / "report", dirs_exist_ok=True)


@pytest.mark.soak  # five ranks are started, two of them to fail: a minute or more
def test_the_tutorial_does_what_it_says(after_tutorial):
    run = read_run(after_tutorial / "runs/tutorial")
    assert state_of(run).word == "finished"
    assert run.steps()["iteration"].tolist() == list(range(1, 41))
    (incident,) = run.supervised("incident")
    assert (incident["rank"], incident["iteration"]) == (1, 25)
    first, again, elsewhere = (start["iteration"] for start in run.events("RunStarted"))
    assert (first, elsewhere) == (0, 30) and again in (10, 20), "a save is safe some time after its iteration"
    assert [start["world_size"] for start in run.events("RunStarted")] == [2, 2, 1]
    assert run.steps()["loss"][-1] < 0.75 * run.steps()["loss"][0]
    assert (after_tutorial / "exported/config.json").exists()
