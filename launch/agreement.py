"""Do all ranks mean the same job? Asked before torch is imported, answered within `DEADLINE_S`.

Every rank sends its facts to rank 0 over TCP, one JSON line; rank 0 compares them, and sends every rank the same
verdict. A host that never answers, another run file, another version, another value of a communication variable or a
clock that is off: each is named with its host, instead of a hang in the first collective. Standard library only.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from launch.env import RankContext
from launch.errors import LaunchError
from launch.ports import is_free

DEADLINE_S = 60.0
CLOCK_TOLERANCE_S = 5.0
PACKAGES = ("torch", "megatron-core", "numpy", "megatron-zaya")
PREFIXES = (
    "NCCL_",
    "RCCL_",
    "HSA_",
    "GLOO_",
    "UCX_",
    "TORCH_NCCL_",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "GPU_MAX_HW_QUEUES",
)
LOCAL_VARIABLES = frozenset({"NCCL_DEBUG_FILE", "NCCL_TOPO_DUMP_FILE", "NCCL_GRAPH_DUMP_FILE"})


def gather_facts(
    context: RankContext, job: Mapping[str, str], environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what must be equal on every rank, and what identifies this one.

    Args:
        context: the identity of this rank.
        job: facts of the caller, such as the digest of the resolved run file.
        environ: variables to read instead of this process' own.
    """
    from importlib.metadata import PackageNotFoundError, version  # the controller imports this module too: not there

    environ = os.environ if environ is None else environ
    equal = {"world size": str(context.world_size), "ranks per node": str(context.local_world_size), **job}
    equal["python"] = sys.version.split()[0]
    for package in PACKAGES:
        try:
            equal[package] = version(package)
        except PackageNotFoundError:
            equal[package] = "not installed"
    for name in sorted(environ):
        if name.startswith(PREFIXES) and name not in LOCAL_VARIABLES:
            equal[name] = environ[name]
    return {"rank": context.rank, "host": socket.gethostname(), "equal": equal, "time": time.time()}


def compare(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one sentence per disagreement; the minority is named. Empty when all agree.

    Each record is what `gather_facts` returns, with `skew_s` (clock of the sender less the receiver's) if known.
    """
    problems = []
    names = sorted({name for record in records for name in record["equal"]})
    for name in names:
        values = Counter(record["equal"].get(name, "(not set)") for record in records)
        if len(values) > 1:
            common = values.most_common(1)[0][0]
            odd = {
                v: _who([r for r in records if r["equal"].get(name, "(not set)") == v]) for v in values if v != common
            }
            text = "; ".join(f"{value!r} on {who}" for value, who in odd.items())
            problems.append(f"{name} is {common!r} on {values[common]} of {len(records)} ranks, but {text}")
    for record in records:
        skew = record.get("skew_s", 0.0)
        if abs(skew) > CLOCK_TOLERANCE_S:
            problems.append(
                f"the clock of {_who([record])} is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} rank 0's "
                f"(more than {CLOCK_TOLERANCE_S:g} s): check chrony or ntpd there"
            )
    return problems


def _who(records: Sequence[Mapping[str, Any]]) -> str:
    hosts: dict[str, list[int]] = {}
    for record in records:
        hosts.setdefault(record["host"], []).append(record["rank"])
    shown = [f"{host} (rank{'s' * (len(ranks) > 1)} {_ranks(ranks)})" for host, ranks in list(hosts.items())[:8]]
    return ", ".join(shown) + (f" and {len(hosts) - 8} more hosts" if len(hosts) > 8 else "")


def _ranks(ranks: list[int]) -> str:
    ranks = sorted(ranks)
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))


def agree(context: RankContext, facts: Mapping[str, Any], deadline_s: float = DEADLINE_S) -> None:
    """Return when every rank has the same facts. Collective; blocks until all have answered or ``deadline_s`` passed.

    Raises:
        LaunchError: on every rank that could be reached, naming what differs and where, or who did not answer.
    """
    if context.is_single:
        return
    problems = (_collect if context.rank == 0 else _report)(context, facts, deadline_s)
    if problems:
        raise LaunchError("the ranks do not agree, so nothing was started:\n  " + "\n  ".join(problems))


def _collect(context: RankContext, facts: Mapping[str, Any], deadline_s: float) -> list[str]:
    """Rank 0: take all records, send everyone the verdict."""
    _check_meeting_port(context)
    deadline = time.monotonic() + deadline_s
    records: dict[int, dict[str, Any]] = {0: dict(facts)}
    duplicates: list[str] = []
    peers: list[socket.socket] = []
    buffers: dict[socket.socket, bytes] = {}
    with _listen(context) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while len(records) < context.world_size and time.monotonic() < deadline:
            for key, _ in selector.select(0.1):
                if key.fileobj is server:
                    peer, _ = server.accept()
                    peers.append(peer)
                    buffers[peer] = b""
                    selector.register(peer, selectors.EVENT_READ)
                    continue
                peer = key.fileobj  # type: ignore[assignment]
                data = _received(peer)
                buffers[peer] += data
                if not data or buffers[peer].endswith(b"\n"):
                    selector.unregister(peer)
                    _take(buffers[peer], records, duplicates)
        problems = [*duplicates, *_absent(context, records, deadline_s), *compare(list(records.values()))]
        for peer in peers:
            _send_verdict(peer, problems)
    return problems


def _check_meeting_port(context: RankContext) -> None:
    for port in (context.master_port, context.agreement_port):
        if not is_free(port):
            raise LaunchError(
                f"port {port} on {socket.gethostname()} (rank 0) is in use: another job of yours may still be ending; "
                f"wait, or set MASTER_PORT (and leave MASTER_PORT+1 free; now MASTER_PORT={context.master_port})"
            )


def _listen(context: RankContext) -> socket.socket:
    return socket.create_server(("", context.agreement_port), backlog=4096)


def _received(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1 << 16)
    except OSError:
        return b""


def _take(line: bytes, records: dict[int, dict[str, Any]], duplicates: list[str]) -> None:
    try:
        record = json.loads(line)
        rank = int(record["rank"])
    except (ValueError, KeyError, TypeError):
        return  # a stranger at the port, or a peer that died; it is missed in the count
    record["skew_s"] = record["time"] - time.time()
    if rank in records:
        duplicates.append(f"rank {rank} was given twice: to {_who([records[rank]])} and to {_who([record])}")
    records[rank] = record


def _absent(context: RankContext, records: Mapping[int, Any], deadline_s: float) -> list[str]:
    missing: dict[str, list[int]] = {}
    for rank in range(context.world_size):
        if rank not in records:
            missing.setdefault(context.host_of(rank), []).append(rank)
    return [
        f"{host}: no answer from rank{'s' * (len(ranks) > 1)} {_ranks(ranks)} within {deadline_s:g} s; is the node "
        f"up, and does it reach {context.master_addr} port {context.agreement_port}?"
        for host, ranks in missing.items()
    ]


def _send_verdict(peer: socket.socket, problems: list[str]) -> None:
    with peer:
        try:
            peer.settimeout(5)
            peer.sendall(json.dumps(problems).encode() + b"\n")
        except OSError:
            pass  # it is gone; that rank's own error says why


def _report(context: RankContext, facts: Mapping[str, Any], deadline_s: float) -> list[str]:
    """Every other rank: send the record, wait for the verdict."""
    deadline = time.monotonic() + deadline_s
    address = (context.master_addr, context.agreement_port)
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=5) as peer:
                peer.sendall(json.dumps({**facts, "time": time.time()}).encode() + b"\n")
                peer.settimeout(deadline_s + 5)
                line = b"".join(iter(lambda: peer.recv(1 << 16), b""))
            if line:
                verdict: list[str] = json.loads(line)
                return verdict
        except socket.gaierror as error:
            raise LaunchError(
                f"{socket.gethostname()} cannot resolve {context.master_addr!r}, the host of rank 0 "
                f"({error.strerror}): check the hostfile and the name service of this node"
            ) from None
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.1)
    return [
        f"{socket.gethostname()} (rank {context.rank}) did not reach rank 0 at {address[0]} port {address[1]} within "
        f"{deadline_s:g} s: {reason}"
    ]
