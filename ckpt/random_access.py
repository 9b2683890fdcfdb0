"""Read any elements of a step's tensors, in any order, whatever layout wrote them. Torch-free.

Like reader.py, which fills known targets in one pass, but for callers that stream: the chunks read last are kept,
verified, so that neighbouring reads do not read twice.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ckpt.descriptors import Descriptors
from ckpt.errors import CorruptCheckpointError
from ckpt.manifest import FileInfo, Manifest, Piece, digest
from ckpt.reader import damage_of
from ckpt.region import Region
from ckpt.storage import io_buffer
from ckpt.transfer import Bytes, Target, chunk_tasks, copy_out, transfer_of

CACHE_BYTES = 64 << 20


class StepReader:
    """Some tensors of a step. Any thread may read."""

    def __init__(self, folder: Path, manifest: Manifest, keys: Iterable[str], cache_bytes: int = CACHE_BYTES) -> None:
        """Open a step; at most ``cache_bytes`` of it are kept, but always one chunk."""
        self.folder, self.manifest = folder, manifest
        self._pieces: dict[str, list[tuple[FileInfo, Piece]]] = {key: [] for key in keys}
        for file in manifest.files:
            for piece in file.pieces:
                if piece.key in self._pieces:
                    self._pieces[piece.key].append((file, piece))
        self._files = Descriptors(folder)
        self._chunks: OrderedDict[tuple[str, int], Bytes] = OrderedDict()
        self._held, self._limit = 0, cache_bytes
        self._lock = threading.Lock()

    def read(self, key: str, start: int, out: Bytes) -> None:
        """Fill ``out`` with the elements of a tensor from element ``start`` on, counted in row-major order.

        Raises:
            CorruptCheckpointError: the step does not hold them all, or a chunk is damaged.
        """
        info = self.manifest.tensors[key]
        numel = len(out) // info.item_bytes
        region = Region((0,) * len(info.shape), info.shape, start, start + numel)
        assert start >= 0 and start + numel <= math.prod(info.shape)
        target, held = Target(key, info, region, out), 0
        for file, piece in self._pieces[key]:
            transfer, count = transfer_of(piece, target, info)
            if transfer is None:
                continue
            held += count
            for task in chunk_tasks(file, [transfer]):
                begin, end = file.chunk_span(task.number)
                copy_out(self._chunk(file, task.number), begin, end, transfer)
        if held != numel:
            raise CorruptCheckpointError(f"{self.folder}: {held} of the {numel} elements asked of {key!r} are there")

    def _chunk(self, file: FileInfo, index: int) -> Bytes:
        """Return a verified chunk."""
        with self._lock:
            if (file.name, index) in self._chunks:
                self._chunks.move_to_end((file.name, index))
                return self._chunks[file.name, index]
        begin, end = file.chunk_span(index)
        buffer = io_buffer(end - begin)
        self._files.read(file.name, True, memoryview(buffer), begin, end - begin)
        data = np.frombuffer(buffer, dtype=np.uint8, count=end - begin)
        if digest(data.data) != file.chunks[index]:
            raise CorruptCheckpointError(damage_of(self.folder, file, index))
        with self._lock:
            if (file.name, index) not in self._chunks:
                self._chunks[file.name, index] = data
                self._held += len(data)
            while self._held > self._limit and len(self._chunks) > 1:
                self._held -= len(self._chunks.popitem(last=False)[1])
        return data

    def close(self) -> None:
        """Close the files."""
        self._files.close()
