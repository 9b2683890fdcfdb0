"""`data_path` and `split` as pure arithmetic, the split against mcore's own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zaya.data.blend import parse_blend, split_bounds
from megatron_zaya.data.errors import DataError


def test_blends() -> None:
    assert parse_blend(["a"]).weights is None
    assert parse_blend(["a", "b"]).prefixes == ("a", "b")
    blend = parse_blend(["0.3", "a", "7", " b "])
    assert (blend.prefixes, blend.weights) == (("a", "b"), (0.3, 7.0))


@pytest.mark.parametrize(
    ("data_path", "message"),
    [
        ([], "no data prefix"),
        (["a", ""], "an empty one"),
        (["0.3", "a", "b"], "do not alternate"),
        (["0.3", "a", "0.7"], "do not alternate"),
        (["a", "0.3"], "do not alternate"),
        (["a", "b", "1", "c"], "do not alternate"),
        (["0", "a"], "the weight of a"),
        (["-1", "a", "1", "b"], "the weight of a"),
        (["nan", "a"], "the weight of a"),
    ],
)
def test_malformed_blends(data_path: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_blend(data_path)


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "0,0", "1,-1", "1e-3,1", "1,,1", "inf"])
def test_malformed_splits(split: str) -> None:
    with pytest.raises(DataError, match="not one to three shares"):
        split_bounds(split, 10)


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=3).filter(any), st.integers(0, 10**9))
def test_split_is_mcores(shares: list[int], sequences: int) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    split = ",".join(map(str, shares))
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    theirs = [m and (round(m[0] * float(sequences)), round(m[1] * float(sequences))) for m in matrix]
    assert split_bounds(split, sequences) == theirs
