"""The stream of events, and what keeps its consumers away from training.

Invariant: `EventStream.emit` never blocks and never raises. Each sink has a queue and a thread of its own. A sink that
raises is left out after one warning, one that is too slow misses events, which are counted; the others go on.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_zaya.telemetry.events import Event, SinkTrouble

logger = logging.getLogger(__name__)

QUEUE_EVENTS = 4096
"""Events that may wait for a sink before it misses some: minutes of steps, a few megabytes."""
CLOSE_TIMEOUT_S = 30.0
"""How long the end of a run waits for its sinks, all together."""


class Sink(Protocol):
    """A consumer of events; all its calls come from a thread of its own, on one rank, so it may block."""

    def open(self) -> None:
        """Get ready; called once, first."""

    def handle(self, event: Event, when: float) -> None:
        """Take one event and the time of it, seconds since 1970."""

    def close(self) -> None:
        """Flush and release; called once, and not after another call has raised."""


class SinkRunner:
    """One sink, its queue and its thread."""

    def __init__(self, sink: Sink, report: Callable[[Event], None], capacity: int) -> None:
        self.sink, self.name, self.report = sink, type(sink).__name__, report
        self.missed = 0
        """Events that the sink did not get."""
        self.failed = False
        self._waiting: queue.Queue[tuple[Event, float] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._work, name=f"telemetry {self.name}", daemon=True)

    def start(self) -> None:
        """Start to work."""
        self._thread.start()

    def offer(self, event: Event, when: float) -> None:
        """Hand over an event, or count it as missed. Does not block."""
        if self.failed:
            return
        try:
            self._waiting.put_nowait((event, when))
        except queue.Full:
            self.missed += 1
            if self.missed == 1:
                self._say(f"is slow: {self._waiting.maxsize} events wait for it, and it misses some")

    def _say(self, reason: str) -> None:
        logger.warning("telemetry: %s %s", self.name, reason)
        self.report(SinkTrouble(self.name, reason, self.missed))

    def _work(self) -> None:
        try:
            self.sink.open()
            while (item := self._waiting.get()) is not None:
                self.sink.handle(*item)
            self.sink.close()
        except Exception as error:
            self.failed = True
            self._say(f"failed and is left out: {type(error).__name__}: {error}")

    @property
    def backlog(self) -> int:
        """Events that wait for the sink."""
        return self._waiting.qsize()

    def finish(self, deadline: float) -> None:
        """Ask the sink to end with what waits for it."""
        with contextlib.suppress(queue.Full):  # join gives up at the same moment, and says so
            self._waiting.put(None, timeout=max(0.0, deadline - time.monotonic()))

    def join(self, deadline: float) -> None:
        """Wait for the end until ``deadline`` (monotonic)."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("telemetry: %s did not come to its end; %d events lost", self.name, self.backlog)


class EventStream:
    """Hands each event to every sink, in order."""

    def __init__(self, sinks: Sequence[Sink] = (), capacity: int = QUEUE_EVENTS) -> None:
        """Start a thread for each sink; each gets events from now on until `close`."""
        self.runners = [SinkRunner(sink, self.emit, capacity) for sink in sinks]
        for runner in self.runners:  # only now: one that fails at once is news for all others
            runner.start()

    def emit(self, event: Event) -> None:
        """Deliver ``event``. Any thread."""
        when = time.time()
        for runner in self.runners:
            runner.offer(event, when)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Let every sink finish what waits for it, for ``timeout_s`` in all, and close them. Idempotent."""
        for runner in self.runners:
            if runner.missed > 1:
                self.emit(SinkTrouble(runner.name, "was too slow", runner.missed))
        runners, self.runners = self.runners, []
        deadline = time.monotonic() + timeout_s
        # The slowest last: it must not use up the time of the others.
        for runner in sorted(runners, key=lambda runner: runner.backlog):
            runner.finish(deadline)
        for runner in runners:
            runner.join(deadline)
