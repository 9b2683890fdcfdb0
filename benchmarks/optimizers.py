"""Muon beside AdamW at equal steps: losses of the smoke task (a small ZAYA on Python's own source), one CPU rank.

    python benchmarks/optimizers.py [--steps 100] [--lr 1e-3 3e-3 1e-2] [--optimizer adam muon] [--json] [OVERRIDE ...]

Model, data, order of samples, schedule shape and seed are those of configs/smoke_cpu.yaml, batches are 8 samples of 128
tokens (a quarter of the smoke run's, so that six runs take minutes), and further overrides may be given; all of it is
equal for all runs. Only the optimizer and its peak learning rate differ (the last one is a tenth of it). Muon's
learning rate is in AdamW's units (RMS matching). `train` is the mean of the last ten steps, `valid` the loss on
held-out text at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_zaya.data.prepare import prepare
from megatron_zaya.telemetry.jsonl import read_events

ROOT = Path(__file__).resolve().parents[1]


SMALLER = ("schedule.global_batch_size=8", "data.seq_length=128")


def train(optimizer: str, lr: float, steps: int, more: list[str], folder: Path) -> dict[str, Any]:
    run = folder / f"{optimizer}_{lr:g}"
    overrides = [
        f"run.dir={run}",
        f"data.data_path=[{folder}/text]",
        *SMALLER,
        *more,
        f"schedule.train_iters={steps}",
        f"schedule.eval_interval={steps}",
        f"optimizer.optimizer={optimizer}",
        f"optimizer.lr={lr}",
        f"optimizer.min_lr={lr / 10}",
        "telemetry.loss_curve=false",
        "checkpoint.save_interval=0",
        "checkpoint.save_at_end=false",
    ]
    command = [sys.executable, "-m", "megatron_zaya.pretrain", "configs/smoke_cpu.yaml", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    events = list(read_events(run / "metrics.jsonl"))
    losses = [event["loss"] for event in events if event["event"] == "StepDone"]
    (valid,) = (event["loss"] for event in events if event["event"] == "Evaluated")
    quarters = [round(losses[steps * part // 4 - 1], 4) for part in (1, 2, 3, 4)]
    train_loss = round(statistics.fmean(losses[-10:]), 4)
    return {"optimizer": optimizer, "lr": lr, "train": train_loss, "valid": round(valid, 4), "at_quarters": quarters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--optimizer", nargs="+", default=["adam", "muon"], choices=["adam", "muon"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", help="section.key=value, the same for all runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(["python-stdlib"], folder / "text")
        runs = [
            train(optimizer, lr, arguments.steps, arguments.overrides, folder)
            for optimizer in arguments.optimizer
            for lr in arguments.lr
        ]
    if arguments.json:
        print(json.dumps({"benchmark": "optimizers", "steps": arguments.steps, "runs": runs}))
        return
    for run in runs:
        print(f"{run['optimizer']:5} lr {run['lr']:<6g} train {run['train']:.4f}  valid {run['valid']:.4f}")


if __name__ == "__main__":
    main()
