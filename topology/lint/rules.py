"""The lint rules, one function each: records in, findings out.

A rail is the absolute NIC index; on a healthy rails-only job GPU i sends and receives on NIC i.
Invariant: rules share no state, and RULES is the complete list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from topology.emit.environment import Entry, table
from topology.lint.parse import Edge, JobLog, Where
from topology.parameters import version_matches


@dataclass(frozen=True)
class Issue:
    """One finding: rule id, `error` / `warning` / `note`, text with remedy, source, evidence, occurrences."""

    rule: str
    severity: str
    message: str
    source: str
    where: Where | None = None
    count: int = 1


@dataclass(frozen=True)
class Expected:
    """What the cluster should look like."""

    gpus: int = 8
    nics: int = 8
    rails_apart: bool = True

    def nic(self, gpu: int) -> int:
        """NIC of a GPU."""
        return gpu * self.nics // self.gpus


Rule = Callable[[JobLog, Expected], Iterator[Issue]]


def lint(log: JobLog, expected: Expected | None = None) -> list[Issue]:
    """All findings, errors first."""
    expected = expected or Expected()
    issues = [issue for rule in RULES for issue in rule(log, expected)]
    return sorted(issues, key=lambda issue: ("error", "warning", "note").index(issue.severity))


def _pairs(log: JobLog) -> Iterator[tuple[Edge, int]]:
    """Sending ends with the NIC that the receiver prints, or the one it ought to use."""
    receives = {(e.channel, e.source, e.target, e.target_gpu): e.nic for e in log.edges if e.end == "receive"}
    for edge in log.edges:
        if edge.end == "send":
            yield edge, receives.get((edge.channel, edge.source, edge.target, edge.target_gpu), -1)


def cross_rail(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """Data that leaves on one rail and is expected on another: hangs where rails do not meet."""
    if not expected.rails_apart:
        return
    bad = []
    for edge, received in _pairs(log):
        if received < 0 and edge.target_gpu >= 0:
            received = expected.nic(edge.target_gpu)
        if received >= 0 and edge.nic != received:
            bad.append((edge, received))
    if bad:
        edge, received = bad[0]
        text = (
            f"rank {edge.source} sends on rail {edge.nic}, rank {edge.target} receives on rail {received}; "
            "rails do not meet, this connection hangs. Set NCCL_CROSS_NIC=0 and NCCL_PXN_DISABLE=0, "
            "and check the rank order"
        )
        yield Issue("cross-rail-edge", "error", text, _NCCL + "2345", edge.where, len(bad))


def cross_rail_rings(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """Rings that leave a node from another local rank than the one they enter the next node at."""
    local = Counter(comm.local_ranks for comm in log.comms if comm.nodes > 1).most_common(1)
    size = local[0][0] if local else expected.gpus
    bad = []
    for ring in log.rings if expected.rails_apart else ():
        pairs = zip(ring.ranks, ring.ranks[1:] + ring.ranks[:1], strict=True)
        bad += [(a, b, ring) for a, b in pairs if a // size != b // size and a % size != b % size]
    if bad and max(max(ring.ranks) for _, _, ring in bad) >= size:
        a, b, ring = bad[0]
        text = f"ring {ring.channel} goes from rank {a} to rank {b} on another node and another rail"
        yield Issue("cross-rail-ring", "error", text, _NCCL + "2345", ring.where, len(bad))
    graph = [(i, o, where) for i, o, where in log.graph_rings if i != o and expected.rails_apart]
    if graph:
        nic_in, nic_out, where = graph[0]
        text = f"the graph search enters the node on NIC {nic_in} and leaves it on NIC {nic_out}"
        yield Issue("cross-rail-graph", "error", text, _NCCL + "2345", where, len(graph))


def relays(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """Connections that go through a peer GPU (PXN), and whether that relay ends on the right rail."""
    relayed = [(edge, received) for edge, received in _pairs(log) if edge.relay >= 0]
    total = sum(edge.end == "send" for edge in log.edges)
    if relayed:
        text = f"{len(relayed)} of {total} network connections are relayed through a peer GPU"
        yield Issue("relay", "note", text, _NCCL + "2385", relayed[0][0].where, len(relayed))


def missing_nics(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """Hosts on which the library found fewer NICs than the node has, or in another order."""
    for (host, names), where in sorted(log.nics.items(), key=lambda item: item[0]):
        if len(names) < expected.nics:
            text = f"{host} uses {len(names)} of {expected.nics} NICs ({', '.join(names)})"
            yield Issue("missing-nic", "error", f"{text}; check links and NCCL_IB_HCA", _MORI, where)
            continue
        order = [int("".join(filter(str.isdigit, name.rpartition("_")[2])) or -1) for name in names]
        if order != sorted(order):
            text = f"{host} lists its NICs as {', '.join(names)}: the position is not the rail"
            yield Issue("nic-order", "error", f"{text}; set NCCL_IB_HCA in rail order", _MORI, where)


def foreign_nics(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """GPUs that send or receive on another GPU's NIC without a relay."""
    bad = []
    for edge in log.edges:
        gpu = edge.source_gpu if edge.end == "send" else edge.target_gpu
        if gpu >= 0 and edge.relay < 0 and edge.nic != expected.nic(gpu) and edge.transport != "Socket":
            bad.append((edge, gpu))
    if bad:
        edge, gpu = bad[0]
        text = f"GPU {gpu} uses NIC {edge.nic} instead of {expected.nic(gpu)}: its own is down or hidden"
        yield Issue("foreign-nic", "warning", text, _MORI, edge.where, len(bad))


def odd_channels(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """Odd channel counts: the last ring has no mirror and crosses rails."""
    for kind, counts in (
        ("collective", [(c, w) for c, _, w in log.channels]),
        ("point-to-point", [(p, w) for _, p, w in log.channels]),
    ):
        odd = [(count, where) for count, where in counts if count % 2 and count > 1]
        if odd:
            text = f"{odd[0][0]} {kind} channels: odd counts cross rails; set an even NCCL_MIN_NCHANNELS"
            yield Issue("odd-channels", "warning", text, _NCCL + "1671", odd[0][1], len(odd))


def cross_nic(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """CROSS_NIC allowed, by the environment or by the search."""
    value, where = log.environment.get("NCCL_CROSS_NIC", ("0", None))
    if expected.rails_apart and value != "0":
        text = f"NCCL_CROSS_NIC={value} lets rings change rails; set it to 0 where rails do not meet"
        yield Issue("cross-nic", "error", text, _NCCL + "1933", where)
    found = [where for cross, _, where in log.patterns if cross]
    if expected.rails_apart and found:
        text = "the graph search settled on crossNic 1: it did not find rings that stay on their rail"
        yield Issue("cross-nic", "error", text, _NCCL + "1933", found[0], len(found))


def relay_off(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """PXN switched off although a communicator needs it."""
    value, where = log.environment.get("NCCL_PXN_DISABLE", ("", None))
    needs = any(
        e.source_gpu >= 0 and e.target_gpu >= 0 and expected.nic(e.source_gpu) != expected.nic(e.target_gpu)
        for e in log.edges
    )
    if expected.rails_apart and needs and value != "0":
        how = "NCCL_PXN_DISABLE=1" if value == "1" else "NCCL_PXN_DISABLE is not set, and RCCL's default is 1"
        text = f"{how}, but ranks on different rails talk to each other; set NCCL_PXN_DISABLE=0"
        yield Issue("relay-off", "error", text, _RCCL + "blob/develop/src/graph/paths.cc", where)


def uneven_rows(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """Communicators whose nodes contribute different numbers of ranks."""
    bad = [comm for comm in log.comms if comm.nodes > 1 and comm.ranks != comm.nodes * comm.local_ranks]
    if bad:
        comm = bad[0]
        text = f"{comm.ranks} ranks on {comm.nodes} nodes with {comm.local_ranks} here: uneven rows deadlock "
        text += "rail trees; drop whole nodes or set RCCL_DISABLE_RAIL_TREES=1"
        source = "https://github.com/meta-pytorch/torchcomms/pull/760"
        yield Issue("uneven-rows", "error", text, source, comm.where, len(bad))


def transports(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """Traffic over TCP sockets, or RDMA without direct GPU access."""
    sockets = [edge for edge in log.edges if edge.transport == "Socket"]
    if sockets:
        text = "connections use TCP sockets: the RDMA NICs or their plugin were not found"
        yield Issue("socket-transport", "error", text, _RCCL + "pull/2078", sockets[0].where, len(sockets))
    bounced = [edge for edge in log.edges if edge.transport != "Socket" and not edge.gdr]
    if bounced:
        text = "RDMA without GPU-direct: data is bounced through host memory; check the peer-memory driver"
        yield Issue("no-gpu-direct", "warning", text, _RCCL + "issues/419", bounced[0].where, len(bounced))


def version_traps(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """Known defects of the versions that the log names, and variables that hang with relays."""
    facts = {"rails_apart"} if expected.rails_apart else set()
    if any(edge.relay >= 0 for edge in log.edges):
        facts.add("relay")
    for entry in table("defects"):
        if (entry.rccl or entry.rocm) and _gated(entry, log) and set(entry.when) <= facts:
            yield Issue("version-trap", "warning", f"{entry.text}; {entry.remedy}", entry.source)
    value, where = log.environment.get("NCCL_NCHANNELS_PER_NET_PEER", ("", None))
    if value == "4" and "relay" in facts:
        text = "NCCL_NCHANNELS_PER_NET_PEER=4 with relays hangs uneven all-to-all; unset it"
        yield Issue("version-trap", "error", text, _NCCL + "1835", where)


def _gated(entry: Entry, log: JobLog) -> bool:
    """True when the log names a version and it fulfils the entry's condition."""
    rccl = not entry.rccl or bool(log.rccl and version_matches(log.rccl, entry.rccl))
    return rccl and (not entry.rocm or bool(log.rocm and version_matches(log.rocm, entry.rocm)))


def time_outs(log: JobLog, expected: Expected) -> Iterator[Issue]:
    """The hang itself."""
    if log.trouble:
        text = "a connection or a collective timed out; the other findings tell why, or a peer died"
        yield Issue("time-out", "error", text, _NCCL + "1814", log.trouble[0], len(log.trouble))


_NCCL = "https://github.com/NVIDIA/nccl/issues/"
_MORI = "https://github.com/ROCm/mori/issues/370"
_RCCL = "https://github.com/ROCm/rccl/"
RULES: tuple[Rule, ...] = (
    cross_rail,
    cross_rail_rings,
    relays,
    missing_nics,
    foreign_nics,
    odd_channels,
    cross_nic,
    relay_off,
    uneven_rows,
    transports,
    version_traps,
    time_outs,
)
