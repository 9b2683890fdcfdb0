"""What must hold before any rank starts: checked by the launcher and again by every rank. Torch-free, writes nothing.

Fail closed: a run that cannot work stops here, in a second, with the remedy in the message.
"""

from __future__ import annotations

from pathlib import Path

from ckpt.errors import CheckpointError
from ckpt.steps import complete_iterations, find_step
from megatron_zaya.config import ConfigError, RunConfig
from megatron_zaya.config.phases import phase_configs
from megatron_zaya.data.datasets import check_data
from megatron_zaya.data.tokenizer import load_tokenizer
from megatron_zaya.plan.layout import check_layout
from megatron_zaya.telemetry.trackers import missing_packages


def _check_vocabulary(config: RunConfig) -> None:
    size = load_tokenizer(config.data.tokenizer_model).vocab_size
    if config.model.vocab_size < size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary of the tokenizer "
            f"{config.data.tokenizer_model!r} ({size}); set model.vocab_size to at least {size}"
        )


def checkpoint_to_load(config: RunConfig) -> tuple[Path, int | None] | None:
    """Return (folder, iteration) of the step that the run starts from, or None for a fresh start.

    The iteration is None where the newest valid step is meant: then a damaged one is passed over.

    Raises:
        ConfigError: an asked-for checkpoint is not there.
    """
    wanted = config.checkpoint
    try:
        if wanted.load is not None:
            root, found = find_step(Path(wanted.load), wanted.load_iteration)
            one_step = wanted.load_iteration is not None or root == Path(wanted.load).parent
            return root, found if one_step else None
        if complete_iterations(config.checkpoint_dir) or wanted.load_iteration is not None:
            return find_step(config.checkpoint_dir, wanted.load_iteration)[0], wanted.load_iteration
        if wanted.continue_from is not None:
            return find_step(Path(wanted.continue_from))[0], None
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.load: {error}") from None
    return None


def unfinished_phases(config: RunConfig) -> list[RunConfig]:
    """Return what is left of a run, as its checkpoints tell; the last phase when everything is done."""
    phases = phase_configs(config)
    left = [p for p in phases if p.schedule.train_iters not in complete_iterations(p.checkpoint_dir)]
    return phases[phases.index(left[0]) :] if left else phases[-1:]


def begins_phase(config: RunConfig, root: Path) -> bool:
    """Return whether what :func:`checkpoint_to_load` found is the end of the phase before this run."""
    wanted = config.checkpoint
    return wanted.continue_from is not None and wanted.load is None and root != config.checkpoint_dir


def check_run(config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> None:
    """Check everything about a run, in all its phases, that can be known without starting it.

    Raises:
        ConfigError: the configuration cannot work with this world.
        DataError: the data are missing, damaged, or do not fit the configuration.
    """
    for phase in phase_configs(config):
        _check_phase(phase, world_size, ranks_per_node)
    checkpoint_to_load(unfinished_phases(config)[0])


def _check_phase(config: RunConfig, world_size: int, ranks_per_node: int | None) -> None:
    lacking = missing_packages(config.telemetry)
    if lacking:
        raise ConfigError("; ".join(lacking))
    check_layout(config, world_size, ranks_per_node)
    if config.data.seq_length > config.model.max_position_embeddings:
        raise ConfigError(
            f"data.seq_length={config.data.seq_length} is beyond "
            f"model.max_position_embeddings={config.model.max_position_embeddings}"
        )
    replayed = config.run.router_replay.replay
    if replayed is not None and not Path(replayed).is_dir():
        raise ConfigError(f"run.router_replay.replay={replayed!r}: no such folder; run.router_replay.record makes one")
    check_data(config.data)
    _check_vocabulary(config)
