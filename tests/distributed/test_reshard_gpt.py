"""Megatron-Core's own GPT through plain `dist_checkpointing` on our files: any layout reads what any other wrote.

Random pairs of layouts of random small models, weights and optimizer, as in test_reshard.py: train two steps in the
first layout and save; load in the second and compare every tensor with a full gather, bit for bit; save there, load
back in the first layout, and train three steps that must equal, bit for bit, those of the run that never stopped.

The optimizer is Megatron-Core's plain one: its distributed one cannot load torch's Adam, only fused ones, which need an
accelerator. What tests/ckpt/test_mcore.py shows of it is that every bit of its state comes back.
"""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.test_reshard import assemble
from tests.ranks import run_ranks

SEED = int(os.environ.get("RESHARD_SEED", "4"))  # draws tensor to one, pipeline to tensor, one to pipeline
COUNT = int(os.environ.get("RESHARD_PAIRS", "3"))
WORLDS = [(2, 1), (2, 2), (1, 2)]
"""Ranks of the first and of the second layout of the pairs, in turn."""
LAYOUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2), (1, 1)]}
"""Ranks -> (tensor, pipeline) parallel sizes; the rest is data parallel."""
BEFORE, AFTER, SEQUENCES, LENGTH, VOCABULARY = 2, 3, 4, 12, 48


@dataclass(frozen=True)
class Pair:
    """A drawn case."""

    number: int
    hidden: int
    layers: int
    worlds: tuple[int, int]
    layouts: tuple[tuple[int, int], tuple[int, int]]


def draw_pairs() -> list[Pair]:
    generator = random.Random(SEED)
    pairs = []
    for number, worlds in enumerate(itertools.islice(itertools.cycle(WORLDS), COUNT)):
        first, second = (generator.choice(LAYOUTS[world]) for world in worlds)
        hidden, layers = generator.choice([24, 32, 40]), generator.choice([2, 4])
        pairs.append(Pair(number, hidden, layers, worlds, (first, second)))
    return pairs


PAIRS = draw_pairs()


class Job:
    """Megatron-Core's GPT under its DDP with its optimizer."""

    def __init__(self, pair: Pair, layout: tuple[int, int], seed: int) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig

        from megatron_zaya.config.sections import ParallelConfig
        from megatron_zaya.parallel.groups import build_process_groups

        tp, pp = layout
        build_process_groups(ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp), seed)
        torch.manual_seed(seed)
        config = TransformerConfig(
            num_layers=pair.layers,
            hidden_size=pair.hidden,
            num_attention_heads=4,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            pipeline_dtype=torch.float32,
            use_cpu_initialization=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
        config.finalize_model_grads_func = finalize_model_grads
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            VOCABULARY,
            LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=False,
        )
        self.model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
        options = OptimizerConfig(lr=1e-2)
        self.optimizer = get_megatron_optimizer(options, [self.model], use_gloo_process_groups=False)
        self.shard = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    def step(self, number: int) -> tuple[float, float]:
        """Train one step on the sequences of this number; return the loss (last stage, else 0) and gradient norm."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(number))
        rank, ranks = self.shard
        mine = iter(tokens[rank::ranks])
        positions = torch.arange(LENGTH)[None]
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)

        def forward(iterator, model):
            sequence = next(iterator)
            losses = model(sequence[None, :-1], positions, mask, labels=sequence[None, 1:])
            return losses, lambda output: (output.mean(), {"loss": output.mean().detach()})

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        rows = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=mine,
            model=[self.model],
            num_microbatches=SEQUENCES // ranks,
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        loss = torch.tensor(sum(row["loss"].item() for row in rows), dtype=torch.float64)
        torch.distributed.all_reduce(loss)
        return loss.item(), float(norm)

    def described(self, loading: bool = False) -> dict:
        """Describe weights and optimizer as Megatron-Core does."""
        metadata = {"chained_optim_avoid_prefix": True}
        state = {"model": self.model.module.sharded_state_dict(metadata=metadata)}
        state["optimizer"] = self.optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=metadata)
        return state

    def load(self, folder: Path) -> None:
        from tests.ckpt.test_mcore import dist_load

        self.step(99)  # allocates the optimizer's state, and gives all of it values that must go
        loaded = dist_load(self.described(loading=True), folder)
        self.model.module.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])

    def gathered(self) -> list[tuple]:
        """Return this rank's shards: name, global shape, region, bytes."""
        from megatron.core.dist_checkpointing import ShardedTensor
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import apply_factories

        from ckpt.mcore import shard_of

        holder = {"state": self.described()}
        apply_factories(holder)
        found = [shard_of(v) for v in nested_values(holder) if isinstance(v, ShardedTensor)]
        return [
            (s.key, s.global_shape, s.region, s.data.detach().reshape(-1).view(torch.uint8).numpy().copy())
            for s in found
        ]


def work(folder: Path, tasks: list[tuple[str, Pair]]) -> list[dict]:
    """Run on each rank: the tasks ("write", "read" or "back", pair) in turn."""
    from launch.env import read_rank_env
    from megatron_zaya.compat import cpu
    from megatron_zaya.parallel.groups import release_process_groups
    from tests.ckpt.test_mcore import dist_save

    cpu.install()
    env = read_rank_env()
    torch.distributed.init_process_group("gloo", rank=env.rank, world_size=env.world_size)
    results = []
    for task, pair in tasks:
        source, target = folder / f"{pair.number}.first", folder / f"{pair.number}.second"
        job = Job(pair, pair.layouts[task == "read"], seed=1 + (task != "write"))
        result = {}
        if task == "write":
            for number in range(BEFORE):
                job.step(number)
        else:
            job.load(source if task == "read" else target)
        if task != "back":
            result["state"] = job.gathered()
            dist_save(job.described(), source if task == "write" else target)
            torch.distributed.barrier()
        result["curve"] = [job.step(BEFORE + number) for number in range(AFTER)]
        release_process_groups()
        results.append(result)
    torch.distributed.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results by (task, number of the pair): one list entry a rank. Worlds of one size share their processes."""
    folder = tmp_path_factory.mktemp("reshard-gpt")
    collected: dict[tuple[str, int], list[dict]] = {}
    for task, which in (("write", 0), ("read", 1), ("back", 0)):
        for world in sorted({pair.worlds[which] for pair in PAIRS}):
            pairs = [pair for pair in PAIRS if pair.worlds[which] == world]
            ranks = run_ranks(work, world, folder, [(task, pair) for pair in pairs])
            for number, pair in enumerate(pairs):
                collected[task, pair.number] = [rank[number] for rank in ranks]
    return collected


def name_of(pair: Pair) -> str:
    first, second = (f"tp{tp}pp{pp}of{world}" for (tp, pp), world in zip(pair.layouts, pair.worlds, strict=True))
    return f"{first}->{second}"


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_another_layout_loads_every_bit(results, pair):
    saved = assemble([rank["state"] for rank in results["write", pair.number]])
    loaded = assemble([rank["state"] for rank in results["read", pair.number]])
    assert set(saved) == set(loaded)
    assert any("optimizer.state.exp_avg" in key for key in saved)
    for key, values in saved.items():
        assert np.array_equal(values, loaded[key]), key


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_there_and_back_three_steps_are_those_of_the_run_that_never_stopped(results, pair):
    whole, other, back = (results[task, pair.number][0]["curve"] for task in ("write", "read", "back"))
    assert back == whole
    first, second = ([norm for _, norm in curve] for curve in (whole, other))
    np.testing.assert_allclose(second, first, rtol=1e-3)
