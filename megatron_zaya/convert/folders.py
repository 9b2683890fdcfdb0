"""Model folders of other programs: their layouts, configurations, and the files that travel beside the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_zaya.config.sections import ModelConfig
from megatron_zaya.convert import hf, original
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.convert.safetensors_files import read_json
from megatron_zaya.convert.table import Layout

CARRIED = "hf"
"""Folder beside our steps where those files wait for the way back."""


@dataclass(frozen=True)
class Kind:
    """A layout with its config.json."""

    layout: Layout
    config_json: Callable[[ModelConfig, str], dict[str, Any]]
    config_differences: Callable[[dict[str, Any], ModelConfig], list[str]]


KINDS = {
    "transformers": Kind(hf.HF, hf.config_json, hf.config_differences),
    "original": Kind(original.ORIGINAL, original.config_json, original.config_differences),
}


def kind_of(folder: Path, names: list[str]) -> str:
    """Return "transformers" or "original", by the names of the tensors."""
    if any(".zaya_block." in name for name in names):
        return "original"
    if any(name.startswith("model.") for name in names):
        return "transformers"
    raise ConvertError(f"{folder}: its tensors are named neither as transformers' ZAYA nor as the original one")


def check_config(folder: Path, kind: Kind, model: ModelConfig) -> None:
    """Check that the folder's config.json describes ``model``.

    Raises:
        ConvertError: it does not; names every key that differs.
    """
    found = read_json(folder / "config.json")
    if found.get("model_type", "zaya") != "zaya":
        raise ConvertError(f"{folder / 'config.json'}: model_type is {found['model_type']!r}, not 'zaya'")
    differing = kind.config_differences(found, model)
    if differing:
        raise ConvertError(f"{folder / 'config.json'}: is another model; " + "; ".join(differing))


def carry(source: Path, target: Path) -> None:
    """Copy everything of a model folder but its weights and their index: configuration, tokenizer, generation."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        is_weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth") or path.name.endswith(".index.json")
        if path.is_file() and not is_weights:
            shutil.copyfile(path, target / path.name)
            with (target / path.name).open("rb") as copy:
                os.fsync(copy.fileno())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write and sync a JSON file."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_config(folder: Path, kind: Kind, model: ModelConfig, dtype: str) -> None:
    """Write config.json; keys of a carried one that say nothing about the weights stay (special tokens, for one)."""
    path = folder / "config.json"
    carried = read_json(path) if path.exists() else {}
    ours = kind.config_json(model, dtype)
    if carried and not kind.config_differences(carried, model):
        ours = ours | carried | {key: ours[key] for key in ("dtype", "torch_dtype") if key in ours}
    write_json(path, ours)
