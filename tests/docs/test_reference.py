"""The reference says what the code says."""

from __future__ import annotations

import re

import pytest

from megatron_zaya.config import RunConfig
from tools.reference import FOLDER, pages

MADE = pages()


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_a_page_of_the_reference_is_up_to_date(path):
    assert path.read_text() == MADE[path], "the code has changed: make reference"


def test_every_setting_and_command_is_there():
    config, commands = MADE[FOLDER / "config.md"], MADE[FOLDER / "cli.md"]
    for name, field in RunConfig.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            row = re.search(rf"^## {name}$.*?^\| `{key}` \|", config, re.M | re.S)
            assert row or f"\n## {name}.{key}\n" in config, f"{name}.{key}"
    for command in ("train", "submit", "plan search", "ckpt verify", "convert to-hf", "report", "top"):
        assert f"\n## zaya {command}\n" in commands
    assert "`--once`" in commands and "| `RUN` |" in commands
