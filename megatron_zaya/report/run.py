"""A run folder as data: its parts (phases) and their metrics, what the supervisor wrote, what could not be read."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_zaya.config import ConfigError, RunConfig, load_config
from megatron_zaya.report.errors import ReportError
from megatron_zaya.report.records import Columns, Metrics, joined
from megatron_zaya.telemetry.jsonl import read_events

PHASE_FOLDER = re.compile(r"^(\d+)_(.+)$")
QUIET_S = 120.0
"""A run without news for so long, and for many steps, counts as silent."""


@dataclass
class Part:
    """A phase of a run, or all of a run without phases."""

    name: str
    folder: Path
    metrics: Metrics
    config: RunConfig | None = None
    first_iteration: int = 0
    """Iterations of the parts before: the steps of a phase count from 1."""
    first_token: int = 0

    @property
    def world_size(self) -> int:
        """Ranks of the newest start; 0 if none is known."""
        starts = self.metrics.events("RunStarted")
        return int(starts[-1].get("world_size", 0)) if starts else 0

    def on_accelerator(self) -> bool:
        """Whether a rank reported memory of an accelerator."""
        return any(record.get("device_peak_bytes") for record in self.metrics.events("MemoryUsed"))


@dataclass
class Run:
    """Everything that a run folder says."""

    name: str
    folder: Path
    parts: list[Part]
    launch: list[dict[str, Any]] = field(default_factory=list)
    """Events of the supervisor, oldest first; none where the run was started with `zaya train`."""
    incidents: dict[int, str] = field(default_factory=dict)
    """Reports of incidents by number, Markdown."""
    problems: list[str] = field(default_factory=list)
    """What is missing or damaged, in sentences."""

    def place(self) -> None:
        """Lay the parts one after the other on the axes of iterations and tokens."""
        iteration = token = 0
        for part in self.parts:
            part.first_iteration, part.first_token = iteration, token
            steps = part.metrics.steps()
            if len(steps["iteration"]):
                iteration += int(steps["iteration"][-1])
                token += int(np.nan_to_num(steps["consumed_tokens"][-1]))

    def steps(self) -> Columns:
        """Return the steps of all parts, `iteration` and `consumed_tokens` counted over the whole run."""
        return joined([_shifted(part, part.metrics.steps()) for part in self.parts])

    def all_steps(self) -> Columns:
        """Return every step that was done, in order, repeated ones too."""
        return joined([_shifted(part, part.metrics.all_steps()) for part in self.parts])

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind, `iteration` counted over the whole run."""
        return [
            record | {"iteration": record["iteration"] + part.first_iteration, "part": part.name}
            if isinstance(record.get("iteration"), int)
            else record
            for part in self.parts
            for record in part.metrics.events(kind)
        ]

    def supervised(self, kind: str) -> list[dict[str, Any]]:
        """Return the supervisor's events of one kind."""
        return [record for record in self.launch if record["event"] == kind]


def _shifted(part: Part, steps: Columns) -> Columns:
    return steps | {
        "iteration": steps["iteration"] + part.first_iteration,
        "train_iters": steps["train_iters"] + part.first_iteration,
        "consumed_tokens": steps["consumed_tokens"] + part.first_token,
    }


def read_run(folder: Path) -> Run:
    """Read a run folder. What is damaged or missing is said in `problems`.

    Raises:
        ReportError: there is no such folder, or nothing in it is of a run.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; give a run folder, such as runs/NAME")
    run = Run(folder.resolve().name, folder, _parts(folder))
    log = folder / "launch" / "events.jsonl"
    if not run.parts and not log.exists():
        raise ReportError(
            f"{folder}: holds no run: neither metrics.jsonl, config.yaml nor launch/events.jsonl; give a folder that "
            "`zaya train` or `zaya submit` wrote (run.dir in the run file)"
        )
    for part in run.parts:
        _read_part(part, run.problems)
    if run.parts and not run.all_steps()["iteration"].size:
        run.problems.append("No step has been recorded yet: the charts appear when the run has done some.")
    _read_launch(run, log)
    run.place()
    return run


def refresh(run: Run) -> None:
    """Read what was written since: steps, phases that began, the supervisor's events."""
    known = {part.folder for part in run.parts}
    for part in run.parts:
        part.metrics.poll()
    new = [part for part in _parts(run.folder) if part.folder not in known]
    for part in new:
        _read_part(part, run.problems)
    run.parts += new
    _read_launch(run, run.folder / "launch" / "events.jsonl")
    run.place()


def _parts(folder: Path) -> list[Part]:
    def made(path: Path, name: str) -> list[Part]:
        known = any((path / file).exists() for file in ("metrics.jsonl", "config.yaml"))
        return [Part(name, path, Metrics(path / "metrics.jsonl"))] if known else []

    found = [(PHASE_FOLDER.match(path.name), path) for path in folder.iterdir() if path.is_dir()]
    phases = sorted((int(match[1]), match[2], path) for match, path in found if match)
    return made(folder, folder.resolve().name) + [part for _, name, path in phases for part in made(path, name)]


def _read_part(part: Part, problems: list[str]) -> None:
    path = part.folder / "config.yaml"
    try:
        part.config = load_config(path)
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        problems.append(f"The configuration of {part.name} could not be read: {error}")
    if not part.metrics.path.exists():
        problems.append(f"{part.metrics.path} does not exist: {part.name} has not started to train.")
    part.metrics.poll()
    damaged, path = part.metrics.damaged, part.metrics.path
    if damaged:
        lines = "1 line is no event and is" if damaged == 1 else f"{damaged} lines are no events and are"
        problems.append(f"{path}: {lines} left out.")
    if part.metrics.torn:
        problems.append(f"{path}: the last line is incomplete (a kill while it was written, or the run is writing).")


def _read_launch(run: Run, log: Path) -> None:
    if log.exists():
        run.launch = [record for record in read_events(log) if isinstance(record.get("time"), int | float)]
    for path in sorted((run.folder / "launch" / "incidents").glob("*.md")):
        if path.stem.isdigit():
            run.incidents[int(path.stem)] = path.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class State:
    """How a run stands: one word, its level (good, busy, warning, bad), and a sentence."""

    word: str
    level: str
    sentence: str


def state_of(run: Run, now: float | None = None) -> State:
    """Say how a run stands, from the newest thing it said."""
    now = time.time() if now is None else now
    spoken = [part.metrics.last for part in run.parts if part.metrics.last]
    last = spoken[-1] if spoken else {}
    if run.launch and run.launch[-1]["event"] == "job_given_up":
        return State("given up", "bad", f"The supervisor gave up: {run.launch[-1].get('reason', 'no reason given')}.")
    if not last:
        return State("not started", "warning", "Nothing has been recorded yet.")
    if last["event"] == "RunEnded" and last.get("reason") == "finished":
        more = _phases_left(run)
        if not more:
            return State("finished", "good", "The run reached the end of its schedule.")
        return State("between phases", "busy", f"A phase is finished, {more} more to come.")
    if last["event"] == "RunEnded":
        return State("stopped", "warning", f"Stopped by {last.get('reason')}; the same command goes on.")
    silent = now - last.get("time", now)
    steps = run.parts[-1].metrics.steps()["step_time_s"]
    usual = float(np.nanmedian(steps)) if len(steps) else 0.0
    if silent > max(QUIET_S, 20 * usual):
        return State("silent", "bad", f"No news since {ago(silent)}: it was killed, hangs, or cannot write.")
    return State("running", "busy", f"Last news {ago(silent)} ago.")


def _phases_left(run: Run) -> int:
    phases = [record for part in run.parts for record in part.metrics.events("PhaseStarted")]
    return int(phases[-1]["phases"] - phases[-1]["number"]) if phases else 0


def ago(seconds: float) -> str:
    """Return a length of time in words of one or two units."""
    seconds = max(0.0, seconds)
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            whole, rest = divmod(seconds, length)
            return f"{whole:.0f} {unit} {rest // part:.0f} {smaller}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
