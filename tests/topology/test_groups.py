"""The derived communicators are those that the real megatron.core.parallel_state creates.

A fake process group of the full world lets Megatron build every group in one process; its own `create_group`
is wrapped to write down the members it is called with, and still creates the group.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from topology.groups import derive_groups
from topology.plan import Plan

OF_DESCRIPTION = {
    "DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "intra_dp_cp",
    "DATA_PARALLEL_GROUP": "dp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L0": "hcp.0",
    "HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L1": "hcp.1",
    **{f"HYBRID_DP_CP_GROUP_{1 << power}": f"hybrid_dp_cp.{1 << power}" for power in range(1, 11)},
    "MODEL_PARALLEL_GROUP": "mp",
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "EMBEDDING_GROUP": "embd",
    "POSITION_EMBEDDING_GROUP": "pos_embd",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp",
    "TENSOR_AND_DATA_PARALLEL_GROUP": "tp_dp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp_cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "ep_tp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "tp_ep_mp",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "tp_ep_pp",
    "EXPERT_DATA_PARALLEL_GROUP": "ep_dp",
    "HIERARCHICAL_EXPERT_DATA_PARALLEL_GROUP_L0": "intra_ep_dp",
    "HIERARCHICAL_EXPERT_DATA_PARALLEL_GROUP_L1": "inter_ep_dp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "intra_dist_opt_instance",
}

LAYOUTS: list[dict[str, Any]] = [
    {"world_size": 8},
    {"world_size": 8, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 4},
    {"world_size": 16, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
     "context_parallel_size": 2},
    {"world_size": 24, "pipeline_model_parallel_size": 3, "tensor_model_parallel_size": 2},
    {"world_size": 64, "expert_model_parallel_size": 16, "num_distributed_optimizer_instances": 2},
    {"world_size": 64, "tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 1,
     "expert_model_parallel_size": 8, "pipeline_model_parallel_size": 2},
    {"world_size": 64, "context_parallel_size": 8, "hierarchical_context_parallel_sizes": [2, 4]},
    {"world_size": 64, "order": "tp-cp-ep-pp-dp", "tensor_model_parallel_size": 2,
     "pipeline_model_parallel_size": 4, "expert_model_parallel_size": 1},
    {"world_size": 128, "order": "tp-ep-cp-dp-pp", "tensor_model_parallel_size": 2,
     "context_parallel_size": 4, "expert_model_parallel_size": 8, "expert_tensor_parallel_size": 2,
     "pipeline_model_parallel_size": 2, "num_distributed_optimizer_instances": 2},
    {"world_size": 64, "tensor_model_parallel_size": 2, "hybrid_context_parallel": True},
    {"world_size": 256, "pipeline_model_parallel_size": 8, "virtual_pipeline_model_parallel_size": 2,
     "tensor_model_parallel_size": 8},
    {"world_size": 1016, "expert_model_parallel_size": 8},
    {"world_size": 1024, "expert_model_parallel_size": 8, "expert_tensor_parallel_size": 1,
     "tensor_model_parallel_size": 2, "context_parallel_size": 2, "pipeline_model_parallel_size": 4},
]  # fmt: skip


def groups_of_megatron(layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[int]]]:
    """Initialise the real parallel state of rank 0 and return the members of every group it creates."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    seen: dict[str, list[list[int]]] = defaultdict(list)
    create: Callable[..., Any] = parallel_state.create_group

    def recording(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        name = kwargs["group_desc"]
        seen[OF_DESCRIPTION.get(name, name)].append(list(ranks))
        return create(ranks, *args, **kwargs)

    monkeypatch.setattr(parallel_state, "create_group", recording)
    dist.init_process_group("fake", rank=0, world_size=layout["world_size"], store=FakeStore())
    try:
        accepted = {k: v for k, v in layout.items() if k != "world_size"}
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **accepted)
        return dict(seen)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(("MASTER_", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    yield


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: Plan(**layout).describe())
def test_groups_equal_those_of_the_real_parallel_state(layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = groups_of_megatron(layout, monkeypatch)
    ours = {kind: groups.ranks.tolist() for kind, groups in derive_groups(Plan(**layout)).items()}
    ours.pop("world")
    assert set(ours) <= set(real)
    for kind in ours:
        assert ours[kind] == real[kind], kind
    # What newer versions create besides must be single ranks, or ranks that a derived kind already has.
    for kind in set(real) - set(ours):
        assert max(map(len, real[kind])) == 1 or real[kind] in ours.values(), kind


def test_every_kind_but_the_embeddings_partitions_the_world() -> None:
    plan = Plan(world_size=96, tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    for kind, groups in derive_groups(plan).items():
        members = sorted(groups.ranks.ravel().tolist())
        if kind in ("embd", "pos_embd"):
            assert len(set(members)) == len(members) < 96
        else:
            assert members == list(range(96)), kind
