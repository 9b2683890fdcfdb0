"""Builds mcore's sample indices once, in one folder per request, whole or not at all.

mcore writes its index files in place, recognises them by name alone, and lets global rank 0 write them. A
kill would leave half a file that later runs trust, prepared-again data would meet the old indices, and a
node-local cache would exist on the first node only. So we build into a temporary folder, whose final name is
a hash of the data and of everything that shapes the order, and rename it. Inside a distributed job this file
runs as a program of its own, because mcore's builder would wait for the other ranks: `python -m
megatron_zaya.data.index_cache < request.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_zaya.data.errors import DataError

BUILDER_THREADS = 8
FAILED = 2


@dataclass(frozen=True)
class TokenizerFacts:
    """What mcore's datasets read of a tokenizer, without the tokenizer."""

    unique_identifiers: dict[str, Any]
    vocab_size: int
    eod: int
    pad: int


@dataclass(frozen=True)
class IndexRequest:
    """Everything that determines the order of the samples, and what mcore needs to build them.

    `prefixes` are absolute. `weights` is None for a single prefix. A split is built when its samples are not
    0. `data` holds `data_identity` of every prefix.
    """

    prefixes: list[str]
    weights: list[float] | None
    data: list[str]
    split: str
    seq_length: int
    seed: int
    train_samples: int
    valid_samples: int
    reset_position_ids: bool
    reset_attention_mask: bool
    eod_mask_loss: bool
    tokenizer: TokenizerFacts

    def folder_name(self) -> str:
        """A name that is equal only for equal requests over equal data."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    @classmethod
    def from_json(cls, text: str) -> IndexRequest:
        """The request that `json.dumps(asdict(request))` came from."""
        fields = json.loads(text)
        return cls(**{**fields, "tokenizer": TokenizerFacts(**fields["tokenizer"])})


def open_datasets(request: IndexRequest, folder: Path) -> tuple[Any, Any]:
    """mcore's train and validation datasets (None where 0 samples are asked), with their indices in `folder`.

    In a distributed job all ranks must call it, and the indices must be there already.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    sizes = [request.train_samples, request.valid_samples, 0]
    # A prefix named twice in equal parts has one index file, which two threads would write at the same time.
    threads = min(BUILDER_THREADS, len(request.prefixes)) if len(set(request.prefixes)) == len(request.prefixes) else 1
    config = GPTDatasetConfig(
        random_seed=request.seed,
        sequence_length=request.seq_length,
        blend=(request.prefixes, request.weights),
        split=request.split,
        num_dataset_builder_threads=threads,
        path_to_cache=str(folder),
        tokenizer=request.tokenizer,
        mid_level_dataset_surplus=0.005 + _rounding_margin(request),
        reset_position_ids=request.reset_position_ids,
        reset_attention_mask=request.reset_attention_mask,
        eod_mask_loss=request.eod_mask_loss,
        create_attention_mask=False,
    )
    # mcore builds every split with a share, asked for or not, and loops for ever over one without documents.
    config.split_matrix = [part if size else None for part, size in zip(config.split_matrix, sizes, strict=True)]
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return train, valid


def build_index_cache(request: IndexRequest, folder: Path) -> None:
    """Build the indices of `request` as `folder`, unless it is there. For one process, outside a job.

    Safe when several processes or nodes build the same folder: the first rename wins, and all build the same.
    Raises DataError when the folder cannot be written.
    """
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        temporary.mkdir()
    except OSError as error:
        raise DataError(
            f"the index cache cannot be written: {error.strerror}",
            where=folder.parent,
            remedy="Set data.data_cache_path to a folder that every node can read and rank 0 can write",
        ) from error
    try:
        with _group_of_one():
            open_datasets(request, temporary)
        for path in temporary.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        with contextlib.suppress(OSError):  # another process was faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not folder.is_dir():
        raise DataError("the index cache could not be put in place", where=folder, remedy="Check the file system")


def _rounding_margin(request: IndexRequest) -> float:
    """The share by which every part of a blend is enlarged beyond mcore's 0.5 %.

    mcore rounds each of k parts up and blends as many samples as that makes, so that a part with weight w
    may be asked for w * k samples more than it was built for: more than 0.5 % when there are many parts and
    few samples.
    """
    smallest = min(samples for samples in (request.train_samples, request.valid_samples) if samples)
    return len(request.prefixes) / smallest


@contextlib.contextmanager
def _group_of_one() -> Iterator[None]:
    """A process group of this process alone: mcore 0.16 asks for the rank before writing a blend's index."""
    import torch.distributed as dist

    assert not dist.is_initialized(), "the index cache is built outside a distributed job"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _remove_leftovers(parent: Path) -> None:
    """Remove the temporary folders of processes of this host that are gone."""
    for path in parent.glob(f".*.{socket.gethostname()}.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not Path("/proc", process).exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    """Read `{"folder": ..., "request": ...}` from standard input, build, print the error's fields if any."""
    order = json.loads(sys.stdin.read())
    try:
        build_index_cache(IndexRequest.from_json(json.dumps(order["request"])), Path(order["folder"]))
    except DataError as error:
        print(json.dumps(error.fields()))
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
