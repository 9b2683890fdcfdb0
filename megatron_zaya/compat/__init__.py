"""What bridges Megatron-Core versions and a missing accelerator. Nothing else in the project patches anything."""

import warnings
from collections.abc import Callable
from typing import Any


def quiet_megatron() -> None:
    """Hide the warnings that Megatron-Core repeats on every rank about what is not installed.

    `zaya doctor` says the same once, with the consequence.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning)


def import_megatron() -> None:
    """Import torch and Megatron-Core, quietly; for processes that start ranks' work, where every second counts.

    Megatron-Core decorates its fused functions with `torch.compile`, and the decorator alone loads torch's whole
    compiler: 40 % of the CPU time of these imports. Without an accelerator the functions stay as they are written.
    """
    quiet_megatron()
    import torch

    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = _as_written
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compiler


def _as_written(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Stand in for `torch.compile`, as a decorator with and without options."""
    return function if function is not None else lambda given: given
