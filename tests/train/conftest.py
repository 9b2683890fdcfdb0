"""A small prepared text, and run files on it."""

from __future__ import annotations

import pytest
import yaml

from megatron_zaya.data.prepare import prepare

TINY_MODEL = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=16,
    num_moe_experts=3,
    moe_ffn_hidden_size=16,
    router_hidden_size=16,
    vocab_size=258,
    max_position_embeddings=64,
    rotary_base=10_000.0,
)


@pytest.fixture(scope="session")
def text_prefix(tmp_path_factory):
    """Prefix of a .bin/.idx pair with some of Python's own source."""
    prefix = tmp_path_factory.mktemp("text") / "text"
    prepare(["python-stdlib"], prefix, limit_documents=60, workers=1)
    return prefix


@pytest.fixture
def run_file(tmp_path, text_prefix):
    """Path of a tiny run file that writes below ``tmp_path``."""
    tree = {
        "run": {"name": "tiny", "dir": str(tmp_path / "runs" / "{name}"), "precision": "fp32"},
        "model": TINY_MODEL,
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3},
        "schedule": dict(train_iters=6, global_batch_size=8, micro_batch_size=2, lr_warmup_iters=1),
        "data": {"data_path": [str(text_prefix)], "seq_length": 32},
        "telemetry": {"loss_curve": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
