"""`zaya top`: everything fits the terminal, wide or narrow, high or low."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from megatron_zaya.report.run import read_run
from megatron_zaya.report.top import frame, sparkline
from tests.report.conftest import START


def shown(run, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(frame(run, width, START + 60, height))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 50), (100, 30), (160, 24), (160, 50), (240, 60)])
def test_a_frame_fits(finished, phased, width, height):
    for folder in (finished, phased):
        lines = shown(read_run(folder), width, height)
        assert max(map(cell_len, lines)) <= width
        assert len(lines) <= height
        text = "\n".join(lines)
        for words in ("loss", "tokens/s", "step", "busiest", "checkpoint", "left" if folder == phased else "40/40"):
            assert words in text, words
        assert not any(line.rstrip().endswith("…") for line in lines)


def test_layers_are_shown_where_there_is_room(finished):
    text = "\n".join(shown(read_run(finished), 80, 50))
    assert "layer   0" in text and "layer   2" in text
    assert "incident: user code" in text


def test_a_run_that_has_not_begun(writer):
    text = "\n".join(shown(read_run(writer("new").folder), 80, 24))
    assert "not started" in text


def test_sparklines():
    assert sparkline(np.array([0.0, 1.0, 2.0]), 3) == "▁▄█"
    assert sparkline(np.arange(1000.0), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.ones(5), 3) == "▁▁▁"
    assert sparkline(np.array([np.nan]), 3) == ""
