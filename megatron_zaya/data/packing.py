"""Documents into windows of one length, none of them cut in two: best fit, decreasing (arXiv 2605.05365, section IV-A).

Cutting a stream of long reasoning at fixed places leaves answers without their question, which teaches a model to make
things up. Here a window holds whole documents and what is left of it is padding. A document longer than a window keeps
its question and its answer and loses the end of its reasoning, if the marks of the reasoning are known; without them
it is cut into windows. The result is an ordinary `.bin/.idx` pair whose documents are exactly one window each, so that
every sample of Megatron-Core's dataset is a window. As a command: `zaya data pack PREFIX OUTPUT_PREFIX`.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_zaya.data.errors import DataError
from megatron_zaya.data.index_file import SIDECAR_FORMAT, bin_path, read_index, read_sidecar
from megatron_zaya.data.output import PairWriter
from megatron_zaya.data.tokenizer import NO_PAD, Tokenizer, load_tokenizer

READ_DTYPES = {2: np.uint16, 4: np.int32}


@dataclass(frozen=True)
class PackReport:
    """What `pack` did. Tokens of padding are those that fill windows."""

    prefix: Path
    seq_length: int
    windows: int
    documents: int
    trimmed: int
    """Documents that lost a part of their reasoning."""
    cut: int
    """Documents without marks that were cut into windows."""
    left_out: int
    """Documents whose question and answer alone are longer than a window."""
    padding_tokens: int

    def summary(self) -> str:
        """One line for the user."""
        share = self.padding_tokens / max(1, self.windows * self.seq_length)
        return (
            f"{self.prefix}: {self.documents:,} documents in {self.windows:,} windows of {self.seq_length:,} tokens, "
            f"{share:.2%} padding; {self.trimmed:,} trimmed, {self.cut:,} cut, {self.left_out:,} left out"
        )


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the indices of the items of each bin: the longest item first, into the fullest bin that takes it.

    Needs at most 11/9 of the fewest possible bins, and one. Equal lengths keep their order.

    Raises:
        ValueError: an item is longer than a bin.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # the room of some open bin, each value once, ascending
    open_bins: dict[int, list[int]] = {}  # by room, which bins
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"item {index} has {length} elements, a bin holds {capacity}")
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[place]
            number = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[place]
        bins[number].append(index)
        left = room - length
        if left and left not in open_bins:
            bisect.insort(rooms, left)
            open_bins[left] = []
        if left:
            open_bins[left].append(number)
    return bins


def find_tokens(document: np.ndarray, mark: np.ndarray, start: int = 0) -> int:
    """Return where ``mark`` first occurs in ``document`` from ``start`` on, or -1."""
    if not len(mark) or len(document) - start < len(mark):
        return -1
    views = np.lib.stride_tricks.sliding_window_view(document[start:], len(mark))
    found = np.flatnonzero((views == mark).all(axis=1))
    return start + int(found[0]) if len(found) else -1


def trim_reasoning(document: np.ndarray, limit: int, begin: np.ndarray, end: np.ndarray) -> np.ndarray | None:
    """Shorten a document to ``limit`` tokens by leaving out the end of its reasoning.

    Args:
        document: token ids.
        limit: tokens that may remain.
        begin: mark after which the reasoning starts.
        end: mark before which it ends, and after which the answer stands.

    Returns:
        Everything up to and with ``begin``, as much reasoning as fits, ``end`` and the answer; None if the document
        has no such reasoning, or would be too long without any.
    """
    opened = find_tokens(document, begin)
    closed = find_tokens(document, end, opened + len(begin)) if opened >= 0 else -1
    if closed < 0:
        return None
    head, tail = opened + len(begin), len(document) - closed
    kept = limit - head - tail
    return None if kept < 0 else np.concatenate([document[: head + kept], document[closed:]])


class _Shortener:
    """Makes every document fit, and counts how."""

    def __init__(self, seq_length: int, begin: np.ndarray, end: np.ndarray) -> None:
        self.seq_length, self.begin, self.end = seq_length, begin, end
        self.trimmed = self.cut = self.left_out = 0

    def __call__(self, document: np.ndarray) -> list[np.ndarray]:
        if len(document) <= self.seq_length:
            return [document]
        if not len(self.begin):
            self.cut += 1
            return [document[i : i + self.seq_length] for i in range(0, len(document), self.seq_length)]
        shorter = trim_reasoning(document, self.seq_length, self.begin, self.end)
        self.trimmed += shorter is not None
        self.left_out += shorter is None
        return [] if shorter is None else [shorter]


def _documents(prefix: Path) -> Iterator[np.ndarray]:
    index = read_index(prefix)
    tokens = np.memmap(bin_path(prefix), READ_DTYPES[index.item_bytes], "r")
    position = 0
    for length in index.lengths():
        yield tokens[position : position + int(length)]
        position += int(length)


def _fill(window: np.ndarray, used: int, tokenizer: Tokenizer) -> None:
    """Pad a window; it ends with eod, so that nothing is learnt about the window that happens to follow."""
    if used < len(window):
        window[used:-1] = tokenizer.eod if tokenizer.pad == NO_PAD else tokenizer.pad
        window[-1] = tokenizer.eod


def pack(
    prefix: str | Path,
    output_prefix: str | Path,
    seq_length: int,
    tokenizer: str = "byte",
    *,
    reasoning_begin: str = "",
    reasoning_end: str = "",
    overwrite: bool = False,
) -> PackReport:
    """Write windows of ``seq_length`` tokens made of the documents of ``prefix``. Deterministic.

    Args:
        prefix: a pair that `zaya data prepare` made.
        output_prefix: of the pair to write.
        seq_length: tokens of a window; `data.seq_length` of the runs that read it.
        tokenizer: that of the documents.
        reasoning_begin, reasoning_end: texts around the reasoning, for example <think> and </think>; both or none.
        overwrite: replace an existing pair.

    Raises:
        DataError: the input is missing or damaged, or the marks are not two.
    """
    prefix, output_prefix = Path(prefix), Path(output_prefix)
    if bool(reasoning_begin) != bool(reasoning_end):
        raise DataError(
            "the reasoning needs a mark at its begin and one at its end",
            value=f"begin {reasoning_begin!r}, end {reasoning_end!r}",
            remedy="Give both, or none",
        )
    loaded = load_tokenizer(tokenizer)
    shorten = _Shortener(seq_length, loaded.encode(reasoning_begin), loaded.encode(reasoning_end))
    pieces = [piece for document in _documents(prefix) for piece in shorten(document)]
    windows = best_fit_decreasing([len(piece) for piece in pieces], seq_length)
    if not windows:
        raise DataError("no document fits into a window", where=prefix, value=f"{seq_length} tokens")
    dtype = READ_DTYPES[read_index(prefix).item_bytes]
    padding = 0
    with PairWriter(output_prefix, dtype, overwrite=overwrite) as writer:
        for items in windows:
            window = np.empty(seq_length, dtype)
            used = 0
            for index in sorted(items):
                window[used : used + len(pieces[index])] = pieces[index]
                used += len(pieces[index])
            _fill(window, used, loaded)
            padding += seq_length - used
            writer.add(window, [seq_length])
        described = read_sidecar(prefix) or {"format": SIDECAR_FORMAT, "tokenizer": loaded.unique_identifiers}
        source = {"packed_from": str(prefix), "reasoning_begin": reasoning_begin, "reasoning_end": reasoning_end}
        writer.commit({**described, "source": source, "window_tokens": seq_length})
    return PackReport(
        output_prefix, seq_length, len(windows), len(pieces), shorten.trimmed, shorten.cut, shorten.left_out, padding
    )
