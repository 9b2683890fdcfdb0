"""Plain Megatron-Core calls on our files: a GPT with its optimizer, TP 2 to TP 1, objects, padding, refusals."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ckpt.errors import CheckpointError
from tests.distributed.test_reshard import assemble
from tests.ranks import run_ranks


def dist_load(state, folder, **options):
    """Call plain dist_checkpointing.load; a version without a registry is told the strategy."""
    from megatron.core import dist_checkpointing

    from ckpt.mcore import LoadStrategy, install, register_default_strategy

    install()
    if register_default_strategy is None:
        options["sharded_strategy"] = LoadStrategy()
    return dist_checkpointing.load(state, str(folder), **options)


def dist_save(state, folder, strategy=None, **options):
    from megatron.core import dist_checkpointing

    from ckpt.mcore import SaveStrategy

    if torch.distributed.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    torch.distributed.barrier()
    strategy = strategy or SaveStrategy()
    request = dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, **options)
    if request is None:
        strategy.checkpointer.close()
    return request


def gpt(tp: int, seed: int, use_distributed_optimizer: bool):
    """Return Megatron-Core's own GPT under DDP with its own optimizer, after one step on random gradients."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    from megatron_zaya.config.sections import ParallelConfig
    from megatron_zaya.parallel.groups import build_process_groups

    build_process_groups(ParallelConfig(tensor_model_parallel_size=tp), seed)
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=2, hidden_size=24, num_attention_heads=2, tensor_model_parallel_size=tp, use_cpu_initialization=True
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=50, max_sequence_length=16)
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=use_distributed_optimizer), model
    )
    options = OptimizerConfig(lr=1e-2, use_distributed_optimizer=use_distributed_optimizer, clip_grad=0.0)
    optimizer = get_megatron_optimizer(options, [model], use_gloo_process_groups=False)
    for parameter in model.parameters():
        parameter.main_grad.normal_()
        if parameter.main_grad.numel() == parameter.numel():
            torch.distributed.all_reduce(parameter.main_grad) if tp == 1 else None
    optimizer.step()
    return model.module, optimizer


def described(model, optimizer, loading: bool) -> dict:
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=metadata)
    return state


def tensors_of(state) -> list[tuple]:
    """Return this rank's shards of a described state: name, global shape, region, bytes."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories

    from ckpt.mcore import shard_of

    holder = {"state": state}
    apply_factories(holder)
    found = [shard_of(v) for v in nested_values(holder) if isinstance(v, ShardedTensor)]
    assert not any(isinstance(v, ShardedTensorFactory) for v in nested_values(holder))
    return [(s.key, s.global_shape, s.region, s.data.detach().reshape(-1).view(torch.uint8).numpy()) for s in found]


def start() -> None:
    from launch.env import read_rank_env
    from megatron_zaya.compat import cpu

    cpu.install()
    env = read_rank_env()
    torch.distributed.init_process_group("gloo", rank=env.rank, world_size=env.world_size)


def save_gpt(folder: Path, distributed: bool) -> list[tuple]:
    start()
    model, optimizer = gpt(2, seed=1, use_distributed_optimizer=distributed)
    kept = tensors_of(described(model, optimizer, loading=False))
    dist_save(described(model, optimizer, loading=False), folder)
    return kept


def load_gpt(folder: Path, distributed: bool) -> list[tuple]:
    start()
    model, optimizer = gpt(1, seed=2, use_distributed_optimizer=distributed)
    loaded = dist_load(described(model, optimizer, loading=True), folder)
    holder = described(model, optimizer, loading=True)
    values = flat(loaded)
    kept = []
    for path, value in flat(holder).items():
        if hasattr(value, "global_shape") and hasattr(value, "local_shape"):
            from ckpt.mcore import shard_of

            shard = shard_of(value)
            data = values[path].reshape(-1).view(torch.uint8).numpy()
            kept.append((shard.key, shard.global_shape, shard.region, data))
    return kept


def flat(tree, path=()) -> dict:
    """Return the leaves of nested dicts and lists by path."""
    if isinstance(tree, dict):
        return {p: v for key, value in tree.items() for p, v in flat(value, (*path, key)).items()}
    if isinstance(tree, list):
        return {p: v for key, value in enumerate(tree) for p, v in flat(value, (*path, key)).items()}
    return {path: tree}


@pytest.mark.parametrize("distributed", [True], ids=["sharded_optimizer"])
def test_a_gpt_and_its_optimizer_from_two_tensor_parallel_ranks_to_one(tmp_path, distributed):
    saved = assemble(run_ranks(save_gpt, 2, tmp_path / "step", distributed))
    loaded = assemble(run_ranks(load_gpt, 1, tmp_path / "step", distributed))
    assert set(loaded) == set(saved)
    assert any("optimizer.state.exp_avg" in key for key in saved)
    for key, values in saved.items():
        assert np.array_equal(values, loaded[key]), key


@pytest.fixture
def state(pg_collection):
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    def make(value: float):
        return {
            "model": {"w": ShardedTensor.from_rank_offsets("w", torch.full((6, 4), value), (0, 0, 1))},
            "list": [ShardedTensor.from_rank_offsets("v", torch.full((3,), value), prepend_axis_num=1)],
            "rng": ShardedObject("rng", {"keys": np.arange(5), "pos": 3, "nested": [1.5, "x", (2,)]}, (1,), (0,)),
            "common": {"iteration": 7},
        }

    return make


def test_objects_and_common_values_come_back(state, tmp_path):
    dist_save(state(2.0), tmp_path / "a")
    template = state(0.0)
    kept = template["model"]["w"].data
    template["rng"].data = None
    loaded = dist_load(template, tmp_path / "a")
    assert torch.equal(loaded["model"]["w"], torch.full((6, 4), 2.0))
    assert torch.equal(kept, torch.full((6, 4), 2.0)), "filled in place"
    assert loaded["common"] == {"iteration": 7}
    assert loaded["rng"]["pos"] == 3
    assert loaded["rng"]["nested"] == [1.5, "x", (2,)]
    assert np.array_equal(loaded["rng"]["keys"], np.arange(5))


def test_asynchronous_save_keeps_the_values_of_the_call(state, tmp_path):
    from ckpt.mcore import SaveStrategy

    strategy = SaveStrategy()
    changing = state(3.0)
    options = {"async_strategy": "mcore"} if "async_strategy" in _save_parameters() else {}
    request = dist_save(changing, tmp_path / "a", strategy, async_sharded_save=True, **options)
    changing["model"]["w"].data.fill_(99.0)
    request.execute_sync()
    strategy.checkpointer.close()
    assert torch.equal(dist_load(state(0.0), tmp_path / "a")["model"]["w"], torch.full((6, 4), 3.0))


def _save_parameters():
    from megatron.core import dist_checkpointing

    return inspect.signature(dist_checkpointing.save).parameters


def test_a_padded_tensor_loads_what_fits(pg_collection, tmp_path):
    from megatron.core.dist_checkpointing import ShardedTensor

    def padded(rows: int, value: float):
        tensor = torch.full((rows, 3), value)
        return {"w": ShardedTensor.from_rank_offsets("w", tensor, allow_shape_mismatch=True)}

    dist_save(padded(5, 1.0), tmp_path / "a")
    assert dist_load(padded(7, 8.0), tmp_path / "a")["w"][:, 0].tolist() == [1.0] * 5 + [8.0] * 2
    assert dist_load(padded(4, 8.0), tmp_path / "a")["w"][:, 0].tolist() == [1.0] * 4


def test_what_is_in_a_step_can_be_asked(state, tmp_path):
    from ckpt.mcore import LoadStrategy

    dist_save(state(2.0), tmp_path / "a")
    strategy = LoadStrategy()
    assert sorted(strategy.load_tensors_metadata(tmp_path / "a")) == ["v", "w"]
    assert strategy.load_tensors_metadata(tmp_path / "a")["w"].global_shape == (6, 4)
    assert {v.key for v in strategy.load_sharded_metadata(tmp_path / "a").values()} == {"v", "w", "rng"}


def test_damage_and_what_is_missing_are_errors(state, tmp_path):
    from megatron.core.dist_checkpointing import ShardedTensor

    dist_save(state(2.0), tmp_path / "a")
    more = state(0.0) | {"x": ShardedTensor.from_rank_offsets("other", torch.zeros(2))}
    with pytest.raises(CheckpointError, match="lacks 'other'"):
        dist_load(more, tmp_path / "a")
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        dist_save_again(state(1.0), tmp_path / "a")
    file = tmp_path / "a" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="chunk 0"):
        dist_load(state(0.0), tmp_path / "a")


def dist_save_again(state, folder) -> None:
    from megatron.core import dist_checkpointing

    from ckpt.mcore import SaveStrategy

    dist_checkpointing.save(state, str(folder), sharded_strategy=SaveStrategy())


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_an_object_that_would_run_code_is_refused(pg_collection, tmp_path, capsys):
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    weight = ShardedTensor.from_rank_offsets("w", torch.zeros(2))
    assert pickle.dumps(Payload())
    dist_save({"w": weight, "bad": ShardedObject("bad", Payload(), (1,), (0,))}, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"object 'object/bad/shard_0_1' is refused"):
        dist_load({"w": weight, "bad": ShardedObject("bad", None, (1,), (0,))}, tmp_path / "a")
    assert "never" not in capsys.readouterr().out
