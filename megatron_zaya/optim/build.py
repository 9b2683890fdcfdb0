"""From a run file and a model to the optimizer and its schedule: which parameter goes where, over which ranks.

One optimizer for the dense parameters and one for the experts, if the model has any, chained, because they are sharded
over different data-parallel ranks; both are Megatron-Core optimizers in everything that its loop asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_zaya.config import RunConfig
from megatron_zaya.config.sections import OptimizerConfig as OptimizerSection
from megatron_zaya.model.sharding import is_expert
from megatron_zaya.optim.distributed import ShardedOptimizer
from megatron_zaya.optim.exchange import Grid
from megatron_zaya.optim.guarded import GuardedOptimizer
from megatron_zaya.optim.muon import MuonAdamW
from megatron_zaya.optim.rules import Rule, rule_for

NEWTON_SCHULZ_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _mcore_config(config: RunConfig, model: Sequence[DistributedDataParallel]) -> OptimizerConfig:
    opt, transformer = config.optimizer, model[0].config
    return OptimizerConfig(
        optimizer="adam",
        lr=opt.lr,
        min_lr=opt.min_lr,
        weight_decay=opt.weight_decay,
        adam_beta1=opt.adam_beta1,
        adam_beta2=opt.adam_beta2,
        adam_eps=opt.adam_eps,
        clip_grad=opt.clip_grad,
        bf16=transformer.bf16,
        params_dtype=transformer.params_dtype,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=model[0].ddp_config.overlap_param_gather,
    )


def rules_of(model: Sequence[DistributedDataParallel], optimizer: str) -> dict[Tensor, Rule]:
    """Return the rule of each parameter of this rank's stages."""
    return {
        parameter: rule_for(name, optimizer)
        for chunk in model
        for name, parameter in chunk.module.named_global_parameters()
    }


def _groups(rules: dict[Tensor, Rule], section: OptimizerSection, expert: bool) -> list[dict[str, Any]]:
    """Return torch parameter groups, one per combination of algorithm and decay; keys that Megatron-Core asks for."""
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for parameter, rule in rules.items():
        if is_expert(parameter) == expert:
            groups.setdefault((rule.algorithm, rule.weight_decay), []).append(parameter)
    return [
        dict(
            params=parameters,
            algorithm=algorithm,
            momentum=section.muon_momentum,
            nesterov=section.muon_use_nesterov,
            wd_mult=float(decays),
            lr_mult=1.0,
            is_expert_parallel=expert,
            is_decoupled_lr=False,
        )
        for (algorithm, decays), parameters in sorted(groups.items())
    ]


def _grid(tp_group: ProcessGroup, dp_group: ProcessGroup) -> Grid:
    """Return the grid of the tensor-parallel and data-parallel ranks around this rank. Collective over the world.

    Megatron-Core numbers ranks by position in a box of all kinds of parallelism, so the grids of a world are shifted
    copies of one another.
    """
    tp_ranks, dp_ranks = (torch.distributed.get_process_group_ranks(group) for group in (tp_group, dp_group))
    rank = tp_group.rank() * len(dp_ranks) + dp_group.rank()
    here = torch.distributed.get_rank()
    ranks = [t + d - here for t in tp_ranks for d in dp_ranks]  # global ranks in the order t * D + d
    group = dp_group
    if len(tp_ranks) > 1:
        group, offsets, seen = None, [r - min(ranks) for r in ranks], set()
        for first in range(torch.distributed.get_world_size()):
            members = sorted(first + offset for offset in offsets)
            if first not in seen:
                seen.update(members)
                made = parallel_state.create_group(members)
                group = made if here in members else group
    positions = {r: i for i, r in enumerate(sorted(ranks))}
    return Grid(group, tuple(positions[r] for r in ranks), len(tp_ranks), len(dp_ranks), rank)


def _part(
    config: RunConfig,
    model: Sequence[DistributedDataParallel],
    rules: dict[Tensor, Rule],
    pg_collection: ProcessGroupCollection,
    mcore_config: OptimizerConfig,
    expert: bool,
) -> ShardedOptimizer:
    """Return the optimizer of the dense or of the expert parameters."""
    section = config.optimizer
    on_device = next(iter(rules)).device.type == "cuda"
    inner = MuonAdamW(
        _groups(rules, section, expert),
        lr=section.lr,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_eps,
        weight_decay=section.weight_decay,
        fused=True if on_device else None,
    )
    dp_group = pg_collection.intra_expt_dp if expert else pg_collection.intra_dp_cp
    tp_group = pg_collection.expt_tp if expert else pg_collection.tp
    part = ShardedOptimizer(
        inner,
        mcore_config,
        None,
        lambda optimizer, config=None: optimizer.allocate(),
        model_chunks=list(model),
        per_model_buffers={
            index: chunk.expert_parallel_buffers if expert else chunk.buffers for index, chunk in enumerate(model)
        },
        data_parallel_group=dp_group,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=0,
        distributed_optimizer_instance_id=0,
    )
    part.grad_stats_parallel_group = pg_collection.intra_dist_opt
    part.tp_group = pg_collection.tp
    inner.allocate()
    if section.optimizer == "muon":
        dtype = NEWTON_SCHULZ_DTYPES[section.muon_newton_schulz_dtype]
        part.distribute_muon(rules, _grid(tp_group, dp_group), section.muon_num_ns_steps, dtype)
    return part


def build_optimizer(
    config: RunConfig, model: Sequence[DistributedDataParallel], pg_collection: ProcessGroupCollection
) -> GuardedOptimizer:
    """Return the optimizer over the model's buffers. Collective."""
    mcore_config = _mcore_config(config, model)
    if config.parallel.use_distributed_optimizer:
        rules = rules_of(model, config.optimizer.optimizer)
        kinds = (False, True) if model[0].config.num_moe_experts else (False,)
        parts = [_part(config, model, rules, pg_collection, mcore_config, expert) for expert in kinds]
    else:
        parts = get_megatron_optimizer(
            mcore_config, list(model), use_gloo_process_groups=False, pg_collection=pg_collection
        ).chained_optimizers
    names = {p: name for chunk in model for name, p in chunk.module.named_global_parameters()}
    optimizer = GuardedOptimizer(parts, names)
    model[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Return the learning-rate schedule."""
    opt, schedule = config.optimizer, config.schedule
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=opt.lr,
        min_lr=opt.min_lr,
        lr_warmup_steps=schedule.lr_warmup_iters,
        lr_decay_steps=schedule.lr_decay_iters or schedule.train_iters,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=opt.weight_decay,
        end_wd=opt.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # the run file counts, also when it changed before a resume
    )
