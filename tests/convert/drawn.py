"""Model folders with random weights, written without torch, in either layout of other programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ckpt.manifest import TensorInfo
from megatron_zaya.config import RunConfig
from megatron_zaya.convert.folders import KINDS
from megatron_zaya.convert.output import new_folder, silent, write_files
from megatron_zaya.convert.safetensors_files import INDEX, index_json, plan_files
from megatron_zaya.convert.weights import Bytes, narrow


class Drawn:
    """Random finite tensors, made when they are read: equal whatever part is asked for."""

    def __init__(self, tensors: dict[str, TensorInfo], seed: int = 0) -> None:
        self.where, self.tensors = "drawn", tensors
        self._table = np.random.default_rng(seed).standard_normal(65_521).astype(np.float32) * 0.1 + 0.05
        self._first = {name: i * 7919 for i, name in enumerate(tensors)}

    def read(self, name: str, start: int, out: Bytes) -> None:
        info = self.tensors[name]
        count = len(out) // info.item_bytes
        begin = (self._first[name] + start) % len(self._table)
        repeats = -(-(begin + count) // len(self._table))
        out[:] = narrow(np.tile(self._table, repeats)[begin : begin + count], info.dtype)


def drawn(config: RunConfig, layout: str = "transformers", dtype: str = "F32", biases: str = "F32") -> Drawn:
    """Return random weights of a model under the names of ``layout``."""
    return Drawn(
        {
            t.name: TensorInfo(biases if t.name.endswith("balancing_biases") else dtype, t.shape)
            for pair in KINDS[layout].layout.pairs(config.model)
            for t in pair.theirs
        }
    )


def write_model(
    folder: Path,
    config: RunConfig,
    layout: str = "transformers",
    dtype: str = "F32",
    biases: str = "F32",
    files: int = 3,
) -> Path:
    """Write a model folder with a tokenizer, a generation configuration and special tokens."""
    weights = drawn(config, layout, dtype, biases)
    total = sum(int(np.prod(info.shape)) * info.item_bytes for info in weights.tensors.values())
    planned = plan_files(weights, total if files == 1 else total // files)
    with new_folder(folder) as made:
        write_files(made, planned, weights, 1, silent)
        if len(planned) > 1:
            (made / INDEX).write_text(json.dumps(index_json(weights, planned)))
        values = KINDS[layout].config_json(config.model, dtype) | {"eos_token_id": 7, "bos_token_id": 5}
        (made / "config.json").write_text(json.dumps(values))
        (made / "generation_config.json").write_text('{"eos_token_id": 7}')
        (made / "tokenizer.json").write_text('{"a": "tokenizer"}')
    return folder
