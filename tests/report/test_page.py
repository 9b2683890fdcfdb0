"""The page of a run: every chart and table, nothing from outside, and clear words where something is missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from megatron_zaya.report import charts
from megatron_zaya.report.page import write_report
from megatron_zaya.report.run import read_run
from tests.report.conftest import TOKENS

CHARTS = {"loss", "gradients", "throughput", "waiting", "progress", "checkpoints", "experts", "balance", "memory",
          "plan-1"}  # fmt: skip


class Reader(HTMLParser):
    """Gathers what a page shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.charts, self.empty, self.labels, self.ids, self.sources = set(), set(), [], [], []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.text += " " if tag in ("td", "th") else ""
        self.charts |= {found["data-chart"]} if "data-chart" in found else set()
        self.empty |= {found["data-empty"]} if "data-empty" in found else set()
        self.labels += [found["aria-label"]] if tag == "svg" else []
        self.ids += [found["id"]] if "id" in found else []
        self.sources += [found[key] for key in ("src", "href", "xlink:href") if key in found]

    def handle_data(self, data):
        self.text += data


def read(path) -> Reader:
    return Reader(path.read_text())


def test_the_page_of_a_run(finished):
    page = write_report([finished], finished / "report")
    seen = read(page)
    assert seen.charts == CHARTS and not seen.empty
    assert {path.stem for path in page.parent.glob("*.png")} == CHARTS
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in page.parent.glob("*.png"))
    assert all(len(label) > 20 for label in seen.labels), "every picture says in words what it shows"
    assert len(seen.ids) == len(set(seen.ids)), "ids are unique"
    assert all(source.startswith(("#", "data:")) for source in seen.sources), "nothing comes from outside"
    for words in ("40 of 40", "Training loss fell from", "1 incident", "a <b>wrong</b> shape", "the <script> of it",
                  "5 steps done again", "on CPU", "rank 1 on h0", "here iteration 20"):  # fmt: skip
        assert words in seen.text, words


def test_runs_are_compared_and_phases_lie_one_after_the_other(finished, phased, tmp_path):
    page = write_report([finished, phased], tmp_path / "both")
    seen = read(page)
    assert {"compare-loss", "compare-tokens-per-s", "compare-held-out", "plan-1", "plan-2"} <= seen.charts
    assert {"run-1-loss.png", "run-2-loss.png", "comparison-compare-loss.png"} <= {
        p.name for p in page.parent.iterdir()
    }
    assert len(seen.ids) == len(set(seen.ids))
    assert "Settings that differ" in seen.text and "run.name" in seen.text
    assert "30 of 40" in seen.text and f"{30 * TOKENS / 1000:.3g}k tokens" in seen.text
    assert re.search(r"base\s+20 of 20", seen.text) and re.search(r"long\s+10 of 20", seen.text)


def test_a_run_that_has_not_begun_has_a_page_all_the_same(writer):
    folder = writer("new").folder
    page = write_report([folder], folder / "report")
    seen = read(page)
    assert not seen.charts and seen.empty >= {"loss", "experts", "checkpoints"}
    assert "not started" in seen.text and "has not started to train" in seen.text
    assert not list(page.parent.glob("*.png"))


def test_a_torn_and_damaged_run_without_its_configuration_has_a_page(finished):
    data = (finished / "metrics.jsonl").read_bytes()
    (finished / "metrics.jsonl").write_bytes(b"\x00garbage\n" + data[: len(data) // 3])
    (finished / "launch/events.jsonl").write_text('{"event": "incident"\n[1]\n')
    (finished / "config.yaml").unlink()
    seen = read(write_report([finished], finished / "report"))
    assert {"loss", "experts", "progress"} <= seen.charts
    assert "1 line is no event" in seen.text and "could not be read" in seen.text
    assert "the last line is incomplete" in seen.text


def test_one_step_is_enough_for_every_chart(writer):
    one = writer("one")
    one.life(0, 1)
    run = read_run(one.folder)
    assert {chart.name for chart in charts.draw(run) if chart.figure} >= {"loss", "throughput", "progress", "balance"}
