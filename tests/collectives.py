"""gloo's collectives for many ranks on few cores: one exchange between all instead of a ring.

In a ring each of the 2 (n - 1) hops waits until the next process gets a core; on two cores that is most of a test's
time. An exchange waits once. It is gloo's own all-to-all, and sums are taken in the order of the ranks.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Done:
    """A handle of something that has finished."""

    def wait(self, *args: Any) -> bool:
        return True


def _is_worth_it(x: Tensor, group: ProcessGroup | None) -> bool:
    group = group or dist.group.WORLD
    coalescing = group in dist.distributed_c10d._world.pg_coalesce_state
    return x.device.type == "cpu" and group.size() > 2 and not coalescing


def _exchanged(parts: Tensor, group: ProcessGroup | None) -> Tensor:
    """Send row r of ``parts`` to rank r; return what came from each."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received


def use_one_exchange() -> None:
    """Replace the summing collectives of this process, also where Megatron-Core took them by name."""
    reduce, scatter = dist.all_reduce, dist.reduce_scatter_tensor

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if op != dist.ReduceOp.SUM or not _is_worth_it(tensor, group):
            return reduce(tensor, op, group, async_op)
        size = dist.get_world_size(group)
        copies = tensor.detach().unsqueeze(0).expand(size, *tensor.shape)
        tensor.detach().copy_(_exchanged(copies, group).sum(0))
        return Done() if async_op else None

    def reduce_scatter_tensor(
        output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if op != dist.ReduceOp.SUM or not _is_worth_it(input, group):
            return scatter(output, input, op, group, async_op)
        parts = input.detach().reshape(dist.get_world_size(group), *output.shape)
        output.detach().copy_(_exchanged(parts, group).sum(0))
        return Done() if async_op else None

    replaced = {id(reduce): all_reduce, id(scatter): reduce_scatter_tensor}
    for name, module in list(sys.modules.items()):
        if name == "torch.distributed" or name.startswith("megatron."):
            for attribute, value in list(vars(module).items()):
                if id(value) in replaced:
                    setattr(module, attribute, replaced[id(value)])
