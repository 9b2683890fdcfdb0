"""NCCL/RCCL log lines to records.

Understands the INIT, NET, GRAPH and ENV lines of NCCL 2.12 to 2.28 and of RCCL, with or without an srun task
label in front. Invariant: lines that are not understood are skipped, never guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from topology.errors import TopologyError

_LINE = re.compile(r"(?P<host>[\w.-]+):\d+:\d+ (?:\[(?P<dev>\d+)\] )?NCCL (?:INFO|WARN) (?P<text>.*)$")
_VERSION = re.compile(r"\b(?:NCCL|RCCL) version\s*:?\s*(\d+\.\d+\.\d+)(?:\S*hip(\d+\.\d+))?")
_ROCM = re.compile(r"\bROCm version\s*:?\s*(\d+\.\d+(?:\.\d+)?)")
_ENV = re.compile(r"\b((?:NCCL|RCCL)_\w+) set by environment to (\S+?)\.?$")
_USING = re.compile(r"NET/(?:IB|\w+) : Using (.*?)(?:; OOB|$)")
_NIC = re.compile(r"\[\d+\]([\w-]+?):\d+")
_EDGE = re.compile(
    r"Channel (\d+)/(\d+) : (\d+)\[(\w+)\] -> (\d+)\[(\w+)\] \[(send|receive)\] via NET/([\w.-]+)/(\d+)"
    r"(?:\((\d+)\))?(\S*)"
)
_RING = re.compile(r"Channel (\d+)/(\d+) :((?:\s+\d+)+)\s*$")
_CHANNELS = re.compile(r"(\d+) coll channels,.*?(\d+) p2p channels,")
_COMM = re.compile(r"comm (0x[0-9a-f]+) rank (\d+) nRanks (\d+) nNodes (\d+) localRanks (\d+)")
_PATTERN = re.compile(r"Pattern (\d+), crossNic (\d+), nChannels (\d+)")
_GRAPH = re.compile(r"^\s*(\d+) :\s+NET/(?:\d+-)?(\d+) .*NET/(?:\d+-)?(\d+)\s*$")
_TROUBLE = re.compile(r"Connection timed out|Got completion from peer .* status=12|Watchdog caught collective")


@dataclass(frozen=True)
class Where:
    """A line of a log, for evidence."""

    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Edge:
    """One network connection as one of its ends prints it. `relay` is the proxy rank, -1 without."""

    channel: int
    source: int
    source_gpu: int
    target: int
    target_gpu: int
    end: str
    transport: str
    nic: int
    relay: int
    gdr: bool
    where: Where


@dataclass(frozen=True)
class Ring:
    """A ring in rank order."""

    channel: int
    ranks: tuple[int, ...]
    where: Where


@dataclass(frozen=True)
class Comm:
    """Sizes of one communicator as one of its ranks prints them."""

    ranks: int
    nodes: int
    local_ranks: int
    where: Where


@dataclass
class JobLog:
    """Everything understood from the logs of one job."""

    rccl: str = ""
    rocm: str = ""
    environment: dict[str, tuple[str, Where]] = field(default_factory=dict)
    nics: dict[tuple[str, tuple[str, ...]], Where] = field(default_factory=dict)  # host and its NIC list
    edges: list[Edge] = field(default_factory=list)
    rings: list[Ring] = field(default_factory=list)
    comms: list[Comm] = field(default_factory=list)
    channels: list[tuple[int, int, Where]] = field(default_factory=list)  # collective, point to point
    patterns: list[tuple[int, int, Where]] = field(default_factory=list)  # crossNic, channels
    graph_rings: list[tuple[int, int, Where]] = field(default_factory=list)  # NIC in, NIC out
    trouble: list[Where] = field(default_factory=list)
    lines: int = 0


def read_logs(paths: Iterable[Path]) -> JobLog:
    """Parse log files together. Raises TopologyError when one is missing or none holds NCCL output."""
    log = JobLog()
    for path in paths:
        try:
            with path.open(encoding="utf-8", errors="replace") as lines:
                parse_lines(lines, str(path), log)
        except OSError as error:
            raise TopologyError(f"cannot read the log: {error.strerror}", where=str(path)) from None
    if not log.lines:
        raise TopologyError(
            "no NCCL output found",
            where=", ".join(map(str, paths)),
            remedy="run the job with NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,GRAPH,ENV,NET",
        )
    return log


def parse_lines(lines: Iterable[str], name: str, log: JobLog) -> None:
    """Add the records of some lines to `log`."""
    for number, raw in enumerate(lines, 1):
        text = raw.rstrip("\n")
        match = _LINE.search(text)
        message = match["text"] if match else text
        where = Where(name, number, text.strip())
        if _versions(message, log) or not match:
            if _TROUBLE.search(message):
                log.trouble.append(where)
            continue
        log.lines += 1
        _record(match["host"], message, where, log)


def _versions(message: str, log: JobLog) -> bool:
    version, rocm = _VERSION.search(message), _ROCM.search(message)
    if version:
        log.rccl = version[1]
        log.rocm = log.rocm or version[2] or ""
        log.lines += 1
    if rocm:
        log.rocm = rocm[1]
    return bool(version or rocm)


def _record(host: str, message: str, where: Where, log: JobLog) -> None:
    """Store the one record that the message holds, if any."""
    if m := _EDGE.search(message):
        log.edges.append(_edge(m, where))
    elif m := _RING.search(message):
        log.rings.append(Ring(int(m[1]), tuple(map(int, m[3].split())), where))
    elif m := _ENV.search(message):
        log.environment[m[1]] = (m[2], where)
    elif m := _USING.search(message):
        log.nics.setdefault((host, tuple(_NIC.findall(m[1]))), where)
    elif m := _CHANNELS.search(message):
        log.channels.append((int(m[1]), int(m[2]), where))
    elif m := _COMM.search(message):
        log.comms.append(Comm(int(m[3]), int(m[4]), int(m[5]), where))
    elif m := _PATTERN.search(message):
        log.patterns.append((int(m[2]), int(m[3]), where))
    elif m := _GRAPH.search(message):
        log.graph_rings.append((int(m[2]), int(m[3]), where))
    elif _TROUBLE.search(message):
        log.trouble.append(where)


def _edge(m: re.Match[str], where: Where) -> Edge:
    def gpu(text: str) -> int:
        """Device index; -1 for the hexadecimal bus ids that NCCL printed before 2.18."""
        return int(text) if text.isdigit() and int(text) < 64 else -1

    return Edge(
        channel=int(m[1]),
        source=int(m[3]),
        source_gpu=gpu(m[4]),
        target=int(m[5]),
        target_gpu=gpu(m[6]),
        end=m[7],
        transport=m[8],
        nic=int(m[9]),
        relay=int(m[10]) if m[10] else -1,
        gdr="GDRDMA" in m[11],
        where=where,
    )
