"""What telemetry costs a training step: all sinks on against none, and sinks that fail, block or have no disk left.

    python benchmarks/telemetry.py            a table
    python benchmarks/telemetry.py --json     one JSON object on standard output

A step is a fixed amount of matrix products that lasts about `--step-s` seconds, followed by the events of a ZAYA1-8B
step (40 layers of 16 experts, the reports of health with every tenth step, an evaluation and a checkpoint now and
then). All sinks: console, metrics.jsonl, loss curve, TensorBoard, Prometheus scraped by another process every 5 s
(monitoring/prometheus.yaml: 15 s).

How to read it. `emit_us` is processor time of the training thread for handing over a step's events; `sinks_us` is that
of all other threads of the process, which matters as far as they take the interpreter's lock or a core from training;
`cost` is their sum over the length of a step, an upper bound that does not depend on what else the machine does (limit:
0.5 %). Matplotlib and TensorBoard are imported in their own threads before the measurement (`start_s`, once per run).
`step_ratio` is what wall clocks say: median step with the sinks over median step without, the two alternating.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

from megatron_zaya.telemetry.console import PlainConsole
from megatron_zaya.telemetry.curve import LossCurveSink
from megatron_zaya.telemetry.events import (
    Communication,
    Evaluated,
    Event,
    MemoryUsed,
    MoeHealth,
    RunEnded,
    RunStarted,
    Saved,
    StepDone,
)
from megatron_zaya.telemetry.jsonl import JsonlSink
from megatron_zaya.telemetry.prometheus import PrometheusSink
from megatron_zaya.telemetry.stream import EventStream, Sink
from megatron_zaya.telemetry.trackers import TensorBoardSink

LAYERS, EXPERTS, HEALTH_INTERVAL, LIMIT = 40, 16, 10, 0.005
START = RunStarted(0, 10**6, 1024, 1024, 8_300_000_000, 700_000_000)
SCRAPER = """
import contextlib, sys, time, urllib.request
while True:
    time.sleep(5)
    with contextlib.suppress(OSError):
        urllib.request.urlopen(sys.argv[1]).read()
"""


def step_events(iteration: int, step_s: float) -> list[Event]:
    """Return what a run says about a step."""
    events: list[Event] = [
        StepDone(
            iteration, 10**6, iteration * 1024, iteration * 2**22, 2.0 + 1 / iteration, 0.4, 3e-4, 1024, step_s,
            2**22 / step_s, 0.06, 1.2, 0.1, 0.99, 0.95, 0, 250.0, 0.19,
        )
    ]  # fmt: skip
    if iteration % HEALTH_INTERVAL == 0:
        loads = [[1.0 + 0.01 * expert + 1e-3 * layer for expert in range(EXPERTS)] for layer in range(LAYERS)]
        by_layer = [0.123456789] * LAYERS
        events.append(MoeHealth(iteration, loads, by_layer, by_layer, [0] * LAYERS, by_layer))
        events.append(MemoryUsed(iteration, 2**37, 2**37, 2**35))
        events.append(Communication(iteration, 1e-3, 2e-2, 0.9 * step_s, step_s, 17))
    if iteration % (4 * HEALTH_INTERVAL) == 0:
        events += [Evaluated(iteration, 2.1, 10**6, 5.0), Saved(iteration, "checkpoints/step", 12.0, 0.2)]
    return events


class Faulty:
    """A sink that raises, or blocks for 30 seconds at each event."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def open(self) -> None:
        pass

    def handle(self, event: Event, when: float) -> None:
        if self.fault == "blocks":
            time.sleep(30.0)
        raise RuntimeError(self.fault)

    def close(self) -> None:
        pass


def all_sinks(folder: Path, port: int) -> list[Sink]:
    """Return every sink that needs no server."""
    metrics = folder / "metrics.jsonl"
    picture = LossCurveSink(metrics, folder / "loss_curve.png")
    sinks: list[Sink] = [PlainConsole(1), JsonlSink(metrics), picture, TensorBoardSink(folder / "tensorboard")]
    return [*sinks, PrometheusSink({"run": "bench", "job_id": "1"}, "127.0.0.1", port)]


class Work:
    """Matrix products that last about ``step_s``."""

    def __init__(self, step_s: float) -> None:
        self.a, self.count = torch.randn(256, 256), 50
        self.count = max(1, round(self.count * step_s / min(self.seconds() for _ in range(5))))

    def seconds(self) -> float:
        start = time.perf_counter()
        for _ in range(self.count):
            self.a @ self.a
        return time.perf_counter() - start


def measure(work: Work, stream: EventStream, steps: int, first: int) -> dict[str, list[float]]:
    """Do steps; return seconds of each: the whole, processor of this thread in emit, and of the other threads."""
    whole, emitting, others = [], [], []
    for iteration in range(first, first + steps):
        everyone, own, start = time.process_time(), time.thread_time(), time.perf_counter()
        work.seconds()
        before = time.thread_time()
        for event in step_events(iteration, 1.0):
            stream.emit(event)
        emitting.append(time.thread_time() - before)
        whole.append(time.perf_counter() - start)
        others.append(time.process_time() - everyone - (time.thread_time() - own))
    return {"whole": whole, "emit": emitting, "others": others}


def wait_until_idle(stream: EventStream) -> float:
    """Let the sinks work off what waits for them; return the seconds."""
    start = time.perf_counter()
    while any(runner.backlog for runner in stream.runners if not runner.failed):
        time.sleep(0.01)
    time.sleep(0.5)  # the last one is in somebody's hands
    return time.perf_counter() - start


def compare(work: Work, sinks: list[Sink], rounds: int, steps: int) -> dict[str, float]:
    """Alternate steps without and with ``sinks``."""
    stream, nobody = EventStream(sinks), EventStream()
    for event in (START, *step_events(40, 1.0), RunEnded(40, "warm")):
        stream.emit(event)
    started = wait_until_idle(stream) if not any(isinstance(sink, Faulty) for sink in sinks) else 0.0
    silent, loud = [], {"whole": [], "emit": [], "others": []}
    for number in range(rounds):
        silent += measure(work, nobody, steps, 1)["whole"]
        figures = measure(work, stream, steps, 41 + number * steps)
        for name, values in figures.items():
            loud[name] += values
    stream.close(timeout_s=1.0)
    step_s = statistics.median(silent)
    emit, others = statistics.fmean(loud["emit"]), statistics.fmean(loud["others"])
    return {
        "steps": rounds * steps,
        "step_s": step_s,
        "start_s": started,
        "emit_us": emit * 1e6,
        "sinks_us": others * 1e6,
        "cost": (emit + others) / step_s,
        "step_ratio": statistics.median(loud["whole"]) / step_s,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-s", type=float, default=1.0, help="length of a step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="of each side in a round")
    parser.add_argument("--port", type=int, default=19840)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    work, results = Work(options.step_s), {}
    with tempfile.TemporaryDirectory() as name, Path(os.devnull).open("w") as nowhere:
        folder = Path(name)
        scraper = subprocess.Popen(
            [sys.executable, "-c", SCRAPER, f"http://127.0.0.1:{options.port}/metrics"], stderr=subprocess.DEVNULL
        )
        with redirect_stdout(nowhere):
            results["all sinks"] = compare(work, all_sinks(folder, options.port), options.rounds, options.steps)
        scraper.kill()
        scraper.wait()
        short = Work(options.step_s / 10)
        for fault in ("raises", "blocks"):
            results[fault] = compare(short, [Faulty(fault)], options.rounds, options.steps)
        results["full disk"] = compare(short, [JsonlSink(Path("/dev/full"))], options.rounds, options.steps)
    passed = results["all sinks"]["cost"] < LIMIT
    if options.json:
        print(json.dumps({"benchmark": "telemetry", "limit": LIMIT, "within_limit": passed, "results": results}))
    else:
        for case, r in results.items():
            print(
                f"{case:10} step {r['step_s']:.3f} s: emit {r['emit_us']:.0f} us, sinks {r['sinks_us']:.0f} us, "
                f"cost {r['cost']:.3%}, step ratio {r['step_ratio']:.3f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
