"""Which steps count as complete, and how a user may name one."""

from __future__ import annotations

import pytest

from ckpt.errors import CheckpointError
from ckpt.steps import complete_iterations, find_step, old_dir, step_dir, step_folders


def complete(root, iteration):
    folder = step_dir(root, iteration)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_only_complete_steps_count(tmp_path):
    assert complete_iterations(tmp_path / "absent") == []
    complete(tmp_path, 12_345_678)
    complete(tmp_path, 20)
    step_dir(tmp_path, 30).mkdir()
    complete(tmp_path, 40).rename(tmp_path / "iter_0000040.partial")
    (tmp_path / "iter_x").mkdir()
    assert complete_iterations(tmp_path) == [20, 12_345_678]


def test_a_step_that_is_being_replaced_counts_while_the_new_one_is_not_there(tmp_path):
    complete(tmp_path, 20).rename(old_dir(tmp_path, 20))
    assert step_folders(tmp_path) == {20: old_dir(tmp_path, 20)}
    complete(tmp_path, 20)
    assert step_folders(tmp_path) == {20: step_dir(tmp_path, 20)}


def test_a_step_may_be_named_by_run_by_folder_or_by_itself(tmp_path):
    root = tmp_path / "checkpoints"
    for iteration in (5, 10):
        complete(root, iteration)
    assert find_step(tmp_path) == (root, 10)
    assert find_step(root) == (root, 10)
    assert find_step(root, 5) == (root, 5)
    assert find_step(step_dir(root, 5)) == (root, 5)


@pytest.mark.parametrize(("path", "iteration", "message"), [("absent", None, "no such"), (".", 7, "there are 5")])
def test_a_missing_step_is_an_error(tmp_path, path, iteration, message):
    complete(tmp_path, 5)
    with pytest.raises(CheckpointError, match=message):
        find_step(tmp_path / path, iteration)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint step"):
        find_step(tmp_path)
