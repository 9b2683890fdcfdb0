"""From what the user names to chunks of raw text: files, folders, JSON lines, `python-stdlib`.

A chunk is about a megabyte of whole documents; cutting into chunks depends on the input alone, so that any
number of workers produces the same output. Nothing here decodes text: that is the workers' part
(`encode.py`).
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_zaya.data.errors import DataError

PYTHON_STDLIB = "python-stdlib"
"""The input name that stands for the running interpreter's standard library: real text on every machine."""

JSON_LINES = (".jsonl", ".jsonl.gz")
CHUNK_BYTES = 1 << 20
CHUNK_FILES = 256


@dataclass(frozen=True)
class SourceFile:
    """One input file. `named`: the user wrote its name, so it may not be skipped when it is no text."""

    path: Path
    size_bytes: int
    named: bool

    @property
    def is_json_lines(self) -> bool:
        """Whether every line is a document (else the whole file is one)."""
        return self.path.name.endswith(JSON_LINES)


@dataclass(frozen=True)
class Chunk:
    """Work for one worker: several text files, or a block of whole lines of a JSON-lines file.

    `source_bytes` is its share of the input's size on disk, for the progress bar. `error` holds the fields
    of a DataError that reading met after these documents; it is raised when its turn comes.
    """

    source_bytes: int
    files: tuple[SourceFile, ...] = ()
    lines: bytes = b""
    lines_path: Path | None = None
    first_line: int = 1
    error: dict[str, Any] | None = None


def find_files(inputs: Sequence[str | os.PathLike[str]], suffixes: Sequence[str] = ()) -> list[SourceFile]:
    """Every file that `inputs` name, in the order in which their documents will be stored.

    Inputs keep the user's order. A folder is searched recursively for files with one of `suffixes` (all, if
    none is given), hidden names left out, and its files are ordered by a hash of their relative path:
    deterministic and the same on every machine. Not alphabetical, because Megatron cuts training and
    validation data as contiguous ranges of documents, and one corner of a tree is a poor sample of it.

    Raises DataError when an input is missing or a folder holds no matching file.
    """
    files: list[SourceFile] = []
    for name in inputs:
        path = Path(name)
        if str(name) == PYTHON_STDLIB and not path.exists():
            files += _folder_files(_stdlib_folder(), (".py",), skip=("site-packages", "dist-packages"))
        elif path.is_dir():
            files += _folder_files(path, suffixes)
        elif path.is_file():
            files.append(SourceFile(path, path.stat().st_size, named=True))
        else:
            raise DataError("there is no such input file or folder", where=path, remedy=_did_you_mean(path))
    if not files:
        raise DataError("no input is named", remedy="Name text files, folders, .jsonl files, or `python-stdlib`")
    return files


def iter_chunks(files: Sequence[SourceFile]) -> Iterator[Chunk]:
    """The documents of `files` in order, as chunks."""
    pending: list[SourceFile] = []
    pending_bytes = 0
    for file in files:
        if pending and (
            file.is_json_lines or pending_bytes + file.size_bytes > CHUNK_BYTES or len(pending) == CHUNK_FILES
        ):
            yield Chunk(pending_bytes, files=tuple(pending))
            pending, pending_bytes = [], 0
        if file.is_json_lines:
            yield from _line_chunks(file)
        else:
            pending.append(file)
            pending_bytes += file.size_bytes
    if pending:
        yield Chunk(pending_bytes, files=tuple(pending))


def _line_chunks(file: SourceFile) -> Iterator[Chunk]:
    """Blocks of whole lines of one JSON-lines file, decompressed on the way."""
    first = number = 1
    block: list[bytes] = []
    block_bytes = source_position = 0
    problem: DataError | None = None
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(file.path.open("rb"))
            packed = file.path.name.endswith(".gz")
            for line in stack.enter_context(gzip.open(raw)) if packed else raw:
                block.append(line)
                block_bytes += len(line)
                number += 1
                if block_bytes >= CHUNK_BYTES:
                    position = raw.tell()
                    lines = b"".join(block)
                    yield Chunk(position - source_position, lines=lines, lines_path=file.path, first_line=first)
                    first, block, block_bytes, source_position = number, [], 0, position
    except (OSError, EOFError, zlib.error) as error:
        problem = DataError(
            f"the file cannot be read beyond line {number - 1}: {error}",
            where=file.path,
            remedy="Check that the file is complete (`gzip -t` for .gz) and readable",
        )
    yield Chunk(
        max(file.size_bytes - source_position, 0),
        lines=b"".join(block),
        lines_path=file.path,
        first_line=first,
        error=None if problem is None else problem.fields(),
    )


def _folder_files(folder: Path, suffixes: Sequence[str], skip: Sequence[str] = ()) -> list[SourceFile]:
    found: list[tuple[bytes, SourceFile]] = []
    for parent, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [n for n in folders if not n.startswith(".") and n not in skip and n != "__pycache__"]
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") or (suffixes and not name.endswith(tuple(suffixes))) or not path.is_file():
                continue
            key = hashlib.sha256(path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape")).digest()
            found.append((key, SourceFile(path, path.stat().st_size, named=False)))
    if not found:
        wanted = f"no file ending in {' or '.join(suffixes)}" if suffixes else "no file"
        raise DataError(f"the folder holds {wanted}", where=folder, remedy="Check the folder and the suffix filter")
    return [file for _, file in sorted(found, key=lambda item: item[0])]


def _unreadable(error: OSError) -> None:
    # os.walk would pass over such a folder in silence.
    raise DataError(f"the folder cannot be read: {error.strerror}", where=error.filename) from error


def _stdlib_folder() -> Path:
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not folder.is_dir():
        raise DataError(
            "this Python keeps its standard library in no folder",
            where=PYTHON_STDLIB,
            value=folder,
            remedy="Name text files or folders of your own instead",
        )
    return folder


def _did_you_mean(path: Path) -> str:
    neighbours = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, neighbours, n=1)
    return f"Did you mean {path.parent / close[0]}?" if close else "Check the path"
