"""Events reach every sink; a bad sink is dropped; files survive a torn line."""

from __future__ import annotations

import io
import re
import threading
import time
import typing

import pytest
from rich.console import Console

from megatron_zaya.telemetry.console import PlainConsole, plain_line, step_line
from megatron_zaya.telemetry.curve import LossCurveSink
from megatron_zaya.telemetry.events import (
    Communication,
    Evaluated,
    Event,
    GradientNorms,
    Loaded,
    LossSpike,
    MemoryUsed,
    MoeHealth,
    PhaseStarted,
    Profiled,
    Restarted,
    RunEnded,
    RunStarted,
    Saved,
    SaveFailed,
    SinkTrouble,
    StepDone,
    StepSkipped,
)
from megatron_zaya.telemetry.jsonl import JsonlSink, read_events, steps_by_iteration
from megatron_zaya.telemetry.live import LiveConsole
from megatron_zaya.telemetry.stream import EventStream

NOW = 1.75e9
START = RunStarted(0, 40, 2, 2, 1000, 100)


def step(iteration: int, loss: float = 2.5) -> StepDone:
    return StepDone(
        iteration, 40, iteration * 8, iteration * 256, loss, 1.5, 3e-4, 8, 0.25, 1024.0, 0.1, 1.2, 0.1, 0.99, 0.98, 0
    )


EVENTS = [START, *(step(i, 5.0 - i / 20) for i in range(1, 41)), Evaluated(40, 3.2, 512, 0.1), Saved(40, "here", 1.0)]
EVENTS.append(RunEnded(40, "finished"))


def test_the_step_line_has_megatrons_fields():
    line = step_line(step(10))
    fields = dict(part.split(":", 1) for part in line.split("|")[1:-1])
    assert re.match(r" iteration +10/ +40 \|", line)
    names = ["consumed samples", "elapsed time per iteration (ms)", "learning rate", "lm loss", "grad norm"]
    assert all(any(key.strip() == name for key in fields) for name in names)
    assert float(fields[" lm loss"]) == 2.5


def test_the_plain_console_keeps_to_its_interval(capsys):
    console = PlainConsole(log_interval=10)
    for event in EVENTS:
        console.handle(event, NOW)
    lines = capsys.readouterr().out.splitlines()
    assert [int(m.group(1)) for m in (re.match(r" iteration +(\d+)/", x) for x in lines) if m] == [1, 10, 20, 30, 40]
    assert all("\x1b" not in line for line in lines)
    assert len(lines) == 5 + 4


@pytest.mark.parametrize("width", [80, 160])
def test_the_live_console_fits_the_terminal(width):
    out = io.StringIO()
    console = LiveConsole(Console(file=out, force_terminal=True, width=width, height=24))
    console.open()
    for event in EVENTS:
        console.handle(event, NOW)
    page = Console(file=io.StringIO(), width=width)
    page.print(console.view())
    console.close()
    bar, learning, experts = page.file.getvalue().splitlines()
    assert "40/40" in bar
    assert "100%" in bar
    assert "loss 3.0000" in learning
    assert "1,024 tokens/s" in learning
    assert experts.rstrip().endswith("checkpoint 40")
    assert len(bar) == width
    assert "validation loss at iteration 40" in out.getvalue()


def test_a_message_of_many_lines_stays_one_line_without_control_characters():
    assert plain_line(SaveFailed(3, "disk\nfull\x1b[31m!")).isprintable()


ONE_OF_EACH = [
    START,
    PhaseStarted("long", 2, 3, 100, 2**20),
    Loaded(50, "here", 1.5, 10**9, 1),
    Restarted(50, 2, ["network", "requeue"]),
    step(51),
    MoeHealth(51, [[1.5, 0.5, 1.0], [3.0, 0.0, 0.0]], [0.5, 2.0], [0.95, 0.0], [0, 2], [0.1, 0.2]),
    MemoryUsed(51, 2**36, 2**37, 2**32),
    Communication(51, 0.001, 0.02, 0.2, 0.3, 5),
    StepSkipped(52, float("nan"), float("inf"), 1, 1),
    LossSpike(53, 9.0, 7.5),
    GradientNorms(54, {"router": 1.0, "experts": 0.5}),
    *EVENTS[-3:-1],
    SaveFailed(60, "disk full"),
    Profiled(60, 58, "profile", 0.3, 0.01),
    SinkTrouble("JsonlSink", "failed and is left out: OSError: disk full", 3),
    RunEnded(60, "SIGTERM"),
]


def test_the_examples_are_complete():
    assert {type(event) for event in ONE_OF_EACH} == set(typing.get_args(Event))


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: type(event).__name__)
def test_every_event_is_one_line_and_one_record(event, tmp_path):
    assert plain_line(event).isprintable()
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.open()
    sink.handle(event, NOW)
    sink.close()
    (record,) = read_events(tmp_path / "m.jsonl")
    assert (record.pop("event"), record.pop("time")) == (type(event).__name__, NOW)
    assert repr(type(event)(**record)) == repr(event)  # their text, because NaN differs from itself


def test_metrics_append_and_the_later_life_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for losses in ({1: 5.0, 2: 4.0, 3: 9.0}, {3: 3.0}):
        sink = JsonlSink(path)
        sink.open()
        for iteration, loss in losses.items():
            sink.handle(step(iteration, loss), NOW)
        sink.close()
    with path.open("a") as file:
        file.write('{"event": "StepDone", "iterat')
    assert {i: s["loss"] for i, s in steps_by_iteration(path).items()} == {1: 5.0, 2: 4.0, 3: 3.0}
    assert len(read_events(path)) == 4


def test_the_loss_curve_is_a_picture(tmp_path):
    stream = EventStream([JsonlSink(tmp_path / "m.jsonl"), LossCurveSink(tmp_path / "m.jsonl", tmp_path / "c.png")])
    for event in EVENTS:
        stream.emit(event)
    stream.close(timeout_s=300)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_sink_is_dropped_and_the_others_go_on(tmp_path, caplog):
    class Broken:
        calls = 0

        def open(self):
            pass

        def handle(self, event, when):
            self.calls += 1
            raise OSError("disk full")

        def close(self):
            raise AssertionError("dropped sinks are not closed")

    broken = Broken()
    stream = EventStream([broken, JsonlSink(tmp_path / "m.jsonl")])
    for event in EVENTS[:5]:
        stream.emit(event)
        while not stream.runners[0].failed:
            time.sleep(0.001)
    stream.close()
    assert broken.calls == 1
    assert "disk full" in caplog.text
    records = read_events(tmp_path / "m.jsonl")
    (trouble,) = [r for r in records if r["event"] == "SinkTrouble"]
    assert (trouble["sink"], len(records)) == ("Broken", 6)


def test_a_blocked_sink_misses_events_and_holds_nobody_up(tmp_path, caplog):
    class Blocked:
        free = threading.Event()
        taken = 0

        def open(self):
            pass

        def handle(self, event, when):
            self.free.wait()
            self.taken += 1

        def close(self):
            pass

    blocked = Blocked()
    stream = EventStream([blocked, JsonlSink(tmp_path / "m.jsonl")], capacity=10)
    for event in EVENTS:
        stream.emit(event)
        while stream.runners[1].backlog:
            time.sleep(0.001)
    assert stream.runners[0].missed in (len(EVENTS) - 10, len(EVENTS) - 9)  # one is in its hands, if it was quick
    _, healthy = stream.runners
    stream.close(timeout_s=0.2)
    assert "Blocked did not come to its end" in caplog.text
    healthy.join(time.monotonic() + 120)
    assert len(steps_by_iteration(tmp_path / "m.jsonl")) == 40
    troubles = read_events(tmp_path / "m.jsonl", "SinkTrouble")
    assert troubles[0]["missed"] == 1
    assert troubles[-1]["missed"] >= len(EVENTS) - 10
    blocked.free.set()
