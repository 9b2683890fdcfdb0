"""Where a rank stands in Megatron's rank grid, by arithmetic alone: its position on every axis, and its groups.

The order string names the axes, the fastest first (`tp-cp-ep-dp-pp`), as in `megatron.core.parallel_state`. Standard
library only, so that a thousand light tasks can ask; `topology.groups` lists the same groups for all ranks at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AXES = ("tp", "cp", "ep", "dp", "pp")
_SIZES = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
}


def grid_sizes(plan: Mapping[str, Any], world_size: int, expert: bool) -> dict[str, int]:
    """Return the length of each axis, of the dense grid or of the experts' one."""
    sizes = {axis: int(plan.get(name) or 1) for axis, name in _SIZES.items()}
    if expert:
        sizes["tp"] = int(plan.get("expert_tensor_parallel_size") or sizes["tp"])
        sizes["cp"] = 1
    else:
        sizes["ep"] = 1
    used = sizes["tp"] * sizes["cp"] * sizes["ep"] * sizes["pp"]
    return sizes | {"dp": world_size // used}


def position(rank: int, sizes: Mapping[str, int], order: str) -> dict[str, int]:
    """Return the coordinate of ``rank`` on each axis."""
    tokens = order.lower().split("-")
    where = {}
    for axis in [*tokens, *(axis for axis in AXES if axis not in tokens)]:
        where[axis] = rank % sizes[axis]
        rank //= sizes[axis]
    return where


def group_of(rank: int, axis: str, sizes: Mapping[str, int], order: str) -> list[int]:
    """Return the ranks that differ from ``rank`` on ``axis`` only, in order."""
    stride = 1
    tokens = order.lower().split("-")
    for token in [*tokens, *(a for a in AXES if a not in tokens)]:
        if token == axis:
            break
        stride *= sizes[token]
    first = rank - (rank // stride % sizes[axis]) * stride
    return [first + index * stride for index in range(sizes[axis])]


def groups_of(rank: int, world_size: int, plan: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the groups that every layout has: tp, cp, dp, pp of the dense grid, ep and ep_dp of the experts'."""
    order = str(plan.get("order") or "tp-cp-ep-dp-pp")
    dense, expert = (grid_sizes(plan, world_size, kind) for kind in (False, True))
    found = {axis: group_of(rank, axis, dense, order) for axis in ("tp", "cp", "dp", "pp")}
    return found | {"ep": group_of(rank, "ep", expert, order), "ep_dp": group_of(rank, "dp", expert, order)}
