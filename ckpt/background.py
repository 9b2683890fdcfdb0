"""What goes on behind training: the saves under way and the writer process that has them in hand.

The rank puts a save's bytes into the writer's arena and hears later what became of them. A writer that died or hangs is
given up with everything it had; the next save gets a fresh one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ckpt.errors import CheckpointError
from ckpt.manifest import piece_record, tensor_records
from ckpt.memory import Ring, pin, stage, unpin
from ckpt.rankfile import FilePlan
from ckpt.save import Save
from ckpt.shard import Shard
from ckpt.writer.client import Writer

logger = logging.getLogger(__name__)

_FAILING_CAPACITY = 1
"""Arena bytes of a writer that only reports a failure."""
_MOST_BEHIND = 2
"""Saves on a node's own disk that wait for their copy to the shared storage; further ones wait, or disks fill up."""


class Background:
    """A rank's saves that are not finished, by number, and their writer. Nothing here raises or waits for ever."""

    def __init__(
        self,
        rank: int,
        storage: str,
        storage_options: dict[str, Any],
        max_host_bytes: int | None,
        commit_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        """Start nothing yet. Arguments: see :class:`ckpt.checkpointer.Checkpointer`."""
        self.rank = rank
        self.storage, self.storage_options = storage, storage_options
        self.max_host_bytes = max_host_bytes
        self.commit_timeout_s, self.stall_timeout_s = commit_timeout_s, stall_timeout_s
        self.writer: Writer | None = None
        self.saves: dict[int, Save] = {}
        self._pinned: Tensor | None = None
        self._orders: dict[int, dict[str, Any]] = {}
        """What was ordered and is not yet on the disk."""

    def start(self, number: int, save: Save, order: dict[str, Any], plan: FilePlan, shards: Sequence[Shard]) -> None:
        """Order a save and stage its bytes; afterwards the tensors may change. A problem becomes ``save.error``."""
        try:
            save.waited_s = self._make_room()
            self.saves[number], self._orders[number] = save, order
            writer = self._writer_for(plan.size)
            self._send(writer, order, plan)
            header = plan.header(save.iteration, save.save_id)
            stage(shards, plan, header, Ring(writer.arena, lambda at: self._wait_until_written(save, at), self._pinned))
        except CheckpointError as error:
            self._fail(number, save, str(error))

    def finished(self) -> list[Save]:
        """Return the saves that finished, well or badly, since the last call. Never waits."""
        self.hear()
        finished = [save for save in self.saves.values() if save.done and not save.reported]
        for save in finished:
            save.reported = True
        self.saves = {number: save for number, save in self.saves.items() if not save.done}
        return finished

    def progress(self) -> tuple[int, int]:
        """Return (bytes written, bytes to write) of the newest save; (0, 0) if none is under way."""
        running = [save for save in self.saves.values() if save.holds_arena]
        return (self.writer.arena.written, running[-1].size) if running and self.writer else (0, 0)

    def close(self, timeout_s: float) -> None:
        """Let the writer finish for at most ``timeout_s``, then leave it to end by itself. Idempotent."""
        if self.writer is not None:
            self._dismiss(self.writer, timeout_s)

    def hear(self) -> None:
        """Take the writer's news, and notice that it died or hangs."""
        writer = self.writer
        if writer is None:
            return
        status = writer.exit_status  # before the events: what it said before it died is not lost
        for event in writer.events():
            self._take(event)
        if status is not None:
            self._give_up(writer, f"the writer process died (status {status})")
        elif self._hangs(writer):
            writer.process.kill()
            self._give_up(writer, f"the writer process made no progress for {self.stall_timeout_s:g} s and was ended")

    def _take(self, event: dict[str, Any]) -> None:
        save = self.saves.get(event["number"])
        if save is None:
            return
        if event["event"] != "local":
            self._orders.pop(event["number"], None)
        if event["error"] is not None:
            save.error = save.error or event["error"]
        elif event["event"] == "local":
            save.local_s = time.monotonic() - save.started
        elif event["event"] == "part":
            save.part_s = time.monotonic() - save.started
        else:
            save.durable_s, save.path = time.monotonic() - save.started, Path(event["path"])

    # ------------------------------------------------------------------ the way in

    def _make_room(self) -> float:
        """Wait until the arena is free; return the seconds."""
        start = time.monotonic()
        waited = False
        while _no_room(self.saves.values()):
            self.hear()
            if not waited:
                waited = True
                logger.warning("rank %d: waiting for the save before to be written", self.rank)
            time.sleep(0.001)
        return time.monotonic() - start if waited else 0.0

    def _writer_for(self, size: int) -> Writer:
        """Return a living writer whose arena is large enough."""
        needed = size if self.max_host_bytes is None else min(size, self.max_host_bytes)
        writer = self.writer
        if writer is not None and writer.exit_status is None and writer.arena.capacity >= needed:
            return writer
        if writer is not None:
            self._dismiss(writer, 0.0)  # a living one finishes the commits that it still waits for
        self.writer = Writer(needed, self.storage, self.storage_options)
        self._pinned = pin(self.writer.arena)
        return self.writer

    def _send(self, writer: Writer, order: dict[str, Any], plan: FilePlan) -> None:
        if writer.layout is not plan:
            pieces = [piece_record(piece) for piece in plan.pieces]
            layout = {"op": "layout", "id": id(plan), "pieces": pieces, "tensors": tensor_records(plan.tensors)}
            writer.send(layout)
            writer.layout = plan
        writer.arena.begin()
        writer.expect_progress()
        writer.send(order)

    def _wait_until_written(self, save: Save, position: int) -> None:
        """Wait, while staging, until the writer has made room."""
        assert self.writer is not None
        arena = self.writer.arena
        while arena.written < position:
            self.hear()
            if save.error is not None:
                raise CheckpointError(save.error)
            time.sleep(0.001)

    # ------------------------------------------------------------------ when it goes wrong

    def _hangs(self, writer: Writer) -> bool:
        now = time.monotonic()
        if any(save.part_s is None and not save.done for save in self.saves.values()):
            return writer.silent_s() > self.stall_timeout_s
        limit = self.commit_timeout_s + self.stall_timeout_s
        return any(not save.done and now - save.started - (save.part_s or 0) > limit for save in self.saves.values())

    def _dismiss(self, writer: Writer, timeout_s: float) -> None:
        """Let a writer go, and its memory with it."""
        unpin(self._pinned)
        self.writer = self._pinned = None
        writer.close(timeout_s)

    def _give_up(self, writer: Writer, reason: str) -> None:
        """Fail everything that the writer had in hand, and forget the writer."""
        for save in self.saves.values():
            if not save.done:
                save.error = reason
        self._dismiss(writer, 0.0)
        self._report_failures(reason)

    def _fail(self, number: int, save: Save, reason: str) -> None:
        """Record that a save could not be staged."""
        save.error = save.error or reason
        self.saves[number] = save
        if self.writer is not None and self.writer.exit_status is None:
            self.writer.arena.abort()  # it stops waiting, and reports the failure itself
        else:
            self._report_failures(save.error)

    def _report_failures(self, reason: str) -> None:
        """Let the committing rank know at once that parts of this rank will never come, through a fresh writer."""
        orders, self._orders = list(self._orders.values()), {}
        try:
            for order in orders:
                reporter = Writer(_FAILING_CAPACITY, self.storage, self.storage_options)
                reporter.send(order | {"op": "fail", "error": reason})
                reporter.close(timeout_s=0.0)
        except CheckpointError as error:
            logger.warning("rank %d: other ranks could not be told that a save failed: %s", self.rank, error)


def _no_room(saves: Iterable[Save]) -> bool:
    """Whether the arena is in use, or too many saves lie on the node's disk only."""
    saves = list(saves)
    behind = sum(save.local_s is not None and save.part_s is None and not save.done for save in saves)
    return behind >= _MOST_BEHIND or any(save.holds_arena for save in saves)
