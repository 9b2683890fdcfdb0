"""Pure arithmetic of `data_path` and `split`, Megatron's conventions checked strictly; no files, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_zaya.data.errors import DataError


@dataclass(frozen=True)
class Blend:
    """Prefixes and their weights, `None` when none were given."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(data_path: Sequence[str]) -> Blend:
    """`data_path` as prefixes, or as weight, prefix, weight, prefix, ...

    Raises DataError when it is empty, mixes both forms, lacks a prefix, or has a weight that is no positive
    number.
    """
    entries = [str(entry).strip() for entry in data_path]
    where = "data.data_path"
    example = "Write prefixes (`[a, b]`), or weights and prefixes in turn (`[0.3, a, 0.7, b]`)"
    if not entries or not all(entries):
        raise DataError("there is no data prefix, or an empty one", where=where, value=entries, remedy=example)
    numbers = [_number(entry) for entry in entries]
    if all(number is None for number in numbers):
        return Blend(tuple(entries), None)
    alternate = all((number is not None) == (i % 2 == 0) for i, number in enumerate(numbers))
    if not alternate or len(entries) % 2:
        raise DataError("weights and prefixes do not alternate", where=where, value=" ".join(entries), remedy=example)
    weights = tuple(number for number in numbers if number is not None)
    for weight, prefix in zip(weights, entries[1::2], strict=True):
        if not (math.isfinite(weight) and weight > 0):
            remedy = "Leave the prefix out, or give it a positive share"
            raise DataError(f"the weight of {prefix} is no positive number", where=where, value=weight, remedy=remedy)
    return Blend(tuple(entries[1::2]), weights)


def split_bounds(split: str, sequences: int) -> list[tuple[int, int] | None]:
    """The half-open document ranges of training, validation and test data, exactly as mcore cuts them.

    None for a split without a share. Raises DataError when `split` is not one to three shares of which one is
    positive.
    """
    written = [share.strip() for share in split.split(",")]
    # Plain decimals only: mcore reads "1e-3" as two shares.
    shares = [float(share) for share in written if re.fullmatch(r"\d+\.?\d*|\.\d+", share)]
    if len(shares) != len(written) or len(shares) > 3 or not sum(shares):
        raise DataError(
            "the split is not one to three shares",
            where="data.split",
            value=split,
            remedy="Write the shares of training, validation and test data, for example `969,30,1`",
        )
    vector = np.array(shares + [0.0] * (3 - len(shares)))
    parts = (vector / vector.sum()).tolist()
    bounds: list[tuple[int, int] | None] = []
    begin = 0.0
    for part in parts:
        end = begin + part
        cut = (round(begin * float(sequences)), round(end * float(sequences)))
        bounds.append(cut if part else None)
        begin = end
    return bounds


def _number(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None
