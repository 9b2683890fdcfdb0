"""`zaya profile` on two real ranks: trace, parts, communication, the plan beside it; its arithmetic by brute force."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_zaya.config import ConfigError, load_config
from megatron_zaya.telemetry.jsonl import read_events
from megatron_zaya.telemetry.profile import PLANNED, Overlap, Summary, beside_plan, common, length, merged, read_summary
from tests.train.conftest import TINY_MODEL, text_prefix  # noqa: F401

MOMENTS = st.integers(0, 30)
SPANS = st.lists(st.tuples(MOMENTS, MOMENTS).map(lambda pair: (min(pair), max(pair))), max_size=8)
WARMUP, STEPS = 2, 2


def seconds_in(spans) -> set[int]:
    return {second for start, end in spans for second in range(start, end)}


@given(SPANS, SPANS)
def test_spans_are_sets_of_moments(one, other):
    a, b = merged(one), merged(other)
    assert length(a) == len(seconds_in(one))
    assert all(left[1] < right[0] for left, right in itertools.pairwise(a))
    assert common(a, b) == common(b, a) == len(seconds_in(one) & seconds_in(other))


def test_both_columns_add_up_to_the_step():
    parts = {"attention": {"forward": 0.1, "backward": 0.2}, "head": {"forward": 0.05, "backward": 0.05}}
    summary = Summary(0, 3, 2, "CPU", 0.5, parts, Overlap(0.1, 0.04))
    planned = {"attention": 2.0, "convolutions": 1.0, "head": 0.5, "pipeline bubbles and transfers": 0.25}
    rows = {row.part: row for row in beside_plan(summary, planned)}
    assert set(rows) == {"attention", "head", "rest"}
    assert (rows["attention"].measured_s, rows["attention"].planned_s) == pytest.approx((0.3, 3.0))
    assert (rows["rest"].measured_s, rows["rest"].planned_s) == pytest.approx((0.1, 0.25))
    assert sum(row.measured_share for row in rows.values()) == pytest.approx(1)
    assert sum(row.planned_share for row in rows.values()) == pytest.approx(1)
    assert summary.overlap.exposed_s == pytest.approx(0.06)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, text_prefix):  # noqa: F811
    """(folder, what the command printed) of a profile of both ranks."""
    folder = tmp_path_factory.mktemp("profiled")
    tree = {
        "run": {"name": "tiny", "dir": str(folder / "{name}"), "precision": "fp32"},
        "model": TINY_MODEL,
        "schedule": dict(train_iters=1000, global_batch_size=4, micro_batch_size=2, lr_warmup_iters=10),
        "data": {"data_path": [str(text_prefix)], "seq_length": 32},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    options = ["--nproc", "2", "--rank", "0", "--rank", "1", "--warmup", str(WARMUP), "--steps", str(STEPS)]
    command = [sys.executable, "-c", "from launch.cli import main; main()", "profile", str(folder / "run.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "tiny-profile", done.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_every_chosen_rank_writes_a_trace_with_the_parts_of_the_model(profiled, rank):
    with gzip.open(profiled[0] / f"profile/rank-{rank:05d}.trace.json.gz", "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    microbatches = 1
    layers = TINY_MODEL["num_layers"]
    for part in ("attention", "core attention", "router", "experts"):
        assert names.count(f"zaya: {part}") == STEPS * microbatches * layers, part
    assert names.count("zaya: head") == STEPS * microbatches
    assert names.count("zaya: optimizer") == STEPS


def test_the_parts_have_forward_and_backward_passes_and_fit_into_the_step(profiled):
    summary = read_summary(profiled[0] / "profile/rank-00000.json")
    assert (summary.first_iteration, summary.steps, summary.device) == (WARMUP + 1, STEPS, "CPU")
    for part in ("attention", "core attention", "router", "experts", "head", "norms and residuals"):
        passes = summary.parts[part]
        assert passes["forward"] > 0, part
        assert passes["backward"] > 0, part
    assert set(summary.parts) <= set(PLANNED)
    assert 0 < sum(sum(passes.values()) for passes in summary.parts.values()) <= summary.step_s
    assert summary.overlap.communication_s > 0
    assert 0 <= summary.overlap.hidden_s <= summary.overlap.communication_s
    assert min(summary.memory_bytes[name] for name in ("parameters", "gradients", "optimizer state")) > 0


def test_the_command_lays_the_plan_beside_it_and_leaves_no_checkpoint(profiled):
    folder, printed = profiled
    for expected in (
        "rank 0, 2 steps",
        "rank 1, 2 steps",
        "core attention",
        "compare shares",
        "exposed",
        "planned peak",
    ):
        assert expected in printed
    assert not (folder / "checkpoints").exists()
    (event,) = read_events(folder / "metrics.jsonl", "Profiled")
    assert (event["first_iteration"], event["iteration"]) == (WARMUP + 1, WARMUP + STEPS)


def test_a_window_that_ends_before_it_begins_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("profile: {profile_step_start: 5, profile_step_end: 5}\n")
    with pytest.raises(ConfigError, match="profile_step_end=5 must be above profile_step_start=5"):
        load_config(path)
