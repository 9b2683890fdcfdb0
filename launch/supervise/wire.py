"""Messages between controller and agents: one JSON object a line."""

from __future__ import annotations

import asyncio
import json
from typing import Any

Message = dict[str, Any]
LIMIT_BYTES = 1 << 24  # stacks of all ranks of a node fit


def encode(message: Message) -> bytes:
    """Return the line of a message."""
    return json.dumps(message).encode() + b"\n"


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """Return the next message; None when the other side is gone or does not speak this language."""
    try:
        line = await reader.readline()
        message = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
