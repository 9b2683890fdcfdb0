"""Copies past the cache: every byte, and no other, with and without the compiled library."""

from __future__ import annotations

import ctypes
import shutil

import numpy as np
import pytest

from ckpt import native

SIZES = [0, 1, 63, 64, 4096, 8191, 32767, 32768, 32769, 65536, 100_003, 3 << 20]
GUARD = 256


@pytest.fixture(params=["compiled", "memmove"])
def library(request, monkeypatch):
    if request.param == "memmove":
        monkeypatch.setattr(native, "LIBRARY", None)
    elif native.LIBRARY is None:
        assert not any(map(shutil.which, ("cc", "gcc"))), "a compiler is here, but native.c was not compiled"
        pytest.skip("no compiler")


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, 1), (17, 40)])
def test_a_copy_takes_every_byte_and_no_other(library, shift):
    for size in SIZES:
        source = np.random.default_rng(size).integers(0, 256, size + GUARD, dtype=np.uint8)
        target = np.full(size + 2 * GUARD, 7, dtype=np.uint8)
        begin = GUARD + shift[1]
        native.copy(target.ctypes.data + begin, source.ctypes.data + shift[0], size)
        assert np.array_equal(target[begin : begin + size], source[shift[0] : shift[0] + size])
        assert (target[:begin] == 7).all() and (target[begin + size :] == 7).all()


def test_blocks_go_to_their_places_and_the_counter_follows(library):
    blocks = [np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8) for i, size in enumerate(SIZES)]
    sizes = np.array([len(block) for block in blocks])
    at = 100 + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    sources = np.array([block.ctypes.data for block in blocks], dtype=np.uint64)
    target, staged = np.zeros(100 + sizes.sum(), dtype=np.uint8), ctypes.c_uint64(0)
    table = np.stack([at, sizes], axis=1)  # columns of a table, as a plan's are: not contiguous
    native.copy_all(target.ctypes.data, table[:, 0], sources, table[:, 1], ctypes.addressof(staged), 1 << 20)
    assert np.array_equal(target[100:], np.concatenate(blocks))
    assert staged.value == len(target), "the last block made a mebibyte full"
    before = int(at[-1])
    native.copy_all(target.ctypes.data, at[:-1], sources[:-1], sizes[:-1], ctypes.addressof(staged), 150_000)
    assert 100 < staged.value < before, "told on the way, not at the end"
