"""Every `zaya` command of every page exists, with the options that it is given; no page links into the void."""

from __future__ import annotations

import re
import shlex

import pytest
import typer

from launch.cli import app
from tests.docs.blocks import REPOSITORY, shell_blocks

PAGES = ["README.md", "CONTRIBUTING.md"] + [
    str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "docs").rglob("*.md"))
]
ROOT = typer.main.get_command(app)


def inline_commands(text: str) -> list[list[str]]:
    found = []
    for code in re.findall(r"(?<!`)`(zaya [^`]*)`(?!`)", text):
        try:
            found.append(shlex.split(code.replace("\n", " "), comments=True))
        except ValueError:
            continue
    return found


def problem(words: list[str]) -> str:
    """Return what is wrong with a command line, or nothing. Values are not looked at."""
    command, rest = ROOT, words[1:]
    while hasattr(command, "commands") and rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]):
        found = command.commands.get(rest[0])
        if found is None:
            return f"no command {rest[0]!r}"
        command, rest = found, rest[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        option = word.split("=")[0]
        if re.fullmatch(r"--?[a-z][\w-]*", option) and option not in known | {"--help"}:
            return f"no option {option!r}"
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist(page):
    written = [words for block in shell_blocks(page) for words in block.commands()]
    written += inline_commands((REPOSITORY / page).read_text())
    wrong = {" ".join(words): problem(words) for words in written if words[0] == "zaya" and problem(words)}
    assert not wrong


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    folder = (REPOSITORY / page).parent
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", (REPOSITORY / page).read_text()):
        assert (folder / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text = (REPOSITORY / page).read_text()
    named = re.findall(r"(?<![\w./-])((?:slurm|tests|tools|configs|benchmarks|monitoring)/[\w./-]*\w)", text)
    assert not [path for path in named if not (REPOSITORY / path).exists()]


def test_what_is_wrong_is_found():
    assert problem(["zaya", "train", "--nprocs", "2"]) == "no option '--nprocs'"
    assert problem(["zaya", "plan", "seek"]) == "no command 'seek'"
    assert not problem(["zaya", "plan", "search", "run.yaml", "--nodes", "2", "a.b=-1"])
