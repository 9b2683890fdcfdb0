"""What a worker process does (a chunk of raw text in, token ids out), and the pool that runs it.

Results come back in the order of the chunks, with a bounded number in flight. An error travels as data in
its place in that order, so the same error is reported whatever the number of workers. Torch-free: workers
start quickly.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_zaya.data.errors import DataError
from megatron_zaya.data.sources import Chunk, SourceFile
from megatron_zaya.data.tokenizer import Tokenizer, load_tokenizer

IN_FLIGHT_PER_WORKER = 3


@dataclass(frozen=True)
class EncodeSettings:
    """What every worker must know. `dtype` is numpy's name of the stored token type."""

    tokenizer: str
    dtype: str
    json_key: str


@dataclass
class Encoded:
    """The documents of one chunk: `tokens` is all in a row, each ended by eod; `lengths` cuts them apart.

    `error` holds the fields of a DataError that comes after these documents.
    """

    source_bytes: int
    tokens: np.ndarray
    lengths: list[int] = field(default_factory=list)
    undecodable: list[str] = field(default_factory=list)
    empty: int = 0
    error: dict[str, Any] | None = None


def encode_all(chunks: Iterable[Chunk], settings: EncodeSettings, workers: int) -> Iterator[Encoded]:
    """Encode every chunk, in order, in this process (`workers` <= 1) or in that many spawned ones.

    Raises DataError when a worker process dies, which on Linux mostly means that memory ran out.
    """
    if workers <= 1:
        tokenizer = load_tokenizer(settings.tokenizer)
        for chunk in chunks:
            yield encode_chunk(chunk, tokenizer, settings)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(settings,),
    )
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= IN_FLIGHT_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died while encoding",
            value=f"{workers} workers",
            remedy="Try fewer workers if memory ran out; a script that calls this needs an "
            "`if __name__ == '__main__':` guard",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer, settings: EncodeSettings) -> Encoded:
    """The token ids of one chunk."""
    result = Encoded(chunk.source_bytes, np.empty(0, settings.dtype))
    if chunk.lines_path is not None:
        texts = _json_texts(chunk, settings.json_key, result)
    else:
        texts = _file_texts(chunk.files, result)
    if texts:
        eod = np.array([tokenizer.eod], settings.dtype)
        pieces: list[np.ndarray] = []
        for ids in tokenizer.encode_batch(texts):
            pieces += (ids.astype(settings.dtype, copy=False), eod)
            result.lengths.append(len(ids) + 1)
        result.tokens = np.concatenate(pieces)
    result.error = result.error or chunk.error
    return result


def _file_texts(files: Iterable[SourceFile], result: Encoded) -> list[str]:
    """The text of each file, newlines as they are; what is no UTF-8 is skipped unless the user named it."""
    texts: list[str] = []
    for file in files:
        try:
            text = file.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            if not file.named:
                result.undecodable.append(str(file.path))
                continue
            problem = DataError(
                "the file is not UTF-8 text",
                where=file.path,
                value=f"byte {error.object[error.start]:#04x} at offset {error.start}",
                remedy="Convert it to UTF-8 (for example with iconv), or leave it out",
            )
            result.error = problem.fields()
            return texts
        except OSError as error:
            result.error = DataError(f"the file cannot be read: {error.strerror}", where=file.path).fields()
            return texts
        if text:
            texts.append(text)
        else:
            result.empty += 1
    return texts


def _json_texts(chunk: Chunk, key: str, result: Encoded) -> list[str]:
    texts: list[str] = []
    for number, line in enumerate(chunk.lines.split(b"\n"), start=chunk.first_line):
        if not line.strip():
            continue
        try:
            text = _json_text(line, key)
        except DataError as error:
            result.error = {**error.fields(), "where": f"{chunk.lines_path}, line {number}"}
            return texts
        if text:
            texts.append(text)
        else:
            result.empty += 1
    return texts


def _json_text(line: bytes, key: str) -> str:
    """The text of one JSON line. Raises DataError without a place, which the caller adds."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        shown = line.decode("utf-8", "replace").strip()
        raise DataError(
            f"the line is not valid JSON ({error})",
            value=shown,
            remedy="Put exactly one JSON object on each line",
        ) from None
    if not isinstance(record, dict):
        raise DataError("the line is JSON but no object", value=record, remedy=f'Write it as {{"{key}": "..."}}')
    if key not in record:
        remedy = "Name the key that holds the text with the option for the JSON key"
        raise DataError(f"the line has no key {key!r}", value=f"the keys {', '.join(record)}", remedy=remedy)
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"the value of {key!r} is no text", value=text, remedy="Make it a JSON string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        remedy = "Replace the lone surrogate, which stands for no character"
        raise DataError(f"the value of {key!r} is no valid Unicode ({error.reason})", remedy=remedy) from None
    return text


_worker: tuple[Tokenizer, EncodeSettings] | None = None  # one per worker process, set once by its initializer


def _start_worker(settings: EncodeSettings) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone answers Ctrl-C, by ending the pool
    # The processes are the parallelism; the library's own threads would only fight them for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker = (load_tokenizer(settings.tokenizer), settings)


def _exit_with_parent() -> None:
    """End this worker when the parent is gone, even if the parent was killed and could not say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    assert _worker is not None
    tokenizer, settings = _worker
    return encode_chunk(chunk, tokenizer, settings)
