"""Packing: every document whole in one window, few windows, answers kept; and the dataset reads windows as samples."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zaya.config.sections import DataConfig
from megatron_zaya.data.datasets import build_datasets, check_data
from megatron_zaya.data.errors import DataError
from megatron_zaya.data.packing import best_fit_decreasing, pack, trim_reasoning
from megatron_zaya.data.prepare import prepare
from megatron_zaya.data.tokenizer import ByteTokenizer


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60))
def test_every_item_is_in_one_bin_and_no_bin_too_full(lengths):
    bins = best_fit_decreasing(lengths, 50)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in items) <= 50 for items in bins)
    # No two bins could have been one: the guarantee behind every any-fit rule.
    fills = sorted(sum(lengths[i] for i in items) for items in bins)
    assert all(a + b > 50 for a, b in pairwise(fills[:2]))


def test_the_fullest_bin_that_takes_an_item_gets_it():
    assert best_fit_decreasing([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]
    assert best_fit_decreasing([7, 6, 3], 10) == [[0, 2], [1]]
    with pytest.raises(ValueError, match="item 1 has 11"):
        best_fit_decreasing([1, 11], 10)


def test_trimming_keeps_question_and_answer():
    tokenizer = ByteTokenizer()
    begin, end = tokenizer.encode("<think>"), tokenizer.encode("</think>")
    text = "What is 6 x 7? <think>six times seven is forty-two, surely, yes</think> 42."
    document = tokenizer.encode(text)
    for limit in range(len(text) - 1, len(text) - 40, -1):
        shorter = trim_reasoning(document, limit, begin, end)
        result = tokenizer.decode(shorter)
        assert len(shorter) == limit
        assert result.startswith("What is 6 x 7? <think>") and result.endswith("</think> 42.")
    assert trim_reasoning(document, 20, begin, end) is None
    assert trim_reasoning(tokenizer.encode("no marks here"), 5, begin, end) is None


@pytest.fixture
def reasoning(tmp_path):
    """200 questions with reasoning of very different lengths; two with endless answers."""
    generator = np.random.default_rng(0)
    lines = []
    for number in range(200):
        thought = "so " * int(generator.integers(1, 120))
        answer = "long " * 100 if number in (7, 90) else f"answer {number}."
        lines.append(json.dumps({"text": f"question {number}? <think>{thought}</think> {answer}"}))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    prepare([tmp_path / "text.jsonl"], tmp_path / "documents", workers=1)
    return tmp_path


MARKS = dict(reasoning_begin="<think>", reasoning_end="</think>")


def test_windows_hold_whole_documents_and_every_answer(reasoning):
    report = pack(reasoning / "documents", reasoning / "packed", 256, **MARKS)
    assert (report.documents, report.left_out, report.cut) == (198, 2, 0) and report.trimmed > 20
    assert report.padding_tokens < 0.05 * report.windows * 256
    tokenizer = ByteTokenizer()
    windows = np.fromfile(reasoning / "packed.bin", np.uint16).reshape(-1, 256)
    assert len(windows) == report.windows
    texts = [part for window in windows for part in tokenizer.decode(window[window < 256]).split("question ")[1:]]
    numbers = {int(text.split("?")[0]) for text in texts}
    assert numbers == set(range(200)) - {7, 90}
    for text in texts:
        number = text.split("?")[0]
        assert text.endswith(f"</think> answer {number}.") and "<think>so" in text
    assert (windows[:, -1] == tokenizer.eod).all()


def test_packing_twice_gives_the_same_bytes(reasoning):
    for name in ("one", "two"):
        pack(reasoning / "documents", reasoning / name, 256, **MARKS)
    assert (reasoning / "one.bin").read_bytes() == (reasoning / "two.bin").read_bytes()


def test_without_marks_long_documents_are_cut(reasoning):
    report = pack(reasoning / "documents", reasoning / "packed", 256)
    assert report.trimmed == report.left_out == 0 and report.cut > 20


def test_every_sample_is_a_window_and_padding_is_not_learnt(reasoning):
    pack(reasoning / "documents", reasoning / "packed", 256, **MARKS)
    windows = np.fromfile(reasoning / "packed.bin", np.uint16).reshape(-1, 256)
    config = DataConfig(data_path=[str(reasoning / "packed")], seq_length=256, split="100,0,0", eod_mask_loss=True)
    dataset = build_datasets(config, train_samples=len(windows) - 1, valid_samples=0, seed=3).train
    known = {window.tobytes() for window in np.where(windows == 257, 0, windows)}
    for index in range(len(windows) - 1):
        sample = dataset[index]
        tokens = sample["tokens"].numpy().astype(np.uint16)
        assert tokens.tobytes() in known
        learnt = sample["loss_mask"].numpy() > 0
        assert not learnt[-1] and not learnt[sample["labels"].numpy() == 257].any()


def test_another_sequence_length_is_refused(reasoning):
    pack(reasoning / "documents", reasoning / "packed", 256, **MARKS)
    with pytest.raises(DataError, match="windows of 256 tokens"):
        check_data(DataConfig(data_path=[str(reasoning / "packed")], seq_length=128))


def test_one_mark_alone_is_refused(reasoning):
    with pytest.raises(DataError, match="Give both"):
        pack(reasoning / "documents", reasoning / "packed", 256, reasoning_begin="<think>")
