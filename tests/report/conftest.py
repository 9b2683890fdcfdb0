"""Run folders written by the real sinks and the real supervisor's log, without training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.supervise.record import EventLog
from megatron_zaya.config import dump_config, load_config
from megatron_zaya.telemetry.events import (
    Communication,
    Evaluated,
    MemoryUsed,
    MoeHealth,
    PhaseStarted,
    RunEnded,
    RunStarted,
    Saved,
    StepDone,
)  # fmt: skip
from megatron_zaya.telemetry.jsonl import JsonlSink

REPOSITORY = Path(__file__).parents[2]
START = 1_800_000_000.0
LAYERS, EXPERTS, TOKENS = 3, 4, 256


def step(iteration: int, of: int = 40, loss: float | None = None) -> StepDone:
    loss = 2 + 3 * math.exp(-iteration / 10) if loss is None else loss
    return StepDone(
        iteration, of, iteration * 8, iteration * TOKENS, loss, 1.5, 3e-4, 8, 0.25, TOKENS / 0.25, 0.1, 1.2, 0.1, 0.99,
        0.98, 0, 1.5, 0.4,
    )  # fmt: skip


class Writer:
    """Writes a run as its rank 0 would: one event a second."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.now = folder, START
        tree = load_config(REPOSITORY / "configs/smoke_cpu.yaml", [f"run.name={folder.name}"])
        (folder / "config.yaml").write_text(dump_config(tree))

    def say(self, *events) -> None:
        sink = JsonlSink(self.folder / "metrics.jsonl")
        sink.open()
        for event in events:
            self.now += 1.0
            sink.handle(event, self.now)
        sink.close()

    def life(self, first: int, last: int, of: int = 40, reason: str = "") -> None:
        """Train from iteration ``first`` to ``last``, with what belongs to it."""
        self.say(RunStarted(first, of, 2, 2, 1000, 100, f"here iteration {first}" if first else None))
        for iteration in range(first + 1, last + 1):
            self.say(step(iteration, of))
            if iteration % 5 == 0:
                busy = 1.0 + iteration / of
                loads = [[busy, 2 - busy, 1.0, 1.0]] * LAYERS
                self.say(MoeHealth(iteration, loads, [busy - 1] * LAYERS, [0.9] * LAYERS, [0] * LAYERS, [0.1] * LAYERS))
                self.say(MemoryUsed(iteration, 0, 0, 600 << 20), Communication(iteration, 0.001, 0.01, 0.2, 0.22, 1))
            if iteration % 10 == 0:
                self.say(Evaluated(iteration, 3 - iteration / of, 512, 0.1), Saved(iteration, "here", 0.5, 0.01))
        if reason:
            self.say(RunEnded(last, reason))


@pytest.fixture
def finished(tmp_path) -> Path:
    """A run of 40 iterations that failed after 25 and went on from 20."""
    writer = Writer(tmp_path / "finished")
    log = EventLog(writer.folder / "launch" / "events.jsonl", lambda text: None)
    log.emit("attempt_started", attempt=0, hosts=["h0"])
    writer.life(0, 25)
    incident = dict(number=1, category="user code", rank=1, host="h0", reason="a <b>wrong</b> shape", iteration=25)
    log.emit("incident", **incident, decision="start again")
    writer.life(20, 40, reason="finished")
    folder = writer.folder / "launch" / "incidents"
    folder.mkdir()
    (folder / "0001.md").write_text("# Incident 1\n\nthe <script> of it")
    records = [json.loads(line) for line in (writer.folder / "launch/events.jsonl").read_text().splitlines()]
    for record, time in zip(records, (START, START + 50), strict=True):
        record["time"] = time
    (writer.folder / "launch/events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return writer.folder


@pytest.fixture
def phased(tmp_path) -> Path:
    """A run with two phases: 20 iterations, and 10 of another 20."""
    for number, name, last, reason in ((1, "base", 20, "finished"), (2, "long", 10, "")):
        writer = Writer(tmp_path / "phased" / f"{number}_{name}")
        writer.now += 100.0 * number
        writer.say(PhaseStarted(name, number, 2, 20, 20 * TOKENS))
        writer.life(0, last, of=20, reason=reason)
    return tmp_path / "phased"


@pytest.fixture
def writer(tmp_path) -> Callable[[str], Writer]:
    return lambda name: Writer(tmp_path / name)
