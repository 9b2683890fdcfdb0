"""Text to Megatron's `.bin/.idx`: one document per file or JSON line, each ended by the eod token.

The output depends on the input, the tokenizer and the options alone: not on the number of workers. Memory is
bounded by a few chunks per worker and the longest document. As a command: `zaya data prepare INPUT...
OUTPUT_PREFIX`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_zaya.data.encode import Encoded, EncodeSettings, encode_all
from megatron_zaya.data.errors import DataError
from megatron_zaya.data.index_file import SIDECAR_FORMAT
from megatron_zaya.data.output import PairWriter, refuse_existing
from megatron_zaya.data.sources import SourceFile, find_files, iter_chunks
from megatron_zaya.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from rich.console import Console

LARGEST_UINT16_VOCAB = 1 << 16
BYTES_WORTH_A_POOL = 16 << 20
LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` wrote and what it left out. `undecodable` lists the folders' files that are no UTF-8."""

    prefix: Path
    documents: int
    tokens: int
    dtype: str
    vocab_size: int
    files: int
    source_bytes: int
    empty: int
    undecodable: list[str]
    elapsed_s: float

    def summary(self) -> str:
        """One line for the user."""
        skipped = [f"{self.empty} empty"] if self.empty else []
        skipped += [f"{len(self.undecodable)} not UTF-8"] if self.undecodable else []
        note = f"; skipped {' and '.join(skipped)}" if skipped else ""
        return (
            f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens ({self.dtype}) "
            f"in {self.elapsed_s:.1f} s{note}"
        )


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    tokenizer: str = "byte",
    *,
    suffixes: Sequence[str] = (),
    json_key: str = "text",
    workers: int | None = None,
    overwrite: bool = False,
    limit_documents: int | None = None,
    console: Console | None = None,
) -> PrepareReport:
    """Write `<output_prefix>.bin`, `.idx` and the sidecar `.json` from `inputs`.

    `inputs`: text files, folders, `.jsonl` and `.jsonl.gz` files (text under `json_key`), or
    `python-stdlib`. `suffixes` filters the files of folders, such as `(".txt", ".md")`. `workers`:
    processes; None chooses by the size of the input, at most 8. `limit_documents` stops after that many.
    `console` shows progress (default: stderr). Documents without text are skipped and counted.

    Raises DataError for any bad input or output, in which case nothing is written.
    """
    begin = time.monotonic()
    prefix = _checked_prefix(output_prefix)
    refuse_existing(prefix, overwrite)
    if limit_documents is not None and limit_documents < 1:
        raise DataError("the limit of documents must be at least 1", value=limit_documents)
    if workers is not None and workers < 1:
        raise DataError("the number of workers must be at least 1", value=workers)
    suffixes = [suffix if suffix.startswith(".") else f".{suffix}" for suffix in suffixes]
    files = find_files(inputs, suffixes)
    loaded = load_tokenizer(tokenizer)
    dtype = np.uint16 if loaded.vocab_size <= LARGEST_UINT16_VOCAB else np.int32
    settings = EncodeSettings(str(tokenizer), np.dtype(dtype).name, json_key)
    tally = _Tally()
    with PairWriter(prefix, dtype, overwrite=overwrite) as writer:
        encoded = encode_all(iter_chunks(files), settings, _workers(workers, files))
        with _progress(console, sum(file.size_bytes for file in files)) as progress:
            _write(encoded, writer, tally, limit_documents, progress)
        if writer.documents == 0:
            raise DataError(
                "the input holds no text",
                where=", ".join(str(name) for name in inputs),
                value=f"{len(files)} files: {tally.empty} empty, {len(tally.undecodable)} not UTF-8",
                remedy="Check the files and the suffix filter",
            )
        source = {"inputs": [str(name) for name in inputs], "files": len(files), "suffixes": suffixes}
        source |= {"json_key": json_key, "limit_documents": limit_documents}
        source |= {"empty": tally.empty, "undecodable": len(tally.undecodable)}
        writer.commit(_sidecar(loaded, settings, source))
        documents, tokens = writer.documents, writer.tokens
    return PrepareReport(
        prefix=prefix,
        documents=documents,
        tokens=tokens,
        dtype=settings.dtype,
        vocab_size=loaded.vocab_size,
        files=len(files),
        source_bytes=tally.source_bytes,
        empty=tally.empty,
        undecodable=tally.undecodable,
        elapsed_s=time.monotonic() - begin,
    )


@dataclass
class _Tally:
    empty: int = 0
    undecodable: list[str] = field(default_factory=list)
    source_bytes: int = 0


def _write(
    encoded: Iterator[Encoded], writer: PairWriter, tally: _Tally, limit: int | None, progress: _Progress
) -> None:
    """Move chunks to the writer up to the limit, an error, or the end, whichever comes first."""
    try:
        for chunk in encoded:
            lengths = chunk.lengths if limit is None else chunk.lengths[: limit - writer.documents]
            writer.add(chunk.tokens[: sum(lengths)], lengths)
            tally.empty += chunk.empty
            tally.undecodable += chunk.undecodable
            tally.source_bytes += chunk.source_bytes
            progress(chunk.source_bytes, writer.documents, writer.tokens)
            if writer.documents == limit:
                return
            if chunk.error is not None:
                raise DataError.from_fields(chunk.error)
    finally:
        encoded.close()  # ends the workers now, also on an error


def _checked_prefix(output_prefix: str | os.PathLike[str]) -> Path:
    prefix = Path(output_prefix)
    if prefix.suffix in (".bin", ".idx"):
        remedy = f"Give the prefix without its ending: {prefix.with_suffix('')}"
        raise DataError("the output is a prefix, to which .bin and .idx are added", where=prefix, remedy=remedy)
    if not prefix.name or prefix.is_dir():
        remedy = f"Name the data inside it, for example {prefix / 'corpus'}"
        raise DataError("the output prefix is a folder", where=prefix, remedy=remedy)
    return prefix


def _workers(workers: int | None, files: Sequence[SourceFile]) -> int:
    """As many as asked; else one per core, up to 8, if there is enough input to pay for starting them."""
    if workers is not None:
        return workers
    if sum(file.size_bytes for file in files) < BYTES_WORTH_A_POOL:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def _sidecar(tokenizer: Tokenizer, settings: EncodeSettings, source: dict[str, Any]) -> dict[str, Any]:
    """The sidecar, less what the writer knows. No dates: the same input gives the same bytes."""
    return {
        "format": SIDECAR_FORMAT,
        "tokenizer": tokenizer.unique_identifiers,
        "tokenizer_name": settings.tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "dtype": settings.dtype,
        "source": source,
    }


class _Progress(Protocol):
    def __call__(self, source_bytes: int, documents: int, tokens: int) -> None: ...


@contextmanager
def _progress(console: Console | None, total_bytes: int) -> Iterator[_Progress]:
    """A live bar on a terminal; elsewhere a plain line every few seconds, so that logs stay readable."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = RichConsole(stderr=True) if console is None else console
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("tokenizing", total=total_bytes)

            def advance(source_bytes: int, documents: int, tokens: int) -> None:
                bar.update(task, advance=source_bytes, description=f"{documents:,} documents, {tokens:,} tokens")

            yield advance
        return
    done, next_line = 0, time.monotonic() + LINE_EVERY_S

    def say(source_bytes: int, documents: int, tokens: int) -> None:
        nonlocal done, next_line
        done += source_bytes
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + LINE_EVERY_S
            share = 100 * done / max(total_bytes, 1)
            line = f"tokenizing: {share:.0f} %, {documents:,} documents, {tokens:,} tokens"
            console.print(line, highlight=False, soft_wrap=True)

    yield say
