"""Reads Megatron's .idx and our sidecar without torch: what is stored, is it whole, which data is it.

Layout of an .idx (little endian): magic, u64 version 1, u8 dtype code, u64 sequences n, u64 document bounds
d, then int32 lengths [n], int64 byte offsets [n], int64 bounds [d]. Our sidecar `<prefix>.json` names
tokenizer and source.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_zaya.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
SIDECAR_FORMAT = "megatron_zaya.data/1"
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 1 << 14


def bin_path(prefix: str | Path) -> Path:
    """The token file of a prefix (`corpus.v1` keeps its dot, so this is not `with_suffix`)."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of a prefix."""
    return Path(f"{prefix}.idx")


def sidecar_path(prefix: str | Path) -> Path:
    """Our description of a prefix; absent for data that another tool prepared."""
    return Path(f"{prefix}.json")


@dataclass(frozen=True)
class IndexFile:
    """The header of one .idx: `sequences` pieces of text, `tokens` ids of `item_bytes` bytes each."""

    prefix: Path
    sequences: int
    tokens: int
    item_bytes: int

    def lengths(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """The int32 token counts of the sequences `first` to `last` (exclusive), mapped from the file."""
        last = self.sequences if last is None else last
        offset = HEADER.size + 4 * first
        return np.memmap(idx_path(self.prefix), np.int32, "r", offset, (last - first,)) if last > first else np.empty(0)


def read_index(prefix: str | Path) -> IndexFile:
    """Read and check the header of `<prefix>.idx` against both file sizes.

    Raises DataError when a file is missing (with the nearest name in the folder), is no Megatron index,
    holds no sequence, or is cut short.
    """
    prefix = Path(prefix)
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise _missing(prefix, path)
    with idx_path(prefix).open("rb") as stream:
        head = stream.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise _damaged(prefix, "this is no Megatron index file", head[:9])
        _, version, code, sequences, bounds = HEADER.unpack(head)
        if version != 1 or code not in ITEM_BYTES:
            raise _damaged(prefix, "the index has an unknown version or type", f"version {version}, type {code}")
        size = stream.seek(0, 2)
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if size not in (expected, expected + sequences):  # multimodal data adds a byte per sequence
            raise _damaged(prefix, f"the index should have {expected} bytes", size)
        if sequences == 0:
            raise _damaged(prefix, "the data hold no document", 0)
        stream.seek(HEADER.size + 4 * (sequences - 1))
        (last_length,) = struct.unpack("<i", stream.read(4))
        stream.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
        (last_offset,) = struct.unpack("<q", stream.read(8))
    tokens, item_bytes = last_offset // ITEM_BYTES[code] + last_length, ITEM_BYTES[code]
    bin_bytes = bin_path(prefix).stat().st_size
    if bin_bytes != tokens * item_bytes:
        raise _damaged(prefix, f"{bin_path(prefix).name} should have {tokens * item_bytes} bytes", bin_bytes)
    return IndexFile(prefix, sequences, tokens, item_bytes)


def read_sidecar(prefix: str | Path) -> dict[str, Any] | None:
    """Our sidecar's content; None when there is none, or when the .json of that name is not ours."""
    try:
        content = json.loads(sidecar_path(prefix).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == SIDECAR_FORMAT else None


def data_identity(prefix: str | Path) -> str:
    """A hash of the stored data (not of its path or dates), cheap for any size.

    Small files enter whole; of larger ones, the size and evenly spaced blocks. The sidecar's hash of the
    whole token file enters too, where there is one.
    """
    digest = hashlib.sha256()
    for path in (idx_path(prefix), bin_path(prefix)):
        size = path.stat().st_size
        digest.update(f"{path.suffix}:{size};".encode())
        with path.open("rb") as stream:
            for offset in sampled_offsets(size):
                stream.seek(offset)
                digest.update(stream.read(BLOCK_BYTES))
    digest.update(str((read_sidecar(prefix) or {}).get("bin_sha256")).encode())
    return digest.hexdigest()


def sampled_offsets(size_bytes: int) -> list[int]:
    """Where to read blocks of `BLOCK_BYTES`: they cover small content whole and large content evenly."""
    if size_bytes <= SAMPLED_BLOCKS * BLOCK_BYTES:
        return list(range(0, size_bytes, BLOCK_BYTES))
    last = size_bytes - BLOCK_BYTES
    return [last * i // (SAMPLED_BLOCKS - 1) for i in range(SAMPLED_BLOCKS)]


def _missing(prefix: Path, path: Path) -> DataError:
    remedy = f"Make it with `zaya data prepare INPUT... {prefix}`"
    if prefix.suffix in (".bin", ".idx") and idx_path(prefix.with_suffix("")).is_file():
        remedy = f"Give the prefix without its ending: {prefix.with_suffix('')}"
    elif not path.parent.is_dir():
        remedy += f" (there is no folder {path.parent} either)"
    else:
        known = sorted(p.name.removesuffix(".idx") for p in path.parent.glob("*.idx"))
        known = [name for name in known if name != prefix.name]
        close = difflib.get_close_matches(prefix.name, known, n=1)
        if close:
            remedy = f"Did you mean {prefix.parent / close[0]}? {remedy}"
        elif known:
            remedy += f"; that folder has {', '.join(known[:5])}"
    return DataError("there is no such data file", where=path, remedy=remedy)


def _damaged(prefix: Path, what: str, value: Any) -> DataError:
    return DataError(
        what,
        where=idx_path(prefix),
        value=value,
        remedy=f"Prepare the data again: `zaya data prepare INPUT... {prefix} --overwrite`",
    )
