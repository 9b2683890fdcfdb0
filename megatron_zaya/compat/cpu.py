"""Stand-ins that let unmodified Megatron-Core run on a machine without an accelerator.

Megatron-Core names the CUDA device unconditionally in a few places: `torch.cuda.current_device()`, `device="cuda"`
literals, streams, events, RNG states, and comparisons with `torch.cuda.FloatTensor`. Without an accelerator, and only
then, `install()` answers those calls for the CPU. It patches torch in this process (each rank calls it), once.
The factories are wrapped rather than a TorchFunctionMode entered: a mode would tax every torch call of a step.

The dry run of the planner uses the same stand-ins with another device: see `standing_in`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

logger = logging.getLogger(__name__)

_FACTORIES = ("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "ones", "ones_like")
_FACTORIES += ("rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like")


_device = torch.device("cpu")
"""What stands in for the accelerator; changed by `standing_in` only."""


class _Inert:
    """A stream or event: on the CPU every operation has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = _device

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> _Inert:
        return self

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, *args: Any) -> float:
        return 0.0


def has_accelerator() -> bool:
    """Return whether a CUDA or ROCm device is usable in this process."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this rank: its accelerator, or what stands in for one."""
    if has_accelerator() and not _patch.cache_info().currsize:
        return torch.device("cuda", torch.cuda.current_device())
    return _device


def _names_cuda(target: Any) -> bool:
    if isinstance(target, torch.device):
        return target.type == "cuda"
    return isinstance(target, str) and target.startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory: a CUDA device becomes the CPU, pinning (which needs a driver) is dropped."""

    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _device
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


def _tensor_to(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (_device, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _device
        return original(self, *args, **kwargs)

    return to


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        # Megatron-Core's optimizers sort parameters by the CUDA spelling of their type.
        return "torch.cuda." + original(self).rsplit(".", 1)[-1]

    return type_


@contextlib.contextmanager
def _stream(*args: Any) -> Iterator[None]:
    yield


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _do_nothing() -> Callable[..., None]:
    """Return a new function each time: torch.compile's rule table wants every patched name to be its own object."""
    return lambda *args, **kwargs: None


def _patch_torch() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _device
    cuda.Stream = cuda.Event = _Inert
    cuda.current_stream, cuda.default_stream = lambda *args: _Inert(), lambda *args: _Inert()
    cuda.stream = _stream
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _do_nothing())
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _do_nothing(), _do_nothing()
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = _get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = _set_rng_state
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self.to(_device)
    tensor.record_stream = _do_nothing()
    tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.to = _tensor_to(tensor.to)
    tensor.type = _tensor_type(tensor.type)
    distributed: Any = torch.distributed
    distributed.all_gather = _uneven_all_gather(distributed.all_gather)
    distributed.reduce_scatter = _uneven_reduce_scatter(distributed.reduce_scatter)


def _uneven_all_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    """NCCL gathers parts of different lengths, gloo does not: then every rank broadcasts its part."""

    @functools.wraps(original)
    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **kwargs: Any) -> Any:
        if len({part.shape for part in tensor_list}) == 1:
            return original(tensor_list, tensor, group=group, **kwargs)
        for rank, part in enumerate(tensor_list):
            if rank == torch.distributed.get_rank(group):
                part.copy_(tensor)
            torch.distributed.broadcast(part, group=group, group_src=rank)
        return None

    return all_gather


def _uneven_reduce_scatter(original: Callable[..., Any]) -> Callable[..., Any]:
    """The mirror of the uneven gather: one reduction per rank's part."""

    @functools.wraps(original)
    def reduce_scatter(output: torch.Tensor, input_list: list[torch.Tensor], group: Any = None, **kwargs: Any) -> Any:
        if len({part.shape for part in input_list}) == 1:
            return original(output, input_list, group=group, **kwargs)
        for rank, part in enumerate(input_list):
            part = part.clone()
            torch.distributed.reduce(part, group=group, group_dst=rank)
            if rank == torch.distributed.get_rank(group):
                output.copy_(part)
        return None

    return reduce_scatter


@functools.cache
def _patch() -> None:
    """Put every stand-in in place, once."""
    import megatron.core.tensor_parallel.random as mcore_random  # before torch changes under its decorators
    from torch.utils import _device as torch_device

    # Before the factories change: `with torch.device(...)` knows them by what it finds at its first use.
    torch_device._device_constructors()
    _patch_torch()
    # Megatron-Core keeps its own copies of the RNG helpers.
    mcore_random._get_cuda_rng_state = _get_rng_state
    mcore_random._set_cuda_rng_state = _set_rng_state


@functools.cache
def install() -> bool:
    """Install the CPU stand-ins if this machine has no accelerator. Idempotent; call before building a model.

    Returns:
        True if the stand-ins are active, False if an accelerator made them unnecessary.
    """
    if has_accelerator():
        return False
    logger.info("no accelerator: Megatron-Core runs on the CPU through megatron_zaya.compat.cpu")
    _patch()
    return True


@contextlib.contextmanager
def standing_in(stand_in: torch.device) -> Iterator[None]:
    """Let ``stand_in`` answer for the accelerator during the block, also where there is one.

    The stand-ins stay in this process: where there is an accelerator, use a process of its own.
    """
    global _device
    _patch()
    before, _device = _device, stand_in
    try:
        yield
    finally:
        _device = before
