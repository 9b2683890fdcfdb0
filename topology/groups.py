"""Every communicator that Megatron-Core creates for a layout, derived without importing it.

A rank is a mixed-radix number whose digits are the parallel coordinates in the order of `Plan.order`, first
token fastest; a group varies some digits and fixes the others. The names are Megatron-Core's group names
(megatron/core/parallel_state.py, `initialize_model_parallel`); `world` is the default process group, which
carries barriers and checkpoint metadata. Invariant: rows are groups, in Megatron's group and member order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topology.fabric import IntArray
from topology.plan import TOKENS, Plan

PURPOSE = {
    "world": "default group: barriers, checkpoint metadata",
    "tp": "tensor parallel: activations of one layer",
    "cp": "context parallel: attention state, halos",
    "pp": "pipeline: activations between stages",
    "dp": "data parallel without context: data seeds, logging",
    "dp_cp": "dense gradients and parameters",
    "hcp": "levels of hierarchical context parallelism",
    "hybrid_dp_cp": "context groups of varying size",
    "mp": "gradient norm without the distributed optimizer",
    "embd": "tied embedding gradients, first and last stage",
    "pos_embd": "position embedding, first stage",
    "tp_dp_cp": "router statistics, overflow checks",
    "tp_dp": "fp8 scales",
    "tp_cp": "auxiliary loss of the router",
    "ep": "expert dispatch and combine",
    "ep_tp": "expert tensor parallel",
    "tp_ep_mp": "expert dispatch with tensor parallel experts",
    "tp_ep_pp": "expert gradient norm, checkpoint dedup",
    "ep_dp": "expert gradients and parameters",
    "intra_dp_cp": "optimizer shards inside one instance",
    "intra_ep_dp": "expert optimizer shards inside one instance",
    "inter_ep_dp": "between expert optimizer instances",
    "intra_dist_opt_instance": "gradient clipping of the distributed optimizer",
}


@dataclass(frozen=True)
class GroupSet:
    """All groups of one kind: `ranks[g]` are the members of group g in communicator order."""

    kind: str
    ranks: IntArray  # [groups, members]

    @property
    def size(self) -> int:
        """Members per group."""
        return int(self.ranks.shape[1])

    @property
    def count(self) -> int:
        """Number of groups."""
        return int(self.ranks.shape[0])

    @property
    def purpose(self) -> str:
        """What the communicator is for."""
        return PURPOSE.get(self.kind.split(".")[0], "")


def rank_grid(order: str, sizes: dict[str, int]) -> tuple[list[str], IntArray]:
    """Ranks as an array with one axis per token, slowest token first; also the tokens of the axes."""
    tokens = order.lower().split("-")
    tokens += [token for token in TOKENS if token not in tokens]
    slow_first = tokens[::-1]
    shape = [sizes[token] for token in slow_first]
    return slow_first, np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)


def split(order: str, sizes: dict[str, int], varied: str) -> IntArray:
    """Groups in which the tokens of `varied` ("tp-pp") run and the others stay: [groups, members]."""
    axes, grid = rank_grid(order, sizes)
    chosen = set(varied.split("-"))
    inside = [i for i, token in enumerate(axes) if token in chosen]
    outside = [i for i, token in enumerate(axes) if token not in chosen]
    members = int(np.prod([grid.shape[i] for i in inside]))
    return np.ascontiguousarray(grid.transpose(outside + inside)).reshape(-1, members)


def derive_groups(plan: Plan) -> dict[str, GroupSet]:
    """Kind -> all its groups, in the order in which Megatron-Core creates them, then `world`."""
    dense = {"tp": plan.tp, "cp": plan.cp, "ep": 1, "dp": plan.dp, "pp": plan.pp}
    expert = {"tp": plan.etp, "cp": 1, "ep": plan.ep, "dp": plan.edp, "pp": plan.pp}
    found: dict[str, IntArray] = {}

    found["dp_cp"] = split(plan.order, dense, "dp-cp")
    instances = plan.num_distributed_optimizer_instances
    if instances > 1:
        found["intra_dp_cp"] = chunks(found["dp_cp"], found["dp_cp"].shape[1] // instances)
    if plan.hybrid_context_parallel:
        ranks = found["dp_cp"].shape[1]
        for power in range(1, ranks.bit_length() - 1):
            found[f"hybrid_dp_cp.{1 << power}"] = chunks(found["dp_cp"], 1 << power)
    found["dp"] = split(plan.order, dense, "dp")
    found["cp"] = split(plan.order, dense, "cp")
    levels = plan.hierarchical_context_parallel_sizes
    if levels:
        for level, ranks in enumerate(hierarchy(found["cp"], levels)):
            found[f"hcp.{level}"] = ranks
    found["mp"] = split(plan.order, dense, "tp-pp")
    found["tp"] = split(plan.order, dense, "tp")
    found["pp"] = split(plan.order, dense, "pp")
    found["embd"] = found["pp"][:, [0, -1]] if plan.pp > 1 else found["pp"][:, :1]
    found["pos_embd"] = found["pp"][:, :1]
    for kind, varied in (("tp_dp_cp", "tp-dp-cp"), ("tp_dp", "tp-dp"), ("tp_cp", "tp-cp")):
        found[kind] = split(plan.order, dense, varied)
    for kind, varied in (
        ("ep", "ep"),
        ("ep_tp", "tp"),
        ("tp_ep_mp", "tp-ep"),
        ("tp_ep_pp", "tp-ep-pp"),
        ("ep_dp", "dp"),
    ):
        found[kind] = split(plan.order, expert, varied)
    if instances > 1:
        inner, outer = hierarchy(found["ep_dp"], [plan.edp // instances, instances])
        found["intra_ep_dp"], found["inter_ep_dp"] = inner, outer
    found["intra_dist_opt_instance"] = found["tp_ep_pp"].reshape(instances, -1)
    found["world"] = np.arange(plan.world_size, dtype=np.int64)[None, :]
    return {kind: GroupSet(kind, ranks) for kind, ranks in found.items()}


def chunks(ranks: IntArray, size: int) -> IntArray:
    """Cut every group into consecutive pieces of `size`. Raises ValueError when it does not divide them."""
    return ranks.reshape(-1, size)


def hierarchy(ranks: IntArray, sizes: list[int]) -> list[IntArray]:
    """Split every group into levels as Megatron's `create_hierarchical_groups`; level 0 is innermost."""
    levels = []
    for level, size in enumerate(sizes):
        inner = int(np.prod(sizes[:level], dtype=np.int64))
        outer = ranks.shape[1] // (inner * size)
        cube = ranks.reshape(ranks.shape[0], outer, size, inner)
        levels.append(cube.transpose(0, 1, 3, 2).reshape(-1, size))
    return levels
