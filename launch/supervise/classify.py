"""What killed a job, and where: from exit statuses, the last lines of logs, the kernel's records and lost nodes.

When one rank dies, all others fail a moment later with network errors. So a network error counts only when nobody has
a better one, and among equals the earliest counts. Pure.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

NODE, HANG, INPUT = "node", "hang", "input"
DEVICE, DEVICE_MEMORY, NETWORK, HOST_MEMORY = "device", "device memory", "network", "host memory"
DISK, USER_CODE, NUMERICAL = "disk", "user code", "numerical"

# In this order: the first category with a matching line is the rank's.
SIGNATURES: tuple[tuple[str, str], ...] = (
    (NUMERICAL, r"the loss is (nan|-?inf)|the gradient norm is (nan|-?inf)|found NaN in local"),
    (DISK, r"No space left on device|Disk quota exceeded|Read-only file system|Stale file handle|Input/output error"),
    (DEVICE_MEMORY, r"(HIP|CUDA) out of memory|torch\.OutOfMemoryError|hipErrorOutOfMemory"),
    (
        DEVICE,
        r"HSA_STATUS_ERROR|hipError[A-Z]\w+|HIP error:|CUDA error:|Memory access fault by GPU|"
        r"amdgpu.*(ring \S+ timeout|GPU reset|uncorrectable|RAS)|NVRM: Xid|uncorrectable ECC|HW Exception by GPU|"
        r"No (HIP|CUDA) GPUs are available",
    ),
    (
        HOST_MEMORY,
        r"MemoryError|Cannot allocate memory|bad_alloc|DefaultCPUAllocator|Out of memory: Killed|oom-kill",
    ),
    (
        NETWORK,
        r"ncclSystemError|ncclRemoteError|ncclInternalError|NCCL WARN|unhandled (system|cuda) error|IBV_WC_|"
        r"ibv_\w+ failed|Connection (reset|refused|closed|timed out)|Connection closed by peer|No route to host|"
        r"Broken pipe|Network is unreachable|DistNetworkError|DistStoreError|recvValue failed|connectFullMesh failed|"
        r"Watchdog caught collective operation timeout|Timed out (waiting|after)|[Ss]ocket [Tt]imeout",
    ),
)
_COMPILED = tuple((category, re.compile(pattern)) for category, pattern in SIGNATURES)
# torch puts the rank in front.
_EXCEPTION = re.compile(r"(?:\[rank\d+\]: ?)?(\w[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)")
_KILLED = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


@dataclass(frozen=True)
class RankExit:
    """A rank that has ended. ``status`` is the exit status, negative for a signal."""

    rank: int
    host: str
    status: int
    time: float
    tail: str = ""
    """End of its log."""
    kernel: tuple[str, ...] = ()
    """Lines of the kernel about this process or its devices, and a full disk, as the agent found them."""


@dataclass(frozen=True)
class Cause:
    """Why the job failed."""

    category: str
    reason: str
    rank: int | None = None
    host: str = ""
    evidence: tuple[str, ...] = field(default=())

    def sentence(self) -> str:
        """The cause on one line."""
        who = f"rank {self.rank} on {self.host}" if self.rank is not None else self.host
        return f"{self.category}: {who}: {self.reason}" if who else f"{self.category}: {self.reason}"


def _matching(text: str, pattern: re.Pattern[str]) -> list[str]:
    return [line.strip()[:400] for line in text.splitlines() if pattern.search(line)][-3:]


def classify_exit(exit: RankExit) -> Cause:
    """Return the cause that one rank's end points to."""
    kernel = "\n".join(exit.kernel)

    def cause(category: str, reason: str, *evidence: str) -> Cause:
        return Cause(category, reason[:400], exit.rank, exit.host, evidence)

    if exit.status == 2 and "zaya: " in exit.tail:
        said = [line for line in exit.tail.splitlines() if line.startswith("zaya: ")][-1]
        return cause(INPUT, said.removeprefix("zaya: "), exit.tail[-2000:])
    for category, pattern in _COMPILED:
        lines = _matching(kernel, pattern) or _matching(exit.tail, pattern)
        if lines:
            return cause(category, lines[-1], *lines)
    if exit.status == -signal.SIGKILL:
        return cause(HOST_MEMORY, "SIGKILL from outside, as the kernel does when memory runs out; it left no record")
    if -exit.status in _KILLED:
        return cause(USER_CODE, f"ended by {signal.Signals(-exit.status).name}", exit.tail[-1000:])
    if "Traceback" in exit.tail:
        last = [match[1] for match in map(_EXCEPTION.match, exit.tail.splitlines()) if match]
        return cause(USER_CODE, last[-1] if last else "an exception", exit.tail[-2000:])
    return cause(USER_CODE, f"exit status {exit.status}", exit.tail[-1000:])


def find_cause(exits: Sequence[RankExit], lost_hosts: Sequence[str]) -> Cause:
    """Return the first cause among everything that was seen to fail. At least one of both must be given."""
    if lost_hosts:
        return Cause(NODE, "the node does not answer any more", host=lost_hosts[0], evidence=tuple(lost_hosts))
    causes = [(classify_exit(exit), exit.time) for exit in exits]
    first, _ = min(causes, key=lambda pair: (pair[0].category == NETWORK, pair[1]))
    return first
