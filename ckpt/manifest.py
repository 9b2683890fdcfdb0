"""The manifest of a step: its tensors, where each byte of them lies, and a hash for each chunk. Torch-free.

The file is one JSON object, {"xxh3_128": <hash of the next value's bytes>, "manifest": {...}};
docs/checkpoint_format.md describes every field. Nothing read from it is trusted: :func:`parse_manifest` refuses what
could not have been written.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ckpt.errors import CorruptCheckpointError
from ckpt.region import Region

FORMAT, VERSION = "zaya-ckpt", 1
MANIFEST = "manifest.json"
_FILE_NAME = re.compile(r"rank_\d{5,}\.safetensors")
_HASH = re.compile(r"[0-9a-f]{32}")
_LARGEST = 1 << 56
"""Bytes; no tensor and no file can be larger."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of an element, by safetensors' names of types."""


@dataclass(frozen=True)
class TensorInfo:
    """A global tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return ITEM_BYTES[self.dtype]


class Piece(NamedTuple):
    """A part of a global tensor in a file: contiguous, in row-major order of its region."""

    key: str
    region: Region
    begin: int
    """First byte, counted from the start of the file."""


@dataclass(frozen=True)
class FileInfo:
    """A file of a step."""

    name: str
    size: int
    """Bytes."""
    chunk_bytes: int
    chunks: list[str]
    """xxh3-128 of each ``chunk_bytes`` of the file, the last one shorter, as hexadecimal digits."""
    pieces: list[Piece]
    """In the order of their bytes."""

    def chunk_span(self, index: int) -> tuple[int, int]:
        """Return the first byte of a chunk and the one after its last."""
        return index * self.chunk_bytes, min((index + 1) * self.chunk_bytes, self.size)


@dataclass(frozen=True)
class Manifest:
    """Everything about a step but its bytes."""

    iteration: int
    save_id: str
    """Differs for any two saves."""
    created: float
    """Seconds since 1970, UTC."""
    tensors: dict[str, TensorInfo]
    files: list[FileInfo]
    common: Any = None
    """What the job saved besides tensors: any JSON value."""
    layout: dict[str, Any] = field(default_factory=dict)
    """How the job was spread over ranks; for people, loading does not read it."""
    libraries: dict[str, str] = field(default_factory=dict)
    world_size: int = 1
    score: float | None = None
    """What retention calls best is lowest; None if the job gave none."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def digest(data: bytes | memoryview) -> str:
    """Return the xxh3-128 of ``data`` as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def seal(name: str, value: Any) -> bytes:
    """Return the bytes of a JSON file that carries the hash of its one value."""
    return seal_text(name, compact(value))


def compact(value: Any) -> bytes:
    """Return a value as JSON without white space."""
    return json.dumps(value, separators=(",", ":"), allow_nan=True).encode()


def seal_text(name: str, body: bytes) -> bytes:
    """Like :func:`seal`, of a value that is JSON already."""
    return b'{"xxh3_128": "%s", "%s": %s}\n' % (digest(body).encode(), name.encode(), body)


def unseal(name: str, data: bytes, path: Path) -> Any:
    """Return the value of a file that :func:`seal` wrote.

    Raises:
        CorruptCheckpointError: it is not what was written.
    """
    head = b'{"xxh3_128": "' + b"0" * 32 + b'", "%s": ' % name.encode()
    body = data[len(head) : -2]
    if len(data) < len(head) + 2 or data != b'{"xxh3_128": "%s", "%s": %s}\n' % (data[14:46], name.encode(), body):
        raise CorruptCheckpointError(f"{path}: is cut off or damaged ({len(data)} bytes)")
    if digest(body).encode() != data[14:46]:
        raise CorruptCheckpointError(f"{path}: its content does not match its hash")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: is no JSON: {error}") from None


def piece_record(piece: Piece) -> list[Any]:
    """Return the JSON form of a piece: [key, offset, shape, start, stop, begin]."""
    region = piece.region
    return [piece.key, list(region.offset), list(region.shape), region.start, region.stop, piece.begin]


def tensor_records(tensors: dict[str, TensorInfo]) -> dict[str, list[Any]]:
    """Return the JSON form of a table of tensors: key -> [dtype, shape]."""
    return {key: [info.dtype, list(info.shape)] for key, info in tensors.items()}


def file_record(file: FileInfo) -> dict[str, Any]:
    """Return the JSON form of a file's entry."""
    return {
        "name": file.name,
        "bytes": file.size,
        "chunk_bytes": file.chunk_bytes,
        "chunks": file.chunks,
        "pieces": [piece_record(piece) for piece in file.pieces],
    }


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the content of the manifest's file."""
    value = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": manifest.iteration,
        "save_id": manifest.save_id,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "layout": manifest.layout,
        "libraries": manifest.libraries,
        "common": manifest.common,
        "score": manifest.score,
        "tensors": tensor_records(manifest.tensors),
        "files": [file_record(file) for file in manifest.files],
    }
    return seal("manifest", value)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a step.

    Raises:
        CorruptCheckpointError: there is none, or it is damaged, or says what cannot be.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_manifest(unseal("manifest", data, path), path)


def parse_manifest(value: Any, path: Path) -> Manifest:
    """Turn the JSON value of a manifest into a Manifest, and refuse what could not have been written.

    Raises:
        CorruptCheckpointError: a field is missing or impossible: paths as names, parts outside their tensor or file,
            overlapping bytes, sizes beyond reason.
    """
    try:
        if value["format"] != FORMAT:
            raise _ImpossibleError(f"format is {value['format']!r}, this is no checkpoint of this program")
        if value["version"] != VERSION:
            raise _ImpossibleError(f"format version {value['version']!r}; this program reads version {VERSION}")
        tensors = {key: _tensor(key, record) for key, record in _typed(value["tensors"], dict).items()}
        files = [_file(record, tensors) for record in _typed(value["files"], list)]
        names = [file.name for file in files]
        if len(set(names)) != len(names):
            raise _ImpossibleError("a file is listed twice")
        return Manifest(
            iteration=_count(value["iteration"]),
            save_id=_typed(value["save_id"], str),
            created=float(value["created"]),
            tensors=tensors,
            files=files,
            common=value["common"],
            layout=_typed(value["layout"], dict),
            libraries=_typed(value["libraries"], dict),
            world_size=_count(value["world_size"]),
            score=None if value["score"] is None else float(value["score"]),
        )
    except _ImpossibleError as error:
        raise CorruptCheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path}: a field is missing or malformed: {error!r}") from None


class _ImpossibleError(Exception):
    """A value that no save writes."""


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _ImpossibleError(f"{value!r:.80} is no {kind.__name__}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise _ImpossibleError(f"{value!r:.80} is no possible count")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    for value in _typed(values, list):
        if type(value) is not int or not 0 <= value < _LARGEST:
            _count(value)
    return tuple(values)


def _tensor(key: str, record: Any) -> TensorInfo:
    dtype, shape = record
    if dtype not in ITEM_BYTES:
        raise _ImpossibleError(f"tensor {key!r}: unknown type {dtype!r:.40}")
    info = TensorInfo(dtype, _counts(shape))
    if len(info.shape) > 64 or math.prod(info.shape) * info.item_bytes >= _LARGEST:
        raise _ImpossibleError(f"tensor {key!r}: shape {info.shape!r:.80} is beyond reason")
    return info


def _file(record: Any, tensors: dict[str, TensorInfo]) -> FileInfo:
    name = _typed(record["name"], str)
    if not _FILE_NAME.fullmatch(name):
        raise _ImpossibleError(f"{name!r:.80} is no name of a rank's file")
    size, chunk_bytes = _count(record["bytes"]), _count(record["chunk_bytes"])
    chunks = _typed(record["chunks"], list)
    if not chunk_bytes or chunk_bytes > 1 << 30 or len(chunks) != -(-size // chunk_bytes):
        raise _ImpossibleError(f"{name}: {len(chunks)} chunks of {chunk_bytes} bytes cannot make {size} bytes")
    if not all(isinstance(chunk, str) and _HASH.fullmatch(chunk) for chunk in chunks):
        raise _ImpossibleError(f"{name}: a hash is malformed")
    pieces, end = [], 0
    for item in _typed(record["pieces"], list):
        piece = _piece(item, tensors, name)
        if piece.begin < end:
            raise _ImpossibleError(f"{name}: the bytes of {piece.key!r} at {piece.begin} overlap those before")
        end = piece.begin + piece.region.numel * tensors[piece.key].item_bytes
        pieces.append(piece)
    if end > size:
        raise _ImpossibleError(f"{name}: its last tensor ends at byte {end}, the file at {size}")
    return FileInfo(name, size, chunk_bytes, chunks, pieces)


def _piece(item: Any, tensors: dict[str, TensorInfo], name: str) -> Piece:
    key, offset, shape, start, stop, begin = item
    if key not in tensors:
        raise _ImpossibleError(f"{name}: holds {key!r:.80}, which is no tensor of this step")
    region = Region(_counts(offset), _counts(shape), _count(start), _count(stop))
    whole = tensors[key].shape
    inside = len(region.offset) == len(region.shape) == len(whole)
    for o, n, w in zip(region.offset, region.shape, whole, strict=False):
        inside = inside and o + n <= w
    if not inside or not region.start <= region.stop <= math.prod(region.shape):
        raise _ImpossibleError(f"{name}: a part of {key!r} lies outside the tensor")
    return Piece(key, region, _count(begin))
