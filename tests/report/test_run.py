"""What a run folder says: repeated steps, phases, damage, and how the run stands."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from launch.cli import main
from megatron_zaya.report.facts import planned, tiles
from megatron_zaya.report.records import KEPT, Metrics
from megatron_zaya.report.run import ago, read_run, refresh, state_of
from megatron_zaya.telemetry.events import MoeHealth
from megatron_zaya.telemetry.jsonl import JsonlSink
from tests.report.conftest import START, TOKENS, step


def test_where_a_run_was_repeated_the_later_step_counts(finished):
    run = read_run(finished)
    assert run.steps()["iteration"].tolist() == list(range(1, 41))
    assert len(run.all_steps()["iteration"]) == 45
    assert len(run.events("Saved")) == 4
    assert not run.problems


def test_a_file_is_followed(writer):
    one = writer("one")
    one.life(0, 3)
    metrics = Metrics(one.folder / "metrics.jsonl")
    assert metrics.poll() and not metrics.poll()
    one.say(step(4))
    assert metrics.poll()
    assert metrics.steps()["iteration"].tolist() == [1, 2, 3, 4]
    assert metrics.last["iteration"] == 4
    (one.folder / "metrics.jsonl").write_text("")
    one.say(step(1))
    metrics.poll()
    assert metrics.steps()["iteration"].tolist() == [1], "a file that became shorter is another run"


def test_lines_that_are_no_events_are_counted_and_left_out(writer):
    one = writer("one")
    one.life(0, 3)
    with (one.folder / "metrics.jsonl").open("ab") as file:
        file.write(
            b'[]\n{"loss": 1}\n\xff\xfe\n{"event": "StepDone", "time": 1}\nnull\n{"event": "Saved", "time": 1}\n'
        )
        file.write(b'{"event": "OfLater", "time": 1}\n{"event": "StepDone", "iter')
    run = read_run(one.folder)
    assert len(run.steps()["loss"]) == 3
    assert run.parts[0].metrics.damaged == 6 and run.parts[0].metrics.torn
    assert "6 lines are no events" in run.problems[0] and "incomplete" in run.problems[1]


def test_memory_of_a_long_run_stays_bounded(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.open()
    for iteration in range(5000):
        sink.handle(MoeHealth(iteration, [[1.0]], [0.0], [1.0], [0], [0.1]), START)
    sink.close()
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.poll()
    kept = [record["iteration"] for record in metrics.events("MoeHealth")]
    assert KEPT <= len(kept) < 2 * KEPT
    assert len(set(np.diff(kept))) == 1, "evenly spaced"


def test_phases_lie_one_after_the_other(phased):
    run = read_run(phased)
    assert [(part.name, part.first_iteration) for part in run.parts] == [("base", 0), ("long", 20)]
    steps = run.steps()
    assert steps["iteration"].tolist() == list(range(1, 31))
    assert steps["consumed_tokens"][-1] == 30 * TOKENS
    assert run.events("Saved")[-1]["iteration"] == 30
    assert state_of(run, now=START + 250).word == "running"


def test_a_phase_that_begins_is_seen(phased, writer):
    run = read_run(phased)
    third = writer("phased/3_more")
    third.life(0, 5, of=5, reason="finished")
    refresh(run)
    assert run.steps()["iteration"][-1] == 35
    assert [part.name for part in run.parts] == ["base", "long", "more"]


@pytest.mark.parametrize(
    ("reason", "after_s", "word"),
    [("finished", 1e6, "finished"), ("SIGTERM", 1e6, "stopped"), ("", 30, "running"), ("", 3600, "silent")],
)
def test_how_a_run_stands(writer, reason, after_s, word):
    one = writer("one")
    one.life(0, 3, reason=reason)
    assert state_of(read_run(one.folder), one.now + after_s).word == word


def test_a_run_that_was_given_up(finished):
    with (finished / "launch/events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "job_given_up", "time": START, "reason": "no progress"}) + "\n")
    state = state_of(read_run(finished))
    assert state.level == "bad" and "no progress" in state.sentence


def test_a_run_that_has_not_begun(writer):
    run = read_run(writer("one").folder)
    assert "has not started to train" in run.problems[0]
    assert state_of(run).word == "not started"
    assert tiles(run)[0].value == "0 of 100"


@pytest.mark.parametrize("command", ["report", "top"])
@pytest.mark.parametrize(("folder", "message"), [("absent", "no such folder"), (".", "holds no run")])
def test_what_is_no_run_is_refused_with_the_remedy(tmp_path, monkeypatch, capsys, command, folder, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["zaya", command, folder])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert (message in error and "run folder" in error) or "run.dir" in error


def test_the_plan_beside_what_was_measured(finished):
    (one,) = planned(read_run(finished), "MI300X")
    rows = {row[0]: row for row in one.table.rows}
    assert rows["time of a step"][2] == "250 ms"
    predicted = float(rows["time of a step"][1].split()[0])
    assert float(rows["time of a step"][3]) == pytest.approx(250 / predicted, rel=0.01)
    assert "on CPU" in one.problems[0]
    assert rows["memory at the peak of the fullest rank"][2] == "not measured"


def test_a_configuration_that_cannot_be_read_is_said(finished):
    (finished / "config.yaml").write_text("model: {no_such_key: 1}")
    run = read_run(finished)
    assert re.search("configuration of finished could not be read.*no_such_key", run.problems[0], re.S)
    assert "cannot be predicted" in planned(run, "MI300X")[0].problems[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.2 s"), (59, "59 s"), (61, "1 min 1 s"), (7300, "2 h 1 min"), (90000, "1 d 1 h")]
)
def test_lengths_of_time(seconds, text):
    assert ago(seconds) == text
