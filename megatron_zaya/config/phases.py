"""A run as a list of phases: each is a complete run file of its own that goes on from the one before.

Phase k has the base configuration with its own overrides, its own folder `<run folder>/<k>_<name>`, and as many
iterations as its tokens need. Its first start takes weights, optimizer and balancing state from the last checkpoint of
phase k - 1 (whatever the layout was there) and begins a new learning-rate schedule and a new order of samples; a later
start resumes from its own checkpoints. Where a run stands is therefore read from its folders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_zaya.config.errors import ConfigError, explain

if TYPE_CHECKING:
    from megatron_zaya.config.run_config import RunConfig


UNKNOWN = 10**12
"""Iterations of a phase while its batch and sequence sizes are being read."""


def set_dotted(tree: dict[str, Any], path: str, value: Any, what: str) -> None:
    """Set ``a.b`` in a nested ``tree``; ``what`` names the origin in errors."""
    parts = path.strip().split(".")
    if not all(parts):
        raise ConfigError(f"{what}: write the key as section.key")
    node = tree
    for depth, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"{what}: {'.'.join(parts[: depth + 1])} is not a section")
    node[parts[-1]] = value


def phase_configs(config: RunConfig) -> list[RunConfig]:
    """Return the phases in order as complete configurations; a run without phases is its own single one.

    Raises:
        ConfigError: an override names no setting, or a phase is not a valid configuration.
    """
    if not config.phases:
        return [config]
    resolved: list[RunConfig] = []
    for number, phase in enumerate(config.phases, start=1):
        tree = config.model_dump(mode="json", exclude={"phases"})
        tree["run"]["dir"] = str(config.run_dir / f"{number}_{phase.name}")
        tree["run"]["seed"] += number - 1  # another order of samples
        tree["checkpoint"]["save_at_end"] = True
        if resolved:
            tree["checkpoint"] |= {"load": None, "load_iteration": None}
            tree["checkpoint"]["continue_from"] = str(resolved[-1].run_dir)
        for key, value in phase.overrides.items():
            set_dotted(tree, key, value, f"phases, {phase.name}, override {key!r}")
        try:
            tree["schedule"]["train_iters"] = UNKNOWN
            trial = type(config).model_validate(tree)
            samples = -(-phase.train_tokens // trial.data.seq_length)
            tree["schedule"]["train_iters"] = trial.schedule.iterations_for(samples)
            resolved.append(type(config).model_validate(tree))
        except ValidationError as error:
            raise ConfigError(explain(type(config), error, f"phase {phase.name}")) from None
    return resolved
