"""The shared memory of a rank and its writer: where it lies, what it is made of, that it goes away."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from ckpt.storage import ALIGNMENT, LARGE_PAGE
from ckpt.writer.arena import CHUNK_BYTES, Arena

SHARED_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def mapping_of(address: int) -> dict[str, int]:
    """Return the kernel's account of the mapping that begins at ``address``, in KiB by name; empty if there is none."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            rows = (next(lines).split() for _ in range(20))
            return {row[0].rstrip(":"): int(row[1]) for row in rows if row[-1] == "kB"}
    return {}


@pytest.mark.parametrize("capacity", [1, CHUNK_BYTES, 5 * CHUNK_BYTES - 1])
def test_two_mappings_are_one_memory_at_the_start_of_a_large_page(capacity):
    arena = Arena.create(capacity)
    other = Arena(os.dup(arena.fd), arena.capacity)
    assert arena.capacity == -(-capacity // CHUNK_BYTES) * CHUNK_BYTES == len(arena.ring)
    assert (arena.address - ALIGNMENT) % LARGE_PAGE == (other.address - ALIGNMENT) % LARGE_PAGE == 0
    assert not any(arena.ring) and not any(arena.control)
    arena.ring[0], arena.ring[arena.capacity - 1], arena.staged = 1, 2, 3
    assert (other.ring[0], other.ring[arena.capacity - 1], other.staged) == (1, 2, 3)
    other.close()
    arena.close()


def test_every_page_is_there_from_the_start_and_gone_in_the_end():
    arena = Arena.create(4 * CHUNK_BYTES)
    begin, size = arena.address - ALIGNMENT, ALIGNMENT + arena.capacity
    assert mapping_of(begin)["Rss"] == size >> 10
    arena.close()
    assert not mapping_of(begin)


def test_shared_memory_has_large_pages_without_an_operators_doing():
    release = tuple(int(number) for number in platform.release().split(".")[:2])
    if release < (6, 1) or not SHARED_LARGE_PAGES.exists() or "[deny]" in SHARED_LARGE_PAGES.read_text():
        pytest.skip("this kernel joins no pages of shared memory")
    arena = Arena.create(4 * CHUNK_BYTES)
    assert mapping_of(arena.address - ALIGNMENT)["ShmemPmdMapped"] == arena.capacity >> 10
    arena.close()
