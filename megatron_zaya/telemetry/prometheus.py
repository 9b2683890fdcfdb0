"""Prometheus: the metrics of a run over HTTP, or as a file for node_exporter where a node may open no port.

One endpoint per run: the first rank speaks for all. Its labels name the job as AMD's device metrics exporter does.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from megatron_zaya.telemetry.events import Event, RunEnded, RunStarted, StepDone
from megatron_zaya.telemetry.metrics import JOB_LABELS, METRICS, STEP_BUCKETS_S, SUSPECTED, SUSPECTED_HELP, MetricState

SUSPICION_FACTOR = 10
LEAST_SUSPICION_S = 30.0
FIRST_STEP_S = 600.0


class HangWatch:
    """Suspects a hang when nothing was heard for ten times the slowest of the last steps."""

    def __init__(self) -> None:
        self.last: float | None = None
        self.steps_s: deque[float] = deque(maxlen=100)

    def handle(self, event: Event, when: float) -> None:
        """Hear of an event."""
        self.last = None if isinstance(event, RunEnded) else when
        if isinstance(event, StepDone):
            self.steps_s.append(event.step_time_s)

    def suspects(self, now: float) -> bool:
        """Return whether it has been quiet for too long."""
        limit = max(LEAST_SUSPICION_S, SUSPICION_FACTOR * max(self.steps_s)) if self.steps_s else FIRST_STEP_S
        return self.last is not None and now - self.last > limit


class RunCollector(Collector):
    """Turns the state of the metrics into what Prometheus' client writes. Filled by one thread, read by others."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels = [labels.get(name, "") for name in JOB_LABELS]
        self.state, self.watch, self.lock = MetricState(), HangWatch(), threading.Lock()

    def handle(self, event: Event, when: float) -> None:
        """Take an event."""
        with self.lock:
            self.state.handle(event, when)
            self.watch.handle(event, when)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric that has a value."""
        with self.lock:
            yield from list(self._families())

    def _families(self) -> Iterator[Metric]:
        seen = set()
        for metric in METRICS:
            values = self.state.values.get(metric.name)
            if values is None or metric.name in seen:
                continue
            seen.add(metric.name)
            if metric.kind == "histogram":
                histogram = HistogramMetricFamily(metric.name, metric.help, labels=JOB_LABELS)
                bounds = [*map(str, STEP_BUCKETS_S), "+Inf"]
                counts = self.state.buckets[metric.name]
                cumulated = [(bound, sum(counts[: place + 1])) for place, bound in enumerate(bounds)]
                histogram.add_metric(self.labels, cumulated, values[""])
                yield histogram
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            own = [metric.label] if metric.label else []
            family = kind(metric.name, metric.help, labels=[*JOB_LABELS, *own])
            for label, value in values.items():
                family.add_metric([*self.labels, label] if own else self.labels, value)
            yield family
        suspicion = GaugeMetricFamily(SUSPECTED, SUSPECTED_HELP, labels=JOB_LABELS)
        suspicion.add_metric(self.labels, float(self.watch.suspects(time.time())))
        yield suspicion


class PrometheusSink:
    """Serves the metrics at `http://host:port/metrics`."""

    def __init__(self, labels: Mapping[str, str], host: str, port: int) -> None:
        self.collector, self.address = RunCollector(labels), (host, port)

    def open(self) -> None:
        """Listen. Raises OSError where the port is taken."""
        registry = CollectorRegistry()
        registry.register(self.collector)
        host, port = self.address
        try:
            self.server, self.thread = start_http_server(port, host, registry)
        except OSError as error:
            reason = f"cannot listen on {host}:{port} ({error.strerror}); set telemetry.prometheus_port"
            raise OSError(reason) from None

    def handle(self, event: Event, when: float) -> None:
        """Update the metrics."""
        self.collector.handle(event, when)

    def close(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class TextfileSink:
    """Rewrites a file for node_exporter's textfile collector, whole or not at all, every ``interval_s`` seconds."""

    def __init__(self, labels: Mapping[str, str], folder: Path, interval_s: float) -> None:
        """Name the file after run and job, so that the jobs of a node do not share one."""
        names = [labels[name] for name in ("run", "job_id") if labels.get(name)]
        self.path = folder / f"{'_'.join(['zaya', *names])}.prom"
        self.collector, self.interval_s = RunCollector(labels), interval_s
        self.error: Exception | None = None
        self.ended = False

    def open(self) -> None:
        """Start to write."""
        self.registry = CollectorRegistry()
        self.registry.register(self.collector)
        self._stop = threading.Event()
        self._writer = threading.Thread(target=self._write_often, name="telemetry textfile", daemon=True)
        self._writer.start()

    def _write(self) -> None:
        write_to_textfile(str(self.path), self.registry)

    def _write_often(self) -> None:
        while not self._stop.wait(self.interval_s) and self.error is None:
            try:
                self._write()
            except OSError as error:
                self.error = error

    def handle(self, event: Event, when: float) -> None:
        """Update the metrics. Raises the error of the writing thread, if it had one."""
        if self.error is not None:
            raise self.error
        self.collector.handle(event, when)
        self.ended = isinstance(event, RunEnded) or (self.ended and not isinstance(event, RunStarted))

    def close(self) -> None:
        """Remove the file of a run that ended in order; that of a run that died stays, so that the alerts see it."""
        self._stop.set()
        self._writer.join()
        if self.ended:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        else:
            self._write()
