"""The conversions, from folder to folder. Peak memory is a few chunks per worker, whatever the model; torch-free.

another program's folder  --from_hf-->  step 0 of a checkpoint folder, for checkpoint.load
a step of any layout      --to_hf---->  another program's folder

With `torch_dist` in place of `hf` they need torch, and the export Megatron-Core.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.manifest import TensorInfo
from megatron_zaya.compat import import_megatron
from megatron_zaya.config import ConfigError, RunConfig
from megatron_zaya.config.sections import ModelConfig
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.convert.folders import CARRIED, KINDS, carry, check_config, kind_of, write_config, write_json
from megatron_zaya.convert.hf import HF
from megatron_zaya.convert.output import Progress, new_folder, silent, write_files
from megatron_zaya.convert.safetensors_files import INDEX, SafetensorsFolder, index_json, plan_files
from megatron_zaya.convert.step import StepWeights, write_step
from megatron_zaya.convert.table import our_tensors
from megatron_zaya.convert.weights import Named, Retyped, Weights, check_tensors, size_of, to_ours, to_theirs

PARAMETER_TYPES = {"bf16": "BF16", "fp32": "F32"}
FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class Options:
    """How to convert, not what."""

    workers: int = 2
    max_file_bytes: int = FILE_BYTES
    rounding: bool = False
    """Allow types that lose bits."""
    progress: Progress = silent


def from_hf(source: Path, config: RunConfig, output: Path, options: Options) -> int:
    """Make a checkpoint folder of a model folder (transformers' or the original layout, found by its names).

    Args:
        source: folder with config.json and safetensors.
        config: the run that shall load it; decides model and types.
        output: checkpoint folder to make.
        options: see there.

    Returns:
        Bytes of weights written.

    Raises:
        ConvertError: config or tensors do not fit, are damaged or not finite, or the output exists.
    """
    if not source.is_dir():
        raise ConvertError(f"{source}: no such folder")
    weights = SafetensorsFolder(source)
    name = kind_of(source, list(weights.tensors))
    kind = KINDS[name]
    check_config(source, kind, config.model)
    ours = to_ours(weights, kind.layout, config.model)
    wanted = our_tensors(config.model, kind.layout, PARAMETER_TYPES[config.run.precision])
    typed = Retyped(ours, {key: info.dtype for key, info in wanted.items()}, options.rounding)
    common = {
        "config": config.model_dump(mode="json"),
        "origin": {"layout": name, "dtypes": {key: info.dtype for key, info in weights.tensors.items()}},
    }
    with new_folder(output) as folder:
        write_step(folder, typed, common, options.workers, options.max_file_bytes, options.progress)
        carry(source, folder / CARRIED)
    weights.close()
    return size_of(typed.tensors)


def open_step(path: Path, iteration: int | None, with_state: bool = False) -> tuple[StepWeights, RunConfig]:
    """Open a step and the run configuration that was saved with it."""
    step = StepWeights(path, iteration, with_state)
    try:
        return step, RunConfig.model_validate(step.config)
    except ValueError as error:
        raise ConfigError(f"{step.folder}: its run configuration is not one of this version: {error}") from None


def to_hf(
    source: Path,
    output: Path,
    options: Options,
    layout: str = "transformers",
    iteration: int | None = None,
    carried: Path | None = None,
) -> int:
    """Make a model folder of a step. Steps that :func:`from_hf` wrote go back in the types that they came in.

    Args:
        source: run folder, checkpoint folder, or one step.
        output: folder to make.
        options: see there.
        layout: "transformers" or "original".
        iteration: which step; None is the newest.
        carried: folder with tokenizer and generation files; None looks beside the step.

    Returns:
        Bytes of weights written.

    Raises:
        ConvertError, CheckpointError: what is there cannot be converted, or the output exists.
    """
    kind = KINDS[layout]
    step, config = open_step(source, iteration)
    theirs = typed_as_origin(to_theirs(step, kind.layout, config.model), step, layout)
    dtype = Counter(info.dtype for info in theirs.tensors.values()).most_common(1)[0][0]
    beside = step.folder.parent / CARRIED
    if carried is None and beside.is_dir() and _origin(step).get("layout") == layout:
        carried = beside
    files = plan_files(theirs, options.max_file_bytes)
    kind.config_json(config.model, dtype)  # refuses a model that the other side cannot compute
    with new_folder(output) as folder:
        write_files(folder, files, theirs, options.workers, options.progress)
        if len(files) > 1:
            write_json(folder / INDEX, index_json(theirs, files))
        if carried is not None:
            carry(carried, folder)
        write_config(folder, kind, config.model, dtype)
    step.close()
    return size_of(theirs.tensors)


def _origin(step: StepWeights) -> dict[str, object]:
    common = step.manifest.common
    return common.get("origin") or {} if isinstance(common, dict) else {}


def typed_as_origin(theirs: Weights, step: StepWeights, layout: str) -> Retyped:
    """Return tensors in the types that an untrained import had; those are the same values, so nothing is rounded."""
    origin = _origin(step)
    dtypes = origin.get("dtypes", {}) if origin.get("layout") == layout else {}
    assert isinstance(dtypes, dict)
    return Retyped(theirs, dtypes, rounding=True)


def from_torch_dist(source: Path, config: RunConfig, output: Path, options: Options, with_state: bool = False) -> int:
    """Make a checkpoint folder of a torch_dist checkpoint that Megatron-Core wrote, in any layout, of this model.

    Args:
        source: folder of one iteration.
        config: the run that shall load it; decides model and types.
        output: checkpoint folder to make; holds step 0, or with the state the step that was exported.
        options: see there.
        with_state: take optimizer, balancing, random state and counters too; only our own exports hold all of them.

    Returns:
        Bytes written.

    Raises:
        ConvertError: config or tensors do not fit, are damaged or not finite, or the output exists.
    """
    from megatron_zaya.convert.torch_dist import TorchDist, our_view

    stored = TorchDist(source)
    run = stored.run_state()
    _check_model(source, run, config.model)
    weights = our_view(stored)
    check_tensors(weights, [tensor for pair in HF.pairs(config.model) for tensor in pair.ours])
    wanted = our_tensors(config.model, HF, PARAMETER_TYPES[config.run.precision])
    common: dict[str, Any] = {"config": config.model_dump(mode="json"), "origin": {"layout": "torch_dist"}}
    iteration = 0
    if with_state:
        _check_state(source, run, weights, wanted)
        common |= run | {"config": common["config"]}
        iteration = run["train_state"]["iteration"]
        weights = our_view(stored, with_state=True)
    typed = Retyped(weights, {name: info.dtype for name, info in wanted.items()}, options.rounding)
    with new_folder(output) as folder:
        write_step(folder, typed, common, options.workers, options.max_file_bytes, options.progress, iteration)
    return size_of(typed.tensors)


def _check_model(source: Path, run: dict[str, Any], model: ModelConfig) -> None:
    """Check that the configuration in our own export, if it is one, describes ``model``."""
    ours = model.model_dump(mode="json")
    there = run.get("config", {}).get("model", ours)
    differing = [
        f"{key}: {there.get(key)!r} there, {value!r} by the run file"
        for key, value in ours.items()
        if there.get(key) != value
    ]
    if differing:
        raise ConvertError(f"{source}: is another model; " + "; ".join(differing))


def _check_state(source: Path, run: dict[str, Any], weights: Weights, wanted: dict[str, TensorInfo]) -> None:
    """Check that a run can go on from what lies at ``source``."""
    if "train_state" not in run:
        raise ConvertError(
            f"{source}: holds no counters of a run of this program; leave --state away and start from the weights"
        )
    for name, info in weights.tensors.items():
        if info.dtype != wanted[name].dtype:
            raise ConvertError(
                f"{source}: {name!r} is {info.dtype} there and {wanted[name].dtype} by run.precision, for which its "
                "optimizer state is not made; leave --state away"
            )


def to_torch_dist(
    source: Path, output: Path, options: Options, iteration: int | None = None, with_state: bool = False
) -> int:
    """Make a torch_dist checkpoint of a step, for Megatron-Core's `dist_checkpointing.load` in any layout.

    Args:
        source: run folder, checkpoint folder, or one step.
        output: folder to make.
        options: see there; the types are the step's own, and every tensor gets a file.
        iteration: which step; None is the newest.
        with_state: write optimizer, balancing, random state and counters too.

    Returns:
        Bytes written.

    Raises:
        ConvertError, CheckpointError: what is there cannot be converted, or the output exists.
    """
    import_megatron()
    from megatron_zaya.convert.torch_dist import RUN, megatron_names
    from megatron_zaya.convert.torch_dist_export import write_torch_dist
    from megatron_zaya.convert.world import world_of_one

    step, _ = open_step(source, iteration, with_state)
    if with_state and not any(name.startswith("optimizer.") for name in step.tensors):
        raise ConvertError(f"{step.folder}: holds weights only; leave --state away")
    named = Named(step, megatron_names(step.tensors))
    run = dict(step.manifest.common) if with_state else {"config": step.config}
    with world_of_one(), new_folder(output) as folder:
        write_torch_dist(folder, named, {"iteration": step.manifest.iteration, RUN: run}, options.progress)
    step.close()
    return size_of(named.tensors)
