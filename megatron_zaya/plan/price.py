"""The predictions for a run file's own layout: what `zaya plan check` prints and a report lays beside measurements."""

from __future__ import annotations

from typing import Any

from megatron_zaya.config import RunConfig
from megatron_zaya.plan.activations import Options
from megatron_zaya.plan.hardware import Accelerator, Network
from megatron_zaya.plan.layer_time import Assumptions
from megatron_zaya.plan.layout import check_layout
from megatron_zaya.plan.memory import plan_memory
from megatron_zaya.plan.search import Candidate, Wanted
from megatron_zaya.plan.shape import batch_of, layout_of, model_of, precision_of
from megatron_zaya.plan.step_time import plan_step_time


def options_of(config: RunConfig, skew: float = 1.0) -> Options:
    """Return what else decides the memory of a run file's model."""
    return Options(loss_workspace_bytes=config.run.loss_workspace_mib * 2**20, expert_load=skew)


def wanted_of(
    config: RunConfig,
    world_size: int,
    device: Accelerator,
    skew: float = 1.0,
    probability: float = 0.95,
) -> Wanted:
    """Return what a plan of this run on ``device`` has to carry, with what the device is known to hold besides.

    ``skew`` is the busiest expert rank's load over the mean.
    """
    batch = batch_of(config)
    return Wanted(
        model=model_of(config),
        world_size=world_size,
        seq_length=batch.seq_length,
        global_batch_size=batch.global_batch_size,
        precision=precision_of(config),
        options=options_of(config, skew),
        allowances=device.allowances(),
        per_node=device.per_node,
        assume=Assumptions(skew=skew),
        min_fit_probability=probability,
    )


def price_own_layout(config: RunConfig, wanted: Wanted, device: Accelerator, network: Network) -> Candidate:
    """Return the run file's own plan with its predictions.

    Raises:
        ConfigError: the layout is not legal in that world.
    """
    check_layout(config, wanted.world_size)
    layout, batch = layout_of(config, wanted.world_size), batch_of(config)
    common: dict[str, Any] = dict(precision=wanted.precision, options=wanted.options)
    memory = plan_memory(wanted.model, layout, batch, allowances=wanted.allowances, **common)
    time = plan_step_time(wanted.model, layout, batch, device, network, assume=wanted.assume, **common)
    return Candidate(layout, batch, memory, time, memory.fit_probability(device.memory_bytes, wanted.allowances))
