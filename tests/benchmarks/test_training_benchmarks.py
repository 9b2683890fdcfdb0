"""The benchmarks of Muon's exchange and of the loss run, print what their readers rely on, and keep their claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_muon_allocates_next_to_nothing_and_the_released_model_stays_within_five_percent():
    result = run("muon.py", "--ranks", "3", "--matrices", "48", "--width", "64", "--rounds", "1")
    figures = result["measured"]
    assert figures["ours"]["allocated_mib"] < 0.05 * figures["state_per_rank_mib"]
    assert figures["all_gather"]["allocated_mib"] > 0.2 * figures["state_per_rank_mib"]
    assert [row["data_parallel_size"] for row in result["zaya1_8b"]] == [8, 128, 1024]
    last = result["zaya1_8b"][-1]
    assert last["ours"]["share_of_optimizer_memory"] <= 0.05 < 0.98 < last["all_gather"]["share_of_optimizer_memory"]
    assert last["ours"]["most_ranks_a_matrix_spans"] > 3


def test_the_loss_in_blocks_needs_a_fraction_and_is_as_exact():
    result = run("loss.py", "--tokens", "64", "--hidden", "16", "--workspace-mib", "4", "--threads", "1")
    assert result["vocabulary"] == 262_272
    ours, whole = result["ways"]["blocks_4_mib"], result["ways"]["torch"]
    gradient_mib = 262_272 * 16 * 4 / 2**20
    assert ours["peak_mib"] < gradient_mib + 3 * 4 < whole["peak_mib"] / 3
    for what in ("loss", "x", "weight"):
        assert ours[f"{what}_error"] < max(1e-6, 2 * whole[f"{what}_error"])
