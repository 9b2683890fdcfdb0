"""What a training process asks of its C library's allocator."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_NEVER = -1  # as a size: no heap is that large


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, ready for the next step, instead of going back to the system.

    Without an accelerator the activations and gradients of a step are ordinary memory, freed in one step and asked
    for in the next. By default glibc returns blocks of megabytes as soon as they lie at the end of its heap, and the
    kernel hands them out again page by page, zeroed: a page fault for every 4 KiB of every step. The process keeps the
    memory of its largest step in exchange; torch does the same with an accelerator's.

    Threads share the one heap: those of a collective would have heaps of their own, of 64 MiB at most, and glibc maps
    what is larger anew each time, whatever it is told (gloo gathers the parameters into one such block per step).

    Returns:
        False where the C library is not glibc; nothing has changed then.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, _NEVER), mallopt(_M_ARENA_MAX, 1)])
