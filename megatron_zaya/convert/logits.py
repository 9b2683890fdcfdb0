"""What two models answer to the same tokens, in fp32 on this machine's CPU: transformers' and ours."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from megatron_zaya.config import RunConfig
from megatron_zaya.config.sections import ModelConfig
from megatron_zaya.convert.safetensors_files import SafetensorsFolder
from megatron_zaya.convert.weights import Weights, widen
from megatron_zaya.convert.world import world_of_one

TOKENS = (2, 24)
"""Sequences and tokens each; long enough for the convolutions and for a small sliding window."""


def random_tokens(model: ModelConfig) -> np.ndarray:
    """Return token ids [B, S] int64, the same for every call."""
    return np.random.default_rng(0).integers(0, model.vocab_size, TOKENS)


@torch.no_grad()
def logits_of_transformers(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return logits [B, S, V] of the model in a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    model.set_experts_implementation("eager")
    restore_skip_biases(model, folder)
    return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


def restore_skip_biases(model: torch.nn.Module, folder: Path) -> None:
    """Put the balancing biases of a folder into the model that transformers loaded from it.

    transformers 5.23 sets the bias of the skip class to its start value of -1 after it has loaded the right one.
    """
    weights = SafetensorsFolder(folder)
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            buffer.copy_(_whole(weights, name))
    weights.close()


@torch.no_grad()
def logits_of_ours(weights: Weights, model: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Return logits [B, S, V] of our model with these weights, which have our names."""
    config = RunConfig.model_validate({"model": model.model_dump(), "run": {"precision": "fp32"}})
    with world_of_one():
        from megatron_zaya.parallel.groups import build_process_groups
        from megatron_zaya.train.setup import build_stages

        groups = build_process_groups(config.parallel, config.run.seed, model.num_query_groups)
        (stage,) = build_stages(config, groups)
        for name, tensor in stage.state_dict(keep_vars=True).items():
            if tensor is not None:
                tensor.data.copy_(_whole(weights, stage.global_name(name)))
        return stage.eval()(torch.from_numpy(tokens)).numpy()


def _whole(weights: Weights, name: str) -> torch.Tensor:
    info = weights.tensors[name]
    raw = np.empty(math.prod(info.shape) * info.item_bytes, dtype=np.uint8)
    weights.read(name, 0, raw)
    return torch.from_numpy(widen(raw, info.dtype)).view(info.shape)
