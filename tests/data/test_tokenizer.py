"""Tokenizers: lossless bytes, a Hugging Face folder, and the errors for folders that will not do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zaya.data.errors import DataError
from megatron_zaya.data.tokenizer import (
    NO_PAD,
    ByteTokenizer,
    HuggingFaceTokenizer,
    load_tokenizer,
    tokenizer_identity,
)
from tests.data.conftest import write_tokenizer


@settings(deadline=None)
@given(st.text())
def test_bytes_are_lossless(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids, tokenizer.eod, tokenizer.pad]) == text


def test_byte_facts() -> None:
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (258, 256, 257)
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"


def test_folder(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    texts = ["the quick brown fox", "äöü €𝄞\r\n", ""]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert len(tokenizer.encode(texts[0])) < len(texts[0])
    assert (tokenizer.pad, tokenizer.eod) == (0, 1)
    assert tokenizer.vocab_size == 1 + max(tokenizer._backend.get_vocab().values())


def test_special_tokens_in_text_stay_text(tokenizer_folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tokenizer_folder)
    ids = tokenizer.encode("a <eos> b <pad>")
    assert tokenizer.eod not in ids and tokenizer.pad not in ids
    assert tokenizer.decode(ids) == "a <eos> b <pad>"


def test_identity_is_of_the_content(tokenizer_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    identity = HuggingFaceTokenizer(tokenizer_folder).unique_identifiers
    assert identity == HuggingFaceTokenizer(copy).unique_identifiers == tokenizer_identity(copy)
    with (copy / "tokenizer.json").open("a") as stream:
        stream.write("\n")
    assert tokenizer_identity(copy) != identity
    json.dumps(identity)


def test_end_of_document_from_config_json(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t", eos=None, pad=None)
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": [1, 0]}}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eod, tokenizer.pad) == (1, NO_PAD)


def test_padding_that_is_also_end_of_document_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(write_tokenizer(tmp_path / "t", pad="<eos>")).pad == NO_PAD


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = write_tokenizer(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    cases = {
        "no such tokenizer folder": tmp_path / "absent",
        "no tokenizer.json": tmp_path / "empty",
        "names no end-of-document token": write_tokenizer(tmp_path / "no_eos", eos=None),
        "that is in its vocabulary": write_tokenizer(tmp_path / "alien", eos="<alien>"),
        "cannot be read": broken,
    }
    for message, folder in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            load_tokenizer(folder)
        assert str(folder) in str(caught.value)


def test_missing_library_names_the_extra(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"megatron-zaya\[hf\]"):
        load_tokenizer(tokenizer_folder)
    assert tokenizer_identity(tokenizer_folder)["eos"] == "<eos>"


def test_imports_and_checks_are_torch_free(corpus: Path) -> None:
    code = f"""
import sys
import megatron_zaya.data.errors, megatron_zaya.data.prepare, megatron_zaya.data.tokenizer
from megatron_zaya.data.datasets import check_data
from tests.data.conftest import Settings
check_data(Settings([{str(corpus)!r}]))
assert not {{"torch", "megatron", "tokenizers", "rich"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
