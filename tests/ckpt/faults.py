"""Storage that breaks on purpose inside a real writer process, and one that writes down what it did."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from ckpt.storage import PosixStorage


class Faulty(PosixStorage):
    """Does one bad thing at one system call of the process, if the file ``armed`` is there (it is removed then)."""

    def __init__(self, armed: str, action: str, call: str | None = None, number: int = 0, slow_s: float = 0.0) -> None:
        """Choose the fault.

        Args:
            armed: path; without the file nothing happens.
            action: "kill", "hang", or the number of an error.
            call: count only calls of this name; None counts all.
            number: the fault comes before this call, counted from 0 since the file is there.
            slow_s: seconds that every pwrite takes longer.
        """
        self.armed, self.action, self.name, self.number = Path(armed), action, call, number
        self.slow_s = slow_s
        self.seen = 0
        self.lock = threading.Lock()

    def call(self, name: str, function: Any, *arguments: Any) -> Any:
        if name == "pwrite":
            time.sleep(self.slow_s)
        if self.name in (None, name) and self.armed.exists():
            with self.lock:
                due = self.seen == self.number
                self.seen += 1
            if due:
                self._fail()
        return super().call(name, function, *arguments)

    def _fail(self) -> None:
        self.armed.unlink()
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "hang":
            time.sleep(1e6)
        raise OSError(int(self.action), os.strerror(int(self.action)))


class Tracing(PosixStorage):
    """Appends every system call that changes the disk to a file, in an order that is one of those possible."""

    def __init__(self, log: str) -> None:
        self.log = log
        self.lock = threading.Lock()

    def call(self, name: str, function: Any, *arguments: Any) -> Any:
        with self.lock:
            first = arguments[0] if arguments else None
            path = str(Path(f"/proc/self/fd/{first}").readlink()) if isinstance(first, int) else str(first)
            record: dict[str, Any] = {"op": name, "path": path}
            result = super().call(name, function, *arguments)
            if name == "rename":
                record["to"] = str(arguments[1])
            if name in ("pwrite", "write"):
                data = bytes(arguments[1][:result])
                record |= {"data": data.hex(), "offset": arguments[2] if name == "pwrite" else None}
            if name in ("ftruncate", "fallocate"):
                record["size"] = arguments[1]
            with contextlib.suppress(OSError), Path(self.log).open("a") as file:
                file.write(json.dumps(record) + "\n")
            return result
