"""Megatron-Core's own GPT, small, as a job: trained, saved and loaded like one, with any of three optimizers.

plain   Megatron-Core's Adam; saved and loaded through plain `dist_checkpointing` with our strategies
adam    sharded over the data-parallel ranks, through the checkpointer; Megatron-Core's own class for this can load only
        fused Adams, which need an accelerator (tests/ckpt/test_mcore.py: every bit of its state comes back)
muon    the same with Muon for the matrices
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

SEQUENCES, LENGTH, VOCABULARY = 4, 12, 48


class Size(NamedTuple):
    """A small GPT."""

    hidden: int
    layers: int


class Layout(NamedTuple):
    """Parallel sizes; what is left of the ranks is data parallel."""

    tp: int
    pp: int
    vp: int | None = None
    """Stages of a rank, where there are several."""


def _config(size: Size, layout: Layout):
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=4,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _add_rules() -> None:
    """Say which optimizer takes the parameters that our own models do not have."""
    from megatron_zaya.optim import rules

    added = [rules.Rule(f"*.linear_{name}.weight", "muon", True, "matrix") for name in ("qkv", "fc1", "fc2")]
    added.append(rules.Rule("embedding.position_embeddings.weight", "adamw", True, "lookup table"))
    rules.RULES = tuple(dict.fromkeys([*rules.RULES, *added]))


class Job:
    """A GPT under Megatron-Core's DDP with an optimizer; what our descriptions of shards ask of a job is here."""

    def __init__(self, size: Size, optimizer: str, layout: Layout, seed: int) -> None:
        from megatron.core.distributed import finalize_model_grads

        from megatron_zaya.config.sections import ParallelConfig
        from megatron_zaya.parallel.groups import build_process_groups

        self.sharded = optimizer != "plain"
        self.parallel = ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp,
            use_distributed_optimizer=self.sharded,
        )
        self.pg_collection = build_process_groups(self.parallel, seed)
        torch.manual_seed(seed)
        config = _config(size, layout)
        config.finalize_model_grads_func = finalize_model_grads
        stages = layout.pp * (layout.vp or 1)
        numbers = range(self.pg_collection.pp.rank(), stages, layout.pp)
        self.model = [self._stage(config, number, stages, layout) for number in numbers]
        self.optimizer = self._sharded_optimizer(optimizer) if self.sharded else self._plain_optimizer()
        self.balancer = SimpleNamespace(sharded_state_dict=lambda groups: {})

    def _stage(self, config, number: int, stages: int, layout: Layout):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        model = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            VOCABULARY,
            LENGTH,
            pre_process=number == 0,
            post_process=number == stages - 1,
            share_embeddings_and_output_weights=False,
            vp_stage=None if layout.vp is None else number // layout.pp,
        )
        model.named_global_parameters = model.named_parameters
        if self.sharded:
            model.sharded_state_dict = partial(_tensors_only, model.sharded_state_dict)
        for parameter in model.parameters():
            if getattr(parameter, "tensor_model_parallel", False):
                parameter.shard_groups = {parameter.partition_dim: self.pg_collection.tp}
        options = DistributedDataParallelConfig(use_distributed_optimizer=self.sharded)
        return DistributedDataParallel(config, options, model)

    def _plain_optimizer(self):
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        return get_megatron_optimizer(OptimizerConfig(lr=1e-2), self.model, use_gloo_process_groups=False)

    def _sharded_optimizer(self, name: str):
        from megatron_zaya.config.sections import OptimizerConfig
        from megatron_zaya.optim.build import build_optimizer

        _add_rules()
        section = OptimizerConfig(optimizer=name, lr=1e-2, muon_newton_schulz_dtype="fp32")
        return build_optimizer(
            SimpleNamespace(optimizer=section, parallel=self.parallel), self.model, self.pg_collection
        )

    def step(self, number: int) -> tuple[float, float]:
        """Train one step on the sequences of this number; return the loss and the gradient norm."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(number))
        group, chunks = self.pg_collection.dp, self.model
        mine = tokens[group.rank() :: group.size()]
        for chunk in chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        rows = get_forward_backward_func()(
            forward_step_func=partial(_forward, torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)),
            data_iterator=[iter(mine) for _ in chunks] if len(chunks) > 1 else iter(mine),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(mine),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        loss = torch.tensor(sum(row["loss"].item() for row in rows), dtype=torch.float64)
        torch.distributed.all_reduce(loss)
        return loss.item(), float(norm)

    def _described(self, loading: bool = False) -> dict:
        """Describe weights and optimizer as Megatron-Core does."""
        metadata = {"chained_optim_avoid_prefix": True}
        stages = {str(n): chunk.module.sharded_state_dict(metadata=metadata) for n, chunk in enumerate(self.model)}
        optimizer = self.optimizer.sharded_state_dict(stages, is_loading=loading, metadata=metadata)
        return {"stages": stages, "optimizer": optimizer}

    def _shards(self, loading: bool) -> list:
        from ckpt.mcore import shard_of
        from megatron_zaya.compat.mcore import allocate_optimizer_state
        from megatron_zaya.train.shards import job_shards

        if self.sharded:
            return job_shards(self, with_optimizer=True, loading=loading, allocate=allocate_optimizer_state)
        from megatron.core.dist_checkpointing import ShardedTensor
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import apply_factories

        holder = self._described()
        apply_factories(holder)
        return [shard_of(value) for value in nested_values(holder) if isinstance(value, ShardedTensor)]

    def save(self, folder: Path, number: int) -> None:
        """Save, and wait for it."""
        from ckpt.checkpointer import Checkpointer
        from tests.ckpt.test_mcore import dist_save

        if self.sharded:
            checkpointer = Checkpointer(folder)
            checkpointer.save(number, self._shards(loading=False), {"steps": number})
            assert [save.error for save in checkpointer.wait(60)] == [None]
            checkpointer.close()
        else:
            dist_save(self._described(), folder)
        torch.distributed.barrier()

    def load(self, folder: Path) -> None:
        """Load what any layout saved."""
        from ckpt.checkpointer import Checkpointer
        from megatron_zaya.compat.mcore import set_steps_done
        from megatron_zaya.train.shards import optimizer_parts
        from tests.ckpt.test_mcore import dist_load

        self.step(99)  # gives weights and optimizer other values, all of which must go
        if self.sharded:
            report = Checkpointer(folder).load(self._shards(loading=True))
            assert not report.missing and not report.unexpected
            set_steps_done(optimizer_parts(self.optimizer), report.common["steps"])
            return
        loaded = dist_load(self._described(loading=True), folder)
        for number, chunk in enumerate(self.model):
            chunk.module.load_state_dict(loaded["stages"][str(number)])
        self.optimizer.load_state_dict(loaded["optimizer"])

    def gathered(self) -> list[tuple]:
        """Return this rank's shards: name, global shape, region, bytes."""
        return [
            (s.key, s.global_shape, s.region, s.data.detach().reshape(-1).view(torch.uint8).numpy().copy())
            for s in self._shards(loading=True)
        ]

    def release(self) -> None:
        """End the job's use, for the next one of this process. Collective."""
        from megatron_zaya.train.setup import release_job

        self.scheduler = None
        release_job(self)


def _tensors_only(describe) -> dict:
    """Leave out the objects that Megatron-Core describes beside the tensors; on the CPU they are empty."""
    from megatron.core.dist_checkpointing import ShardedTensor

    return {key: value for key, value in describe().items() if isinstance(value, ShardedTensor)}


def _forward(mask, iterator, model):
    """Megatron-Core's forward step on one sequence."""
    sequence = next(iterator)
    losses = model(sequence[None, :-1], torch.arange(LENGTH)[None], mask, labels=sequence[None, 1:])
    return losses, lambda output: (output.mean(), {"loss": output.mean().detach()})
