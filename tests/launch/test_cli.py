"""The command line as its users meet it: real processes, real mistakes, real signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_zaya.telemetry.jsonl import read_events, steps_by_iteration
from tests.train.conftest import run_file, text_prefix  # noqa: F401 (fixtures)

ZAYA = [sys.executable, "-c", "from launch.cli import main; main()"]
REPOSITORY = Path(__file__).parents[2]


def zaya(*arguments, cwd=None, timeout=120) -> subprocess.CompletedProcess:
    return subprocess.run([*ZAYA, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=timeout)


def tree(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_layer=2"], "model.num_layer: unknown key; did you mean 'num_layers'?"),
        (["data.data_path=[{tmp}/absent]"], "absent.idx"),
        (["model.vocab_size=200"], "model.vocab_size=200 is smaller than the vocabulary of the tokenizer 'byte' (258)"),
        (["model.num_attention_heads=3", "model.num_query_groups=2"], "num_attention_heads=3 must be a multiple"),
        (["checkpoint.load={tmp}/nowhere"], "nowhere: no such checkpoint folder"),
        (["checkpoint.load={tmp}"], "holds no complete checkpoint step"),
        (["checkpoint.load_iteration=7"], "checkpoint.load"),
        (["data.tokenizer_model={tmp}/tokenizer"], "tokenizer"),
        (["data.seq_length=100"], "data.seq_length=100 is beyond model.max_position_embeddings=64"),
        (
            ["schedule.global_batch_size=7", "schedule.micro_batch_size=1"],
            "is not divided by micro_batch_size x data-parallel size=2",
        ),
        (["parallel.tensor_model_parallel_size=2"], "sequence_parallel must be true with"),
        (["parallel.context_parallel_size=3"], "is not divided by tensor x pipeline x context=3"),
    ],
)
def test_bad_input_is_one_message_in_seconds_and_writes_nothing(run_file, tmp_path, overrides, message):  # noqa: F811
    before = tree(tmp_path)
    start = time.monotonic()
    result = zaya("train", run_file, *[o.format(tmp=tmp_path) for o in overrides], "--nproc", 2, cwd=tmp_path)
    assert time.monotonic() - start < 10
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("zaya: ") == 1
    assert "Traceback" not in result.stderr + result.stdout
    assert tree(tmp_path) == before


def test_a_rank_by_itself_reports_the_same_way(run_file):  # noqa: F811
    command = [sys.executable, "-m", "megatron_zaya.pretrain", str(run_file), "run.sed=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("zaya: ")) == (2, 1)
    assert "did you mean 'seed'" in result.stderr


def test_a_run_file_that_is_not_there(tmp_path):
    result = zaya("train", tmp_path / "none.yaml")
    assert result.returncode == 2
    assert "no such run file" in result.stderr


def test_sigterm_saves_and_the_same_command_resumes(run_file, tmp_path):  # noqa: F811
    arguments = ["train", str(run_file), "schedule.train_iters=2000", "telemetry.loss_curve=true", "--nproc", "2"]
    process = subprocess.Popen([*ZAYA, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(" iteration        5/"):
            process.send_signal(signal.SIGTERM)
            break
    lines += process.communicate(timeout=60)[0].splitlines(keepends=True)
    text = "".join(lines)
    assert "training ended after iteration" in text, text
    assert "SIGTERM" in text
    assert "Traceback" not in text
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    stopped = read_events(metrics, "RunEnded")[-1]
    assert stopped["reason"] == "SIGTERM"
    saved = read_events(metrics, "Saved")[-1]["iteration"]
    assert saved == stopped["iteration"] >= 5

    again = zaya(*arguments[:2], f"schedule.train_iters={saved + 2}", "schedule.lr_decay_iters=2000", "--nproc", 2)
    assert again.returncode in (0, 2), again.stderr
    if again.returncode == 0:
        assert max(steps_by_iteration(metrics)) == saved + 2
    else:  # another length of the run may be another order of samples: then that is said
        assert "another order of samples" in again.stderr
    assert (metrics.parent / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_doctor_names_every_capability():
    result = zaya("doctor")
    assert result.returncode == 0
    for name in ("accelerator", "TransformerEngine", "apex", "grouped product", "megatron-core"):
        assert name in result.stdout


def test_config_schema_and_show(run_file):  # noqa: F811
    schema = json.loads(zaya("config", "schema").stdout)
    assert "num_query_groups" in schema["$defs"]["ModelConfig"]["properties"]
    shown = zaya("config", "show", run_file, "run.seed=9").stdout
    assert "seed: 9" in shown
    assert "adam_beta2: 0.95" in shown


def test_data_prepare(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 20)
    result = zaya("data", "prepare", text, "-o", tmp_path / "out" / "text")
    assert result.returncode == 0, result.stderr
    assert "1 documents" in result.stdout.replace("document,", "documents,")
    assert {p.suffix for p in (tmp_path / "out").iterdir()} >= {".bin", ".idx", ".json"}
    again = zaya("data", "prepare", text, "-o", tmp_path / "out" / "text")
    assert again.returncode == 2
    assert "overwrite" in again.stderr
