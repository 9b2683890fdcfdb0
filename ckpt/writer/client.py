"""The rank's side of its writer process: start it, give orders, hear events, notice its death. Torch-free."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ckpt.errors import CheckpointError
from ckpt.writer.arena import Arena

SEND_TIMEOUT_S = 30.0


class Writer:
    """One writer process with its arena. Nothing here waits without a limit."""

    def __init__(self, capacity: int, storage: str, options: dict[str, Any]) -> None:
        """Start the process with an arena of ``capacity`` bytes.

        Raises:
            CheckpointError: there is not enough memory, or the process cannot be started.
        """
        try:
            self.arena = Arena.create(capacity)
        except (OSError, MemoryError) as error:
            raise CheckpointError(f"no room for a staging arena of {capacity / 1e9:.2f} GB: {error}") from error
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "ckpt.writer", str(theirs.fileno()), str(self.arena.fd)]
        command += [str(self.arena.capacity), storage, json.dumps(options)]
        paths = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        try:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno(), self.arena.fd], env=environment, stdin=subprocess.DEVNULL
            )
        except OSError as error:
            raise CheckpointError(f"the writer process cannot be started: {error}") from error
        finally:
            theirs.close()
        self.connection = ours
        self.layout: Any = None
        self._received = b""
        self._beat = (-1, time.monotonic())

    def send(self, order: dict[str, Any]) -> None:
        """Send one order.

        Raises:
            CheckpointError: the writer is dead, or does not listen.
        """
        self.connection.settimeout(SEND_TIMEOUT_S)
        try:
            self.connection.sendall(json.dumps(order).encode() + b"\n")
        except OSError as error:
            raise CheckpointError(
                f"the writer process does not take orders: {error or type(error).__name__}"
            ) from error

    def events(self) -> list[dict[str, Any]]:
        """Return what the writer has said since the last call, without waiting."""
        self.connection.setblocking(False)
        try:
            while data := self.connection.recv(1 << 16):
                self._received += data
        except OSError:
            pass  # nothing more for now; a dead process is noticed by its exit status
        *lines, self._received = self._received.split(b"\n")
        return [json.loads(line) for line in lines]

    @property
    def exit_status(self) -> int | None:
        """None while the process lives."""
        return self.process.poll()

    def silent_s(self) -> float:
        """Return for how many seconds the writer has shown no progress, as far as this method was called."""
        beat = self.arena.beat
        if beat != self._beat[0]:
            self._beat = (beat, time.monotonic())
        return time.monotonic() - self._beat[1]

    def expect_progress(self) -> None:
        """Start counting silence anew: an order has just been given."""
        self._beat = (-1, time.monotonic())

    def kill(self) -> None:
        """End the process at once, and forget it; never waits long, even for one that cannot die."""
        self.process.kill()
        self.close(timeout_s=1.0)

    def close(self, timeout_s: float) -> None:
        """Hang up; give the process time to finish what is staged, then leave it alone. Idempotent."""
        if self.connection.fileno() < 0:
            return
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        self.arena.close()
