"""The one reader of rank and world."""

from __future__ import annotations

import pytest

from launch.env import LaunchError, RankEnv, read_rank_env

GOOD = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "29500",
}


def test_torchrun_world():
    assert read_rank_env(GOOD) == RankEnv(rank=3, world_size=4, local_rank=1, local_world_size=2)


def test_no_launcher_is_a_world_of_one():
    assert read_rank_env({}).is_single


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "not RANK"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "4"}, "not a possible world"),
        ({"LOCAL_RANK": "2"}, "not a possible world"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
        ({"MASTER_PORT": ""}, "MASTER_PORT"),
    ],
)
def test_a_contradiction_is_refused(change, message):
    environ = {name: value for name, value in (GOOD | change).items() if value is not None}
    with pytest.raises(LaunchError, match=message):
        read_rank_env(environ)
