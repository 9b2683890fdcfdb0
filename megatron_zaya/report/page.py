"""The report: one HTML file that needs nothing else, and every chart as a PNG beside it."""

from __future__ import annotations

import html
import os
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from megatron_zaya.report import canvas, charts, compare, facts
from megatron_zaya.report.charts import Chart
from megatron_zaya.report.errors import ReportError
from megatron_zaya.report.facts import Table
from megatron_zaya.report.run import Run, State, read_run, state_of

PAGE = "index.html"


@dataclass
class Section:
    """What a page says about one run, or about several of them together."""

    anchor: str
    title: str
    state: State | None = None
    tiles: list[facts.Tile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    blocks: list[tuple[str, list[Chart | Table]]] = field(default_factory=list)
    """Headings, and what stands below each."""
    incidents: dict[int, str] = field(default_factory=dict)


def write_report(folders: list[Path], out: Path, accelerator: str = "MI300X") -> Path:
    """Write the report of one run or several into the folder ``out``; return the path of the page.

    Raises:
        ReportError: a folder holds no run, ``out`` cannot be written, or matplotlib is missing.
        ConfigError: the accelerator is unknown.
    """
    runs = [read_run(folder) for folder in folders]
    _name_apart(runs)
    sections = [_comparison(runs)] if len(runs) > 1 else []
    sections += [_section(run, number, accelerator) for number, run in enumerate(runs, start=1)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = _draw_all(sections, out)
        page = _render(sections, pictures)
        partial = out / f"{PAGE}.partial"
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, out / PAGE)  # noqa: PTH105
    except OSError as error:
        raise ReportError(f"{out}: {error.strerror}; name another folder with --out") from None
    return out / PAGE


def _name_apart(runs: list[Run]) -> None:
    """Give runs with equal names their folder's parent too."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.folder.resolve().parts[-2:])


def _comparison(runs: list[Run]) -> Section:
    section = Section("comparison", "Comparison")
    tables = [compare.figures(runs), compare.differences(runs)]
    section.blocks = [("The runs", [table for table in tables if table]), ("Over tokens", [*compare.charts(runs)])]
    return section


def _section(run: Run, number: int, accelerator: str) -> Section:
    by_name = {chart.name: chart for chart in charts.draw(run)}
    section = Section(f"run-{number}", run.name, state_of(run), facts.tiles(run), list(run.problems))
    section.incidents = run.incidents

    def block(title: str, *content: Chart | Table | None) -> None:
        section.blocks.append((title, [item for item in content if item is not None]))

    block("Learning", by_name["loss"], facts.phases(run), by_name["gradients"])
    block("Speed", by_name["throughput"], by_name["waiting"], *_plan(run, section, accelerator))
    block("Experts", by_name["experts"], by_name["balance"])
    block("Memory", by_name["memory"])
    block("Progress, restarts, incidents", by_name["progress"], facts.attempts(run), facts.incidents(run),
          facts.notable(run))  # fmt: skip
    block("Checkpoints", by_name["checkpoints"], facts.saves(run))
    block("Setup", facts.setup(run))
    return section


def _plan(run: Run, section: Section, accelerator: str) -> list[Chart | Table]:
    """Return the plan beside the measurements: a table and the memory of every pipeline rank, for each part."""
    shown: list[Chart | Table] = []
    for number, planned in enumerate(facts.planned(run, accelerator)):
        section.problems += [problem for problem in planned.problems if problem not in section.problems]
        if planned.table is not None:
            shown += [planned.table, canvas.styled(_memory_chart, planned, number)]
    return shown


def _memory_chart(planned: facts.Planned, number: int) -> Chart:
    from megatron_zaya.plan.pictures import memory_bars

    memory, capacity = planned.candidate.memory, planned.capacity_bytes
    chart = Chart(f"plan-{number + 1}", f"Planned memory: {planned.part}", "")
    chart.figure = canvas.figure(height=3.2)
    axes = chart.figure.subplots()
    # A line far above the bars would flatten them.
    memory_bars(axes, memory.stages, capacity if memory.worst.total > capacity / 4 else None)
    axes.set_title("")
    axes.set_xlim(-0.5, max(len(memory.stages), 8) - 0.5)
    chart.text = (
        f"The planner predicts {memory.worst.total / facts.GIB:.2f} GiB with allowances on the fullest pipeline rank, "
        f"of {capacity / facts.GIB:.0f} GiB that an accelerator has"
    )
    if planned.measured_peak_bytes:
        measured = planned.measured_peak_bytes / facts.GIB
        axes.axhline(measured, color=canvas.INK, linewidth=1.5, label="measured peak")
        chart.text += f"; {measured:.2f} GiB were measured on the fullest rank"
    canvas.legend(axes)
    chart.text += "."
    return chart


def _draw_all(sections: list[Section], out: Path) -> dict[int, str]:
    """Write every figure as a PNG; return the SVG elements by the id of their chart."""
    drawn = {}
    for section in sections:
        for _, content in section.blocks:
            for item in content:
                if isinstance(item, Chart) and item.figure is not None:
                    name = item.name if len(sections) == 1 else f"{section.anchor}-{item.name}"
                    drawn[id(item)] = canvas.svg(item.figure, name, item.text)
                    item.figure.set_layout_engine("none")  # laid out once is enough
                    canvas.png(item.figure, out / f"{name}.png")
    return drawn


def _render(sections: list[Section], pictures: dict[int, str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["chart"] = lambda item: isinstance(item, Chart)
    environment.filters["slug"] = _slug
    return environment.get_template("report.html.j2").render(
        title=" · ".join(section.title for section in sections),
        sections=sections,
        picture=lambda chart: _markup(pictures, chart),
        written=facts.utc(time.time()),
        version=version("megatron-zaya"),
    )


def _markup(pictures: dict[int, str], chart: Chart) -> Any:
    from markupsafe import Markup

    return Markup(pictures.get(id(chart), ""))


def _slug(text: str) -> str:
    return html.escape("-".join("".join(c if c.isalnum() else " " for c in text.lower()).split()))
