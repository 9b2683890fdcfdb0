"""Sinks that raise, block or have no disk left, in a real training run: it computes the same, and waits for none.

A blocked sink stays blocked until training has ended: were the loop to wait for it, the test would never end.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megatron_zaya.config import load_config
from megatron_zaya.telemetry.jsonl import JsonlSink, read_events, steps_by_iteration
from megatron_zaya.telemetry.stream import EventStream
from tests.ranks import run_ranks
from tests.train.conftest import text_prefix  # noqa: F401
from tests.train.test_training import make_run_file

FAULTS = ("none", "raises", "raises at once", "blocks", "full disk")
STEPS = 10


class Faulty:
    """Fails in the way that it is called."""

    def __init__(self, fault: str) -> None:
        self.fault, self.training_ended = fault, threading.Event()

    def open(self) -> None:
        if self.fault == "raises at once":
            raise RuntimeError("cannot open")

    def handle(self, event, when) -> None:
        if self.fault == "raises":
            raise RuntimeError("cannot handle")
        if self.fault == "blocks":
            self.training_ended.wait()

    def close(self) -> None:
        pass


def train_with_each_fault(path: Path) -> dict[str, tuple[list[tuple], list[dict], int]]:
    """Run on a rank: train once for each fault; return losses and norms, troubles, and missed events."""
    from launch.env import read_rank_env
    from megatron_zaya.parallel.groups import release_process_groups
    from megatron_zaya.train.loop import train
    from megatron_zaya.train.setup import build_callbacks, build_job, distributed_world

    env, results = read_rank_env(), {}
    with distributed_world(load_config(path), env) as device:
        for fault in FAULTS:
            config = load_config(path, [f"run.name={fault.replace(' ', '_')}", f"schedule.train_iters={STEPS}"])
            job = build_job(config, env, device)
            job.events.close()
            record = config.run_dir / "seen.jsonl"
            faulty = JsonlSink(Path("/dev/full")) if fault == "full disk" else Faulty(fault)
            job.events = EventStream([faulty, JsonlSink(record)], capacity=12)
            runner = job.events.runners[0]
            train(job, build_callbacks(config, env))
            missed = runner.missed
            if isinstance(faulty, Faulty):
                faulty.training_ended.set()
            job.events.close()
            release_process_groups()
            steps = steps_by_iteration(record)
            figures = [(steps[i]["loss"], steps[i]["grad_norm"]) for i in sorted(steps)]
            results[fault] = (figures, read_events(record, "SinkTrouble"), missed)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory, text_prefix):  # noqa: F811
    path = make_run_file(tmp_path_factory.mktemp("faults"), text_prefix)
    return run_ranks(train_with_each_fault, 1, path)[0]


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_the_loss_curve_is_untouched(results, fault):
    losses = results[fault][0]
    assert len(losses) == STEPS
    assert losses == results["none"][0]


def test_a_healthy_run_has_no_trouble(results):
    assert results["none"][1:] == ([], 0)


@pytest.mark.parametrize(
    ("fault", "said"),
    [("raises", "RuntimeError: cannot handle"), ("raises at once", "cannot open"), ("full disk", "No space left")],
)
def test_a_sink_that_fails_is_named_once(results, fault, said):
    (trouble,) = results[fault][1]
    assert said in trouble["reason"]
    assert trouble["sink"] == ("JsonlSink" if fault == "full disk" else "Faulty")


def test_what_a_blocked_sink_misses_is_counted(results):
    _, troubles, missed = results["blocks"]
    assert missed > 0
    assert troubles[-1]["missed"] == missed
