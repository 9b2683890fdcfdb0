"""Train and validation datasets for a run, over mcore's GPTDataset and its blends; and their checks.

`check_data` reads headers only and imports no torch: it is what a command runs first. `build_datasets` is
called by every rank; one process per file system builds the sample indices (`index_cache.py`), the others
read them. `order_fingerprint` tells whether a resumed run sees the same samples in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from megatron_zaya.data.blend import Blend, parse_blend, split_bounds
from megatron_zaya.data.errors import DataError
from megatron_zaya.data.index_cache import (
    FAILED,
    IndexRequest,
    TokenizerFacts,
    build_index_cache,
    open_datasets,
)
from megatron_zaya.data.index_file import (
    BLOCK_BYTES,
    IndexFile,
    data_identity,
    read_index,
    read_sidecar,
    sampled_offsets,
)
from megatron_zaya.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_identity

CACHE_FOLDER = ".index_cache"
SPLITS = ("training", "validation")

T = TypeVar("T")


class DataSettings(Protocol):
    """The part of the run's configuration that describes its data; `config` has each field's meaning."""

    data_path: list[str]
    split: str
    seq_length: int
    tokenizer_model: str
    reset_position_ids: bool
    reset_attention_mask: bool
    eod_mask_loss: bool
    data_cache_path: str | None


@dataclass(frozen=True)
class Datasets:
    """mcore datasets; items hold `tokens`, `labels`, `loss_mask`, `position_ids`, each `[seq_length]`.

    `loss_mask` is float32, the rest int64. A blend's items also have `dataset_id`. None where 0 samples were
    asked.
    """

    train: Any
    valid: Any


def check_data(config: DataSettings) -> None:
    """Whether `config` names data that can be trained on, from headers and sidecars alone; imports no torch.

    Raises DataError for missing, damaged or truncated files, a malformed blend or split, a tokenizer other
    than the one that prepared the data, and a training or validation share that is shorter than one sample.
    """
    if config.seq_length < 1:
        raise DataError("the sequence length must be at least 1", where="data.seq_length", value=config.seq_length)
    blend = parse_blend(config.data_path)
    identity = tokenizer_identity(config.tokenizer_model)
    for prefix in blend.prefixes:
        index = read_index(prefix)
        _check_tokenizer(prefix, config.tokenizer_model, identity)
        _check_windows(prefix, config.seq_length)
        for name, bounds in zip(SPLITS, split_bounds(config.split, index.sequences), strict=False):
            if bounds is not None:
                _check_split(index, name, bounds, config)


def build_datasets(
    config: DataSettings,
    *,
    train_samples: int,
    valid_samples: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    local_rank: int | None = None,
    group: Any = None,
) -> Datasets:
    """The datasets of a run, with at least as many samples as asked; documents repeat when they must.

    In a distributed job every rank of the world calls it and all return together: rank 0 of `group` (default:
    the world) builds the sample indices. Where the cache is on a disk of each node's own, pass `local_rank`,
    so that local rank 0 builds what its node does not see. Without torch.distributed this process builds. The
    indices are cached beside the first prefix, or under `data_cache_path`. Several prefixes without weights
    are mixed by their token counts.

    Raises DataError as `check_data` does, and when the indices cannot be built or are not visible; what fails
    on one rank is raised on all.
    """
    request = _agree(lambda: _request(config, train_samples, valid_samples, seed, tokenizer), group)
    data_folder = Path(request.prefixes[0]).parent
    root = Path(config.data_cache_path) if config.data_cache_path else data_folder / CACHE_FOLDER
    folder = root.absolute() / request.folder_name()
    _provide_cache(request, folder, local_rank, group)
    train, valid = open_datasets(request, folder)
    for name, dataset, samples in zip(SPLITS, (train, valid), (train_samples, valid_samples), strict=True):
        if samples and len(dataset) < samples:
            raise DataError(f"the {name} data hold too few samples", where="data.data_path", value=len(dataset))
    return Datasets(train, valid)


def order_fingerprint(dataset: Any) -> str:
    """16 hexadecimal digits that change when the samples, or the order in which training sees them, change.

    Covers the contents of mcore's indices (whole up to 1 MiB each, evenly spaced blocks beyond) and of the
    data, and no path, date or seed: moved data keeps its fingerprint. Works for single datasets and blends.
    """
    digest = hashlib.sha256()
    _digest_dataset(digest, dataset)
    return digest.hexdigest()[:16]


def _check_tokenizer(prefix: str, configured: str, identity: dict[str, Any]) -> None:
    sidecar = read_sidecar(prefix)
    if sidecar is None or sidecar.get("tokenizer") == identity:
        return
    by = sidecar.get("tokenizer_name", "the tokenizer of the data")
    raise DataError(
        f"the data were prepared with another tokenizer ({by}) than the configured one",
        where=f"{prefix}, data.tokenizer_model",
        value=configured,
        remedy=f"Set data.tokenizer_model to {by}, or prepare the data again with this one",
    )


def _check_windows(prefix: str, seq_length: int) -> None:
    packed = (read_sidecar(prefix) or {}).get("window_tokens")
    if packed not in (None, seq_length):
        raise DataError(
            f"the data were packed into windows of {packed} tokens",
            where=f"{prefix}, data.seq_length",
            value=seq_length,
            remedy=f"Set data.seq_length to {packed}, or pack again (zaya data pack)",
        )


def _check_split(index: IndexFile, name: str, bounds: tuple[int, int], config: DataSettings) -> None:
    """mcore would repeat the documents of too short a split, and loop for ever over an empty one."""
    begin, end = bounds
    # Every document has a token at least, so a long enough list of them needs no reading of their lengths.
    tokens = end - begin
    if tokens <= config.seq_length:
        tokens = int(index.lengths(begin, end).sum(dtype=np.int64))
    if tokens <= config.seq_length:
        raise DataError(
            f"the {name} share of the data is shorter than one sample of {config.seq_length} + 1 tokens",
            where=f"{index.prefix}, data.split {config.split!r}",
            value=f"{tokens} tokens in {end - begin} of {index.sequences} documents",
            remedy="Shorten data.seq_length, change data.split, or prepare more data",
        )


def _request(
    config: DataSettings, train_samples: int, valid_samples: int, seed: int, tokenizer: Tokenizer | None
) -> IndexRequest:
    """What to build, once `config` is checked against the data and the sample counts."""
    check_data(config)
    if train_samples < 0 or valid_samples < 0 or not train_samples + valid_samples:
        counts = f"{train_samples} training, {valid_samples} validation"
        raise DataError("no samples are asked for", value=counts)
    parts = split_bounds(config.split, 1)
    for name, samples, part in zip(SPLITS, (train_samples, valid_samples), parts, strict=False):
        if samples and part is None:
            remedy = "Give it a share, for example `969,30,1`, or ask for none of its samples"
            raise DataError(f"the split leaves no {name} data", where="data.split", value=config.split, remedy=remedy)
    tokenizer = load_tokenizer(config.tokenizer_model) if tokenizer is None else tokenizer
    blend = parse_blend(config.data_path)
    prefixes = [str(Path(prefix).absolute()) for prefix in blend.prefixes]
    return IndexRequest(
        prefixes=prefixes,
        weights=_weights(blend),
        data=[data_identity(prefix) for prefix in prefixes],
        split=config.split,
        seq_length=config.seq_length,
        seed=seed,
        train_samples=train_samples,
        valid_samples=valid_samples,
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
        eod_mask_loss=config.eod_mask_loss,
        tokenizer=TokenizerFacts(tokenizer.unique_identifiers, tokenizer.vocab_size, tokenizer.eod, tokenizer.pad),
    )


def _weights(blend: Blend) -> list[float] | None:
    if len(blend.prefixes) == 1:
        return None
    if blend.weights is not None:
        return list(blend.weights)
    # mcore passes once over several prefixes without weights, but repeats a single one; we repeat both.
    return [float(read_index(prefix).tokens) for prefix in blend.prefixes]


def _provide_cache(request: IndexRequest, folder: Path, local_rank: int | None, group: Any) -> None:
    """Return on every rank once `folder` is complete and visible there; raise on every rank otherwise."""
    import torch.distributed as dist

    if not dist.is_initialized():
        build_index_cache(request, folder)
        return
    rank = dist.get_rank(group)
    _agree(lambda: _build_apart(request, folder) if rank == 0 else None, group)
    # A node with a disk of its own does not see what rank 0 built.
    _agree(lambda: _build_apart(request, folder) if local_rank == 0 else None, group)
    _agree(lambda: _check_visible(folder), group)


def _agree(action: Callable[[], T], group: Any) -> T:
    """Run `action` on every rank and wait for all; its result, which all ranks must share.

    An error on one rank is raised on all: a rank that stopped alone would leave the others waiting for it.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as problem:
        error = problem
    fields = None
    if error is not None:
        shared = error if isinstance(error, DataError) else DataError(f"reading the data failed: {error!r}")
        fields = {
            **shared.fields(),
            "what": f"{shared.what} [rank {dist.get_rank(group)}, {socket.gethostname()}]",
        }
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (fields, result), group=group)
    if error is not None and not isinstance(error, DataError):
        raise error
    for fields, _ in outcomes:
        if fields is not None:
            raise DataError.from_fields(fields)
    for rank, (_, other) in enumerate(outcomes):
        if other != outcomes[0][1]:
            raise DataError(
                f"rank {rank} and rank 0 see different data or ask for different samples",
                where="data.data_path",
                remedy="Give every node the same files and every rank the same configuration",
            )
    return result


def _build_apart(request: IndexRequest, folder: Path) -> None:
    """Build the cache in a process outside the job. Raises DataError when that fails."""
    if folder.is_dir():
        return
    order = json.dumps({"folder": str(folder), "request": asdict(request)})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "megatron_zaya.data.index_cache"]
    done = subprocess.run(command, input=order, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        return
    if done.returncode == FAILED:
        raise DataError.from_fields(json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    raise DataError(f"building the sample indices failed: {last}", where=folder, value=f"exit {done.returncode}")


def _check_visible(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(
            "the sample indices that another process built are not visible here",
            where=folder,
            remedy="Set data.data_cache_path to a folder that all nodes share",
        )


def _digest_dataset(digest: Any, dataset: Any) -> None:
    if hasattr(dataset, "datasets"):  # a blend: which part each sample comes from, then the parts
        _digest_array(digest, dataset.dataset_index)
        _digest_array(digest, dataset.dataset_sample_index)
        for part in dataset.datasets:
            _digest_dataset(digest, part)
        return
    for array in (dataset.document_index, dataset.sample_index, dataset.shuffle_index):
        _digest_array(digest, array)
    digest.update(f"{dataset.config.sequence_length};{data_identity(dataset.dataset_path)}".encode())


def _digest_array(digest: Any, array: np.ndarray) -> None:
    digest.update(f"{array.dtype.str}{array.shape};".encode())
    flat = array.reshape(-1).view(np.uint8)
    for offset in sampled_offsets(flat.size):
        digest.update(flat[offset : offset + BLOCK_BYTES].tobytes())
