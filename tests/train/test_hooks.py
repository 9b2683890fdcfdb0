"""What a supervisor needs of a rank: switch files, signs of life, faults on purpose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_zaya.config import ConfigError, load_config
from megatron_zaya.config.drill import Drill, parse_drills
from megatron_zaya.telemetry.heartbeat import Heartbeat, read_heartbeat
from megatron_zaya.telemetry.jsonl import read_events
from tests.ranks import run_ranks


def run_with_switches(run_file: Path, beats: Path) -> tuple[str, dict]:
    """Run on each rank: train with both switch files there from the start, the loader of rank 1 late."""
    rank = os.environ["RANK"]
    os.environ |= {"ZAYA_HEARTBEAT_FILE": str(beats / rank), "ZAYA_DRILL": "slow:rank=1,iteration=1,seconds=0.2"}
    from launch.env import read_rank_env
    from megatron_zaya.train.loop import train
    from megatron_zaya.train.setup import build_callbacks, build_job, distributed_world

    env, config = read_rank_env(), load_config(run_file)
    with distributed_world(config, env) as device:
        job = build_job(config, env, device)
        reason = train(job, build_callbacks(config, env))
        job.events.close()
    return reason, read_heartbeat(env.supervision.heartbeat_file)


def test_switch_files_save_and_stop_and_ranks_say_how_long_they_computed(run_file, tmp_path):
    run_dir = load_config(run_file).run_dir
    run_dir.mkdir(parents=True)
    (run_dir / "SAVE").touch()
    (run_dir / "STOP").touch()
    (tmp_path / "beats").mkdir()
    (reason, quick), (other, slow) = run_ranks(run_with_switches, 2, run_file, tmp_path / "beats")
    assert (reason, other) == ("SIGTERM", "SIGTERM"), "agreed on after the step that followed"
    assert read_events(run_dir / "metrics.jsonl", "RunEnded")[-1]["iteration"] == 2
    assert [saved["iteration"] for saved in read_events(run_dir / "metrics.jsonl", "Saved")] == [2]
    assert not (run_dir / "SAVE").exists() and not (run_dir / "STOP").exists()
    assert (quick["phase"], quick["reason"], quick["iteration"]) == ("ended", "stopped", 2)
    assert slow["busy_s"] - quick["busy_s"] > 0.2, "both took equally long, one of them by waiting"
    assert list(quick["since"]) == ["first step", "step", "save", "ended"]


def test_a_heartbeat_is_whole_or_the_one_before(tmp_path):
    path = tmp_path / "beat"
    assert read_heartbeat(path) == {}
    beat = Heartbeat(path)
    beat.beat("imports")
    beat.beat("step", 3, busy_s=0.5)
    record = read_heartbeat(path)
    assert (record["phase"], record["iteration"], record["busy_s"]) == ("step", 3, 0.5)
    path.write_text("{")
    assert read_heartbeat(path) == {}
    Heartbeat(None).beat("step", 1)


def test_drills_are_read_strictly():
    assert parse_drills("hang:rank=1,iteration=3; slow:rank=0,iteration=2,seconds=1.5,attempt=2") == [
        Drill("hang", 1, 3),
        Drill("slow", 0, 2, 2, 1.5),
    ]
    assert parse_drills("") == []
    for wrong in ("melt:rank=1,iteration=1", "crash:rank=1", "crash:rank=one,iteration=1", "crash", "crash:when=3"):
        with pytest.raises(ConfigError, match="write crash:rank=1,iteration=3"):
            parse_drills(wrong)
