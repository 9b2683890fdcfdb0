"""Who is the odd one in a hang: reads the stack dumps of all ranks (Python's faulthandler format). Pure.

In a hang all ranks but the culprit wait in a collective. A rank that did not even write its stack is stopped or stuck
in the kernel; else the culprit is the rank whose innermost frames differ from the rest and are not those of waiting.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+) in (\S+)', re.M)
_WAITING = re.compile(
    r"distributed_c10d|torch/distributed/|param_and_grad_buffer|p2p_communication|finalize_model_grads|"
    r"torch/autograd/graph|tensor_parallel/mappings"
)
_WAITING_FUNCTIONS = {
    "wait",
    "all_reduce",
    "barrier",
    "all_gather",
    "reduce_scatter",
    "finish_grad_sync",
    "recv",
    "isend",
}


@dataclass(frozen=True)
class RankStack:
    """The dump of one rank: its text (empty if it did not answer) and what the kernel says about the process."""

    rank: int
    host: str
    text: str
    state: str = ""
    """Process state and where in the kernel it sleeps, such as "T (stopped)" or "D (disk sleep) in rpc_wait"."""


@dataclass(frozen=True)
class Odd:
    """The verdict: which rank, and why it."""

    rank: int
    host: str
    reason: str
    silent: bool
    """It did not answer at all: the process or its node is at fault, not the program."""


def main_thread(text: str) -> list[str]:
    """Return the frames of the main thread, innermost first, as `function (file:line)`; faulthandler writes it last."""
    start = max(text.rfind("Current thread"), text.rfind("\nThread"), 0)
    blocks = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.M)
    frames = _FRAME.findall(next((b for b in reversed(blocks) if _FRAME.search(b)), text[start:]))
    return [f"{function} ({'/'.join(file.split('/')[-3:])}:{line})" for file, line, function in frames]


def is_waiting(frames: list[str]) -> bool:
    """True when the innermost frames are those of a collective."""
    return any(_WAITING.search(f) or f.split(" ")[0] in _WAITING_FUNCTIONS for f in frames[:3])


def find_odd(stacks: Mapping[int, RankStack]) -> Odd | None:
    """Return the rank that holds up the others; None when the dumps do not tell."""
    silent = sorted(
        (s for s in stacks.values() if not s.text.strip()), key=lambda s: (not s.state.startswith(("T", "D")), s.rank)
    )
    if silent and len(silent) < len(stacks):
        stack = silent[0]
        return Odd(stack.rank, stack.host, f"it did not answer; the process is {stack.state or 'gone'}", True)
    frames = {rank: main_thread(stack.text) for rank, stack in stacks.items()}
    tops = Counter(frames[rank][0].rsplit(":", 1)[0] if frames[rank] else "" for rank in frames)
    busy = [rank for rank in sorted(frames) if not is_waiting(frames[rank])]
    candidates = busy if 0 < len(busy) < len(frames) else sorted(frames)
    rarest = min(candidates, key=lambda r: (tops[frames[r][0].rsplit(":", 1)[0] if frames[r] else ""], r))
    count = tops[frames[rarest][0].rsplit(":", 1)[0] if frames[rarest] else ""]
    if len(candidates) == len(frames) and count * 2 > len(frames):
        return None
    others = next((frames[r][0] for r in sorted(frames) if r != rarest and frames[r]), "nothing")
    where = frames[rarest][0] if frames[rarest] else "an unknown place"
    return Odd(rarest, stacks[rarest].host, f"it is in {where} while others wait in {others}", False)
