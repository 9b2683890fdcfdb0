"""What this machine and this environment can do: the facts `zaya doctor` prints and the specs choose by."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from ckpt import native
from megatron_zaya.model import fused


@dataclass(frozen=True)
class Capability:
    """One row of the doctor's table."""

    name: str
    available: bool
    detail: str
    consequence: str
    """What the project does because of it."""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def grouped_product_works(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether ``torch.nn.functional.grouped_mm`` runs forward and backward for this device and dtype."""
    function = getattr(torch.nn.functional, "grouped_mm", None)
    if function is None:
        return False
    try:
        rows = torch.ones(16, 16, device=device_type, dtype=dtype, requires_grad=True)
        stack = torch.ones(2, 16, 16, device=device_type, dtype=dtype, requires_grad=True)
        offsets = torch.tensor([8, 16], device=device_type, dtype=torch.int32)
        # The question may come inside a recomputed layer: its hooks must not take this backward pass for theirs.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            out = function(rows, stack, offs=offsets)
        out.backward(torch.ones_like(out))  # an expanded gradient, as of a sum, is refused
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _accelerator() -> Capability:
    if not torch.cuda.is_available():
        return Capability("accelerator", False, "none", "CPU stand-ins for Megatron-Core, gloo collectives")
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    properties = torch.cuda.get_device_properties(0)
    memory_gb = properties.total_memory / 1e9
    detail = f"{torch.cuda.device_count()} x {properties.name}, {memory_gb:.0f} GB, {kind}"
    return Capability("accelerator", True, detail, "RCCL/NCCL collectives")


def detect() -> list[Capability]:
    """Return every capability, in the order that a reader wants them."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    grouped = [
        str(d).removeprefix("torch.")
        for d in (torch.bfloat16, torch.float32, torch.float64)
        if grouped_product_works(device_type, d)
    ]
    engine, apex = _version("transformer_engine"), _version("apex")
    cpus = len(os.sched_getaffinity(0))
    return [
        Capability("python", True, f"{platform.python_version()}, {cpus} CPUs", ""),
        Capability("torch", True, torch.__version__, ""),
        Capability(
            "megatron-core",
            _version("megatron-core") is not None,
            _version("megatron-core") or "missing",
            "0.16.1 to 0.19 are supported",
        ),
        _accelerator(),
        Capability(
            "grouped product",
            bool(grouped),
            ", ".join(grouped) or "none",
            "experts run as one product, on an accelerator",
        ),
        Capability(
            "TransformerEngine",
            engine is not None,
            engine or "not installed",
            "fused RMSNorm" if engine else "torch RMSNorm and attention",
        ),
        Capability("apex", apex is not None, apex or "not installed", "fused Adam" if apex else "torch Adam"),
        Capability(
            "checkpoint copies",
            native.LIBRARY is not None,
            "compiled" if native.LIBRARY else "not compiled",
            "past the processor's cache" if native.LIBRARY else "libc's memmove: staging takes twice as long",
        ),
        Capability(
            "fused CPU operations",
            fused.LIBRARY is not None,
            "compiled" if fused.LIBRARY else "not compiled",
            "one pass over memory each" if fused.LIBRARY else "plain torch: a step on a CPU takes a tenth longer",
        ),
        Capability(
            "transformers",
            _version("transformers") is not None,
            _version("transformers") or "not installed",
            "parity checks against the released model code",
        ),
        Capability(
            "matplotlib",
            _version("matplotlib") is not None,
            _version("matplotlib") or "not installed",
            "loss curve pictures",
        ),
    ]
