"""A model small enough to run for real, with every part of a ZAYA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_zaya.config import RunConfig, load_config

SMALL: dict[str, dict[str, Any]] = {
    "run": {"name": "small", "precision": "bf16"},
    "model": {
        "num_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 32,
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 256,
        "router_hidden_size": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 1024,
        "rotary_base": 10000.0,
    },
    "schedule": {"train_iters": 10, "global_batch_size": 4, "micro_batch_size": 1},
    "data": {"seq_length": 512},
}
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
CP2 = ["parallel.context_parallel_size=2", "schedule.global_batch_size=1"]
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {
    # name: (world size, rank, overrides)
    "one rank": (1, 0, ["schedule.global_batch_size=2"]),
    "everything again": (1, 0, ["schedule.global_batch_size=1", "parallel.recompute_granularity=full"]),
    "tensor and expert": (8, 3, [*TP2, "parallel.expert_model_parallel_size=4"]),
    "context, ring": (2, 1, [*CP2, "parallel.cp_comm_type=p2p"]),
    "pipeline, last stage": (8, 5, [*PP2, "parallel.expert_model_parallel_size=2"]),
    "interleaved, last stage": (4, 3, [*PP2, "parallel.virtual_pipeline_model_parallel_size=2"]),
}


def small_run(folder: Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The small run with overrides."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return load_config(path, overrides)
