"""Sees every operation of a run, lets it happen at the level of shapes, and tells the tracker and the logs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeProcessGroup  # noqa: F401 (registers the backend)
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_zaya.plan.dryrun.collectives import CollectiveLog
from megatron_zaya.plan.dryrun.live_bytes import LiveBytes
from megatron_zaya.plan.dryrun.operations import operation_flops
from megatron_zaya.plan.dryrun.shapes import ForcedRouting, execute


class Observer(TorchDispatchMode):
    """A dispatch mode around everything a rank does."""

    def __init__(self, routing: ForcedRouting, memory: LiveBytes | None, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.routing, self.memory, self.collectives = routing, memory, CollectiveLog()
        self.flops: Counter[str] = Counter()
        """Floating-point operations by phase."""
        self.operations = 0
        self.phase = "construction"
        self._modules: list[str] = []

    @contextlib.contextmanager
    def during(self, phase: str, category: str) -> Iterator[None]:
        """Label what happens inside the block."""
        before, self.phase = self.phase, phase
        if self.memory is not None:
            self.memory.category, kept = category, self.memory.category
        try:
            yield
        finally:
            self.phase = before
            if self.memory is not None:
                self.memory.category = kept

    @contextlib.contextmanager
    def following_modules(self) -> Iterator[None]:
        """Remember which module's forward pass is running, to name the moment of the peak."""

        def enter(module: nn.Module, *args: Any) -> None:
            self._modules.append(type(module).__name__)

        def leave(*args: Any) -> None:
            self._modules.pop()

        hooks = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        if function.namespace == "profiler":
            return function(*args, **kwargs)
        if function.namespace == "c10d":
            return self._collective(function, args, kwargs)
        if self.memory is not None:
            self.memory.moment = self._moment(function)
        if function is torch.ops.aten.argmax.default and args[0].shape[-1] == self.routing.classes:
            result = self.routing.assign(args[0].shape[0])
        elif self._is_parameter(function, kwargs):
            result = function(*args, **{**kwargs, "device": self.device})
        else:
            result = execute(function, args, kwargs)
        flops = operation_flops(function, args, result)
        if flops:
            self.flops[self.phase] += flops
        self._track(result)
        return result

    def _is_parameter(self, function: Any, kwargs: dict[str, Any]) -> bool:
        """Modules make their parameters on the host and are moved then; here they are never on the host."""
        if self.phase != "construction" or function is not torch.ops.aten.empty.memory_format:
            return False
        return kwargs.get("dtype", torch.float32).is_floating_point

    def _moment(self, function: Any) -> str:
        return f"{self.phase}: {'.'.join(self._modules[-2:])} {function.name()}"

    def _track(self, result: Any) -> None:
        if self.memory is None:
            return
        if isinstance(result, Tensor):
            self.memory.see(result)
        elif isinstance(result, list | tuple):
            for item in result:
                self._track(item)

    def _collective(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        name = function.name().removeprefix("c10d::").split(".")[0]
        self.collectives.see(name, args, self.phase)
        if "_coalesced_" in name:  # no meta kernels in torch, and nothing to do
            from torch._C._distributed_c10d import FakeWork

            return FakeWork().boxed()
        result = function(*args, **kwargs)
        _fill_what_arrives(name, args)
        return result


def _fill_what_arrives(name: str, args: tuple) -> None:
    """Give real tensors a value, which the fake world leaves undefined: gathered are copies of our own, others zero."""
    if name == "allgather_":
        for tensor, own in zip(args[0][0], args[1] * len(args[0][0]), strict=True):
            if tensor.device.type != "meta":
                tensor.copy_(own)
        return
    for tensor in args[0] if isinstance(args[0], list) else [args[0]]:
        if tensor.device.type == "meta":
            continue
        if name == "_allgather_base_":
            tensor.view(-1, *args[1].shape).copy_(args[1].expand(tensor.shape[0] // args[1].shape[0], *args[1].shape))
        elif name in ("alltoall_base_", "recv_"):
            tensor.zero_()
