"""`make smoke [LAYOUT=tp2]`: the whole system on a few CPU ranks, in minutes, judged by what it wrote.

    prepare real text -> train uninterrupted -> train again, kill every process after a checkpoint, resume -> compare

A layout is a product of parallel sizes: dp2 (when none is named), tp2, ep2, pp2, cp2, or several, as tp2xpp2.
Passes when the loss fell by 35 % and every step after the resume equals the uninterrupted run's, bit for bit.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_zaya.config import load_config
from megatron_zaya.telemetry.jsonl import read_events, steps_by_iteration

RUN_FILE = Path("configs/smoke_cpu.yaml")
DEFAULT_LAYOUT = "dp2"
LEAST_FALL = 0.35
KILL_AFTER_STEPS = 3


def zaya(*arguments: str) -> list[str]:
    """Return the command line of one `zaya` call in this environment."""
    return [sys.executable, "-c", "from launch.cli import main; main()", *arguments]


@dataclass(frozen=True)
class Layout:
    """How the run is spread over ranks."""

    name: str
    ranks: int
    overrides: tuple[str, ...]


def parse_layout(name: str) -> Layout:
    """Read "tp2xep2"; expert parallelism takes its ranks from the others, and from data parallelism what lacks."""
    sizes = dict.fromkeys(("tp", "pp", "cp", "ep", "dp"), 1)
    for part in name.split("x"):
        match = re.fullmatch(r"(tp|pp|cp|ep|dp)([1-9]\d*)", part)
        if match is None:
            raise SystemExit(f"smoke: {part!r} in LAYOUT={name} is no layout; tp2, pp2, cp2, ep2, dp2 or e.g. tp2xep2")
        sizes[match[1]] = int(match[2])
    tp, pp, cp, ep, dp = sizes.values()
    dp *= max(1, ep // (tp * cp * dp))
    fields = {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": str(tp > 1).lower(),
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
    }
    return Layout(name, tp * pp * cp * dp, tuple(f"parallel.{key}={value}" for key, value in fields.items()))


def train_command(run: str, layout: Layout) -> list[str]:
    """Return the command line of one training run."""
    return zaya("train", str(RUN_FILE), f"run.name={run}", *layout.overrides, "--nproc", str(layout.ranks))


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and all its descendants at once, as a power cut would."""
    root = psutil.Process(process.pid)
    victims = [*root.children(recursive=True), root]
    for victim in victims:
        victim.kill()
    psutil.wait_procs(victims, timeout=30)
    process.wait()


def run_and_kill(command: list[str], metrics: Path, after: int) -> int:
    """Start a run, kill it once it has done ``after`` iterations; return the last iteration it reported."""
    process = subprocess.Popen(command)
    while process.poll() is None:
        done = max(steps_by_iteration(metrics), default=0) if metrics.exists() else 0
        if done >= after and read_events(metrics, "Saved"):
            kill_tree(process)
            return max(steps_by_iteration(metrics))
        time.sleep(0.05)
    raise SystemExit(f"smoke: the run to be interrupted ended by itself with status {process.returncode}")


def say(text: str) -> None:
    """Print a line that is easy to find."""
    print(f"smoke: {text}", flush=True)


def main(arguments: list[str]) -> int:
    """Run everything in the layout that is named, if any; return the exit status."""
    start = time.monotonic()
    layout = parse_layout(arguments[0] if arguments else DEFAULT_LAYOUT)
    config = load_config(RUN_FILE)
    data = Path(config.data.data_path[0])
    if not data.with_suffix(".idx").exists():
        subprocess.run(zaya("data", "prepare", "python-stdlib", "--output", str(data)), check=True)

    name = "smoke" if layout.name == DEFAULT_LAYOUT else f"smoke_{layout.name}"
    interrupted = f"{name}_interrupted"
    whole, broken = (load_config(RUN_FILE, [f"run.name={run}"]).run_dir for run in (name, interrupted))
    for folder in (whole, broken):
        shutil.rmtree(folder, ignore_errors=True)
    say(f"1. an uninterrupted run, layout {layout.name} on {layout.ranks} ranks")
    subprocess.run(train_command(name, layout), check=True)
    say("2. the same run, killed after a checkpoint")
    saved = config.checkpoint.save_interval
    killed_at = run_and_kill(train_command(interrupted, layout), broken / "metrics.jsonl", saved + KILL_AFTER_STEPS)
    say(f"   every process killed after iteration {killed_at}; 3. the same command again")
    subprocess.run(train_command(interrupted, layout), check=True)

    steps = steps_by_iteration(whole / "metrics.jsonl")
    resumed = steps_by_iteration(broken / "metrics.jsonl")
    origin = read_events(broken / "metrics.jsonl", "RunStarted")[-1]["iteration"]
    first, last = steps[min(steps)]["loss"], steps[max(steps)]["loss"]
    fall = 1 - last / first
    compared = range(origin + 1, max(steps) + 1)
    differing = [i for i in compared if any(steps[i][k] != resumed[i][k] for k in ("loss", "grad_norm"))]
    picture = whole / "loss_curve.png"
    checks = {
        f"training loss {first:.4f} at iteration {min(steps)}, {last:.4f} at iteration {max(steps)}: "
        f"fell by {fall:.1%} (at least {LEAST_FALL:.0%} asked)": fall >= LEAST_FALL,
        f"resumed from iteration {origin}: loss at iteration {origin + 1} is {resumed[origin + 1]['loss']!r}, "
        f"uninterrupted {steps[origin + 1]['loss']!r}": resumed[origin + 1]["loss"] == steps[origin + 1]["loss"],
        f"iterations {compared.start} to {compared.stop - 1} equal the uninterrupted run's bit for bit "
        f"({len(differing)} differ)": not differing and origin == saved,
        f"run folder {whole}, loss curve {picture}": picture.is_file(),
    }
    for text, passed in checks.items():
        say(f"{'ok  ' if passed else 'FAIL'} {text}")
    say(f"{'passed' if all(checks.values()) else 'FAILED'} in {time.monotonic() - start:.0f} s")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
