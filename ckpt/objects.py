"""Objects that other programs pickle, as bytes in a tensor; read back only if they are made of harmless types."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckpt.errors import CheckpointError

OBJECT = "object/"
"""Keys of pickled objects begin so."""

_HARMLESS = [np.ndarray, np.dtype, np._core.multiarray._reconstruct, np._core.multiarray.scalar, io.BytesIO]
_HARMLESS += [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]


def as_bytes(content: bytes | memoryview) -> Tensor:
    """Return bytes as a tensor, 1-D uint8."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def pack(value: Any) -> Tensor:
    """Return an object as pickled bytes, 1-D uint8."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return as_bytes(buffer.getbuffer())


def unpack(data: Tensor, key: str) -> Any:
    """Return the object of :func:`pack`. Only tensors, numpy arrays, plain values and containers of them are built.

    Raises:
        CheckpointError: it is of another type, or is no pickle.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds
        kind = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants {kind.group(1)}" if kind else str(error).splitlines()[0][:200]
        raise CheckpointError(f"object {key!r} is refused, it is not made of harmless types: {reason}") from None
