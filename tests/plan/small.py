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
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {
    # name: (world size, rank, overrides)
    "one rank": (1, 0, []),
    "tensor and expert": (8, 3, ["tensor_model_parallel_size=2", "expert_model_parallel_size=4"]),
    "pipeline, last stage": (8, 5, ["pipeline_model_parallel_size=2", "expert_model_parallel_size=2"]),
    "interleaved, last stage": (4, 3, ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"]),
}


def overrides_of(name: str) -> list[str]:
    """The dotted overrides of a layout."""
    values = [f"parallel.{text}" for text in LAYOUTS[name][2]]
    return values + ["parallel.sequence_parallel=true"] * any("tensor" in value for value in values)


def small_run(folder: Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The small run with overrides."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return load_config(path, overrides)
