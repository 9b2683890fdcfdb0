"""A plan file laid over a run file. Plans are data: nothing here computes a layout.

Two shapes are read: sections of a run file (`parallel:`, `schedule:`, ...), or Megatron's names flat, as
`zaya topology` takes them. `world_size`, or `nodes` and `gpus`, say how large the job is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from launch.errors import LaunchError
from megatron_zaya.config.run_config import RunConfig
from megatron_zaya.config.sections import ParallelConfig
from topology.plan import Plan

SECTIONS = frozenset(RunConfig.model_fields)
SIZES = frozenset({"world_size", "nodes", "gpus"})


def read_plan(path: Path) -> tuple[list[str], int | None]:
    """Return (overrides for the run file, world size or None).

    Raises:
        LaunchError: no such file, no YAML, or a key that is neither of a run file nor of a layout.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"plan {path}: {error.strerror}; `zaya plan` writes one") from None
    except yaml.YAMLError as error:
        raise LaunchError(f"plan {path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise LaunchError(f"plan {path}: a mapping is needed, not {type(tree).__name__}")
    return _overrides(path, tree), _world_size(path, tree)


def _overrides(path: Path, tree: dict[str, Any]) -> list[str]:
    known = set(ParallelConfig.model_fields)
    overrides = []
    for key, value in tree.items():
        if key in SECTIONS and isinstance(value, dict):
            overrides += [f"{key}.{name}={_text(item)}" for name, item in value.items() if name not in SIZES]
        elif key in known:
            overrides.append(f"parallel.{key}={_text(value)}")
        elif key not in SIZES and key not in Plan.model_fields:
            raise LaunchError(f"plan {path}: {key!r} is neither a section of a run file nor a key of a layout")
    return overrides


def _text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _world_size(path: Path, tree: dict[str, Any]) -> int | None:
    parallel = tree.get("parallel")
    sizes = {**(parallel if isinstance(parallel, dict) else {}), **tree}
    try:
        if "world_size" in sizes:
            return int(sizes["world_size"])
        return int(sizes["nodes"]) * int(sizes.get("gpus", 8)) if "nodes" in sizes else None
    except (TypeError, ValueError):
        raise LaunchError(f"plan {path}: world_size, nodes and gpus must be integers") from None
