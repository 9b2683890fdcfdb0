"""What a rank's writer tells the one that commits: a small file that says the rank's part is complete. Torch-free.

Three lines: a sealed JSON object of what differs from save to save, the pieces, the tensors. The last two stay the same
while the job does not change; they are made and checked once, and told apart from others by their hashes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.errors import CorruptCheckpointError
from ckpt.manifest import compact, digest, seal, unseal


@dataclass(frozen=True)
class Layout:
    """What lies where in a rank's file, as JSON text."""

    pieces: bytes
    """List of the pieces, see :func:`ckpt.manifest.piece_record`."""
    tensors: bytes
    """Table of the tensors that they are parts of, see :func:`ckpt.manifest.tensor_records`."""

    @classmethod
    def of(cls, pieces: list[Any], tensors: dict[str, Any]) -> Layout:
        """Make the text of the JSON values."""
        return cls(compact(pieces), compact(tensors))

    @property
    def hashes(self) -> list[str]:
        """xxh3-128 of the two texts."""
        return [digest(self.pieces), digest(self.tensors)]


@dataclass(frozen=True)
class Record:
    """A complete part of a save."""

    save_id: str
    file: dict[str, Any]
    """The file's entry in the manifest, without its pieces."""
    layout: Layout

    @property
    def key(self) -> tuple[Any, ...]:
        """Differs if the manifest's check of this part could have another result."""
        return (*self.layout.hashes, self.file["name"], self.file["bytes"], self.file["chunk_bytes"])

    def to_bytes(self) -> bytes:
        """Return the content of the record's file."""
        head = {"save_id": self.save_id, "file": self.file, "layout": self.layout.hashes}
        return b"%s%s\n%s\n" % (seal("part", head), self.layout.pieces, self.layout.tensors)


def read_record(path: Path) -> Record:
    """Read a rank's record.

    Raises:
        CorruptCheckpointError: it is not what was written.
        OSError: it cannot be read.
    """
    head, *texts = path.read_bytes().split(b"\n")
    part = unseal("part", head + b"\n", path)
    layout = Layout(*texts[:2]) if len(texts) == 3 else Layout(b"", b"")
    if layout.hashes != part["layout"]:
        raise CorruptCheckpointError(f"{path}: its content does not match its hash")
    return Record(part["save_id"], part["file"], layout)


def commit_name(save_id: str) -> str:
    """Return the name of the file that says how a save is to be committed, for whoever finishes it later."""
    return f"{save_id}.commit.json"


def file_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def part_name(rank: int, save_id: str) -> str:
    """Return the name of the file that says a rank's part is complete."""
    return f"rank_{rank:05d}.{save_id}.part.json"


def failure_name(rank: int, save_id: str) -> str:
    """Return the name of the file that says a rank's part will never be complete."""
    return f"rank_{rank:05d}.{save_id}.failed"
