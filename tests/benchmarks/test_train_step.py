"""The training-step benchmark runs and prints what its readers rely on; timings are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.kv_channels=8",
    "model.moe_ffn_hidden_size=16",
    "model.layer_types=[full, sliding]",
)


def test_json_has_the_documented_fields():
    overrides = [part for override in TINY for part in ("--set", override)]
    size = ["--model", "small", "--rounds", "3", "--batch", "2", "--seq", "16", "--threads", "1", "--device", "cpu"]
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--json", *size, *overrides]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == "train_step"
    assert result["machine"].keys() == {
        "device",
        "cpu",
        "cores",
        "threads",
        "compiled_operations",
        "system",
    }
    assert result["versions"].keys() == {"torch", "megatron-core", "transformers"}
    figures = result["models"]["small"]
    assert figures["rounds"] == 3
    assert (figures["batch"], figures["seq"], figures["dtype"]) == (2, 16, "fp32")
    assert figures["loss"]["relative_difference"] < 1e-4
    for side in ("ours", "ours_not_compiled", "transformers", "transformers_same_allocator"):
        assert figures[side]["tokens_per_s"] > 0
        assert figures[side]["median_step_s"] > 0
        assert len(figures[side]["step_s_quartiles"]) == 2
    assert figures["transformers"]["experts"] in figures["transformers"]["experts_step_s"]
    for ratio in ("ratio", "ratio_same_allocator", "ratio_not_compiled"):
        low, high = figures[f"{ratio}_quartiles"]
        assert 0 < low <= figures[ratio] <= high
