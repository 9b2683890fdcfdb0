"""The writer process: `python -m ckpt.writer SOCKET ARENA CAPACITY STORAGE OPTIONS`, started by ckpt.writer.client.

Orders come as lines of JSON, events go back the same way. When the rank closes its end, or dies, the writer finishes
what has been staged completely, gives up the rest, and exits. It ignores the signals that stop a job: the rank decides.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt.storage import PosixStorage, Storage, load_storage
from ckpt.writer.arena import Arena
from ckpt.writer.commit import CommitOrder, Committer
from ckpt.writer.part import PartOrder, report_failure, write_part
from ckpt.writer.record import Layout
from ckpt.writer.upload import forget_older, keep_commit, upload

NICENESS = 5
"""Training goes first when both want a core."""


class Server:
    """Takes orders, one file at a time; commits wait for other ranks beside that."""

    def __init__(self, connection: socket.socket, arena: Arena, storage: Storage) -> None:
        self.connection, self.arena, self.storage = connection, arena, storage
        self.parent_alive = True
        self.layouts: dict[int, Layout] = {}
        self.committer = Committer(storage)
        self.orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.uploads: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.commits: list[threading.Thread] = []
        self.sending = threading.Lock()

    def run(self) -> None:
        """Serve until the rank is gone and everything is finished or given up."""
        worker, uploader = threading.Thread(target=self._work), threading.Thread(target=self._upload)
        worker.start()
        uploader.start()
        with contextlib.suppress(OSError), self.connection.makefile("rb") as lines:
            for line in lines:
                order = json.loads(line)
                if order["op"] == "layout":
                    self.layouts = {order["id"]: Layout.of(order["pieces"], order["tensors"])}
                else:
                    self.orders.put(order | {"layout": self.layouts.get(order["layout"])})
        self.parent_alive = False
        self.orders.put(None)
        worker.join()
        self.uploads.put(None)
        uploader.join()
        for thread in self.commits:
            thread.join()

    def _work(self) -> None:
        while (order := self.orders.get()) is not None:
            part = self._part(order)
            try:
                if order["op"] == "fail":
                    raise RuntimeError(order["error"])
                if order["local"] is None:
                    write_part(part, self.arena, self.storage, lambda: self.parent_alive)
                    self._finish(order, part, None)
                else:
                    self._write_locally(order, part)
            except Exception as problem:
                self._finish(order, part, problem)

    def _write_locally(self, order: dict[str, Any], part: PartOrder) -> None:
        """Write to the node's own disk; the copy to the shared storage follows."""
        local, disk = Path(order["local"]), PosixStorage()
        if order["commit"] is not None:
            keep_commit(local, order["save_id"], order["commit"], disk)
        write_part(replace(part, folder=local), self.arena, disk, lambda: self.parent_alive, durable=True)
        self._tell(event="local", number=order["number"], error=None)
        self.uploads.put(order)

    def _upload(self) -> None:
        while (order := self.uploads.get()) is not None:
            part, problem = self._part(order), None
            try:
                local = Path(order["local"])
                upload(local, part.rank, part.save_id, part.folder, self.storage, self.arena.tick)
                forget_older(local.parent, part.rank, part.save_id)
            except Exception as error:
                problem = error
            self._finish(order, part, problem)

    def _finish(self, order: dict[str, Any], part: PartOrder, problem: Exception | None) -> None:
        """Tell what became of this rank's part, and commit if that is this rank's task."""
        if problem is not None:
            report_failure(part, self.storage)
        self._tell(event="part", number=order["number"], error=_describe(problem) if problem else None)
        if order["commit"] is not None:
            thread = threading.Thread(target=self._commit, args=(order,))
            self.commits = [t for t in self.commits if t.is_alive()] + [thread]
            thread.start()

    def _part(self, order: dict[str, Any]) -> PartOrder:
        layout = order["layout"] or Layout.of([], {})
        return PartOrder(order["rank"], order["save_id"], Path(order["folder"]), order["size"], layout)

    def _commit(self, order: dict[str, Any]) -> None:
        details = CommitOrder(**order["commit"] | {"folder": Path(order["folder"]), "save_id": order["save_id"]})
        error, path = None, None
        try:
            path = str(self.committer.commit(details))
        except Exception as problem:
            error = _describe(problem)
        self._tell(event="commit", number=order["number"], error=error, path=path)

    def _tell(self, **event: Any) -> None:
        with self.sending, contextlib.suppress(OSError):  # a dead rank hears nothing
            self.connection.sendall(json.dumps(event).encode() + b"\n")


def _describe(problem: Exception) -> str:
    where = f"{problem.filename}: " if isinstance(problem, OSError) and problem.filename else ""
    text = f"{problem.strerror} (errno {problem.errno})" if isinstance(problem, OSError) else str(problem)
    return f"{where}{text or type(problem).__name__}"


def main(arguments: list[str]) -> None:
    """Serve one rank."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    connection = socket.socket(fileno=int(arguments[0]))
    arena = Arena(int(arguments[1]), int(arguments[2]))
    Server(connection, arena, load_storage(arguments[3], json.loads(arguments[4]))).run()


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # nothing is left to do; threads of a storage must not hold the process
