"""Preparing: what is stored, in which order, for any number of workers; bad input leaves nothing."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_zaya.data.errors import DataError
from megatron_zaya.data.index_file import read_index, read_sidecar
from megatron_zaya.data.prepare import prepare
from megatron_zaya.data.sources import find_files
from megatron_zaya.data.tokenizer import load_tokenizer
from tests.data.conftest import write_texts


def stored_texts(prefix: Path, tokenizer: str = "byte") -> list[str]:
    """Every document, read back through mcore, decoded, after checking its end."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    loaded = load_tokenizer(tokenizer)
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    documents = [dataset[i] for i in range(len(dataset))]
    assert all(ids[-1] == loaded.eod for ids in documents)
    return [loaded.decode(ids[:-1]) for ids in documents]


def visible(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def json_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    data = "".join(json.dumps({key: text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_files_and_lines_round_trip(tmp_path: Path) -> None:
    texts = [f"line {i}\n€" for i in range(5)]
    (tmp_path / "one.txt").write_bytes("first\r\nfile €".encode())
    inputs = [
        tmp_path / "one.txt",
        json_lines(tmp_path / "a.jsonl", texts),
        json_lines(tmp_path / "b.jsonl.gz", ["z", ""]),
    ]
    report = prepare(inputs, tmp_path / "out" / "set.v1")
    assert stored_texts(tmp_path / "out" / "set.v1") == ["first\r\nfile €", *texts, "z"]
    assert visible(tmp_path / "out") == {"set.v1.bin", "set.v1.idx", "set.v1.json"}
    assert (report.documents, report.empty, report.dtype) == (7, 1, "uint16")
    sidecar = read_sidecar(report.prefix)
    index = read_index(report.prefix)
    assert sidecar is not None and sidecar["tokens"] == report.tokens == index.tokens
    assert index.lengths().sum() == report.tokens and index.item_bytes == 2
    assert "7 documents" in report.summary() and "1 empty" in report.summary()


def test_hugging_face_round_trip(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", ["the quick <eos> fox", "äöü"], key="body")
    prepare([source], tmp_path / "out", str(tokenizer_folder), json_key="body", workers=2)
    assert stored_texts(tmp_path / "out", str(tokenizer_folder)) == ["the quick <eos> fox", "äöü"]


def test_folders_are_filtered_and_ordered_the_same_everywhere(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = write_texts(tmp_path / name / "deep", 30).parent
        (folder / "skipped.bin").write_bytes(b"\x00\xff")
        (folder / ".hidden.txt").write_text("hidden")
        (folder / "latin.txt").write_bytes("ä".encode("latin-1"))
        (folder / "empty.txt").write_text("")
    first = [f.path.relative_to(tmp_path / "a") for f in find_files([tmp_path / "a"], [".txt"])]
    assert first == [f.path.relative_to(tmp_path / "b") for f in find_files([tmp_path / "b"], [".txt"])]
    report = prepare([tmp_path / "a"], tmp_path / "out", suffixes=["txt"])
    assert (report.documents, report.empty, len(report.undecodable)) == (30, 1, 1)
    assert first != sorted(first)


def test_workers_change_nothing(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", 300)
    lines = json_lines(tmp_path / "big.jsonl.gz", [f"{i} " * 400 for i in range(2500)])
    for workers in (1, 2):
        prepare([folder, lines, folder], tmp_path / str(workers) / "set", workers=workers)
    for ending in ("bin", "idx", "json"):
        one, two = ((tmp_path / str(w) / f"set.{ending}").read_bytes() for w in (1, 2))
        assert one == two


def test_limit_is_exact_and_python_stdlib_is_text(tmp_path: Path) -> None:
    report = prepare(["python-stdlib"], tmp_path / "std", limit_documents=40)
    assert report.documents == len(stored_texts(tmp_path / "std")) == 40
    assert sum("import" in text or "def " in text for text in stored_texts(tmp_path / "std")) > 20
    assert not any("site-packages" in f.path.parts for f in find_files(["python-stdlib"]))


def test_large_vocabularies_are_stored_as_int32(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["<far>"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    report = prepare([json_lines(tmp_path / "a.jsonl", ["fox"])], tmp_path / "out", str(folder))
    assert report.dtype == "int32" and np.memmap(tmp_path / "out.bin", np.int32)[-1] == 1


BAD_CONTENT = {
    "json": ("a.jsonl", b'{"text": "ok"}\n\n{"text": \n', r"a\.jsonl, line 3: the line is not valid JSON"),
    "key": (
        "a.jsonl",
        b'{"text": "ok"}\n{"body": "x"}\n',
        r"line 2: the line has no key 'text' \(.* keys body\)",
    ),
    "type": ("a.jsonl", b'{"text": 7}\n', r"line 1: the value of 'text' is no text \(found 7\)"),
    "object": ("a.jsonl", b'["text"]\n', "line 1: the line is JSON but no object"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: .*no valid Unicode"),
    "encoding": ("a.jsonl", b'{"text": "\xff"}\n', "line 1: the line is not valid JSON"),
    "gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "ok"}\n' * 9)[:-9], "cannot be read beyond line"),
    "text": ("a.txt", b"ok \xff", r"a\.txt: the file is not UTF-8 text \(found byte 0xff at offset 3\)"),
    "nothing": ("a.txt", b"", "the input holds no text"),
}


@pytest.mark.parametrize(("case", "workers"), [*((case, 1) for case in BAD_CONTENT), ("gzip", 2)])
def test_bad_content(tmp_path: Path, case: str, workers: int) -> None:
    name, content, message = BAD_CONTENT[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare([tmp_path / name], tmp_path / "new" / "deep" / "out", workers=workers)
    assert visible(tmp_path) == {name}


def test_bad_requests(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "notes.jsonl", ["x"])
    (tmp_path / "folder").mkdir()
    cases = [
        (([tmp_path / "note.jsonl"], tmp_path / "out"), {}, r"Did you mean .*notes\.jsonl\?"),
        (([tmp_path / "folder"], tmp_path / "out"), {"suffixes": [".md"]}, r"holds no file ending in \.md"),
        (([], tmp_path / "out"), {}, "no input is named"),
        (([source], tmp_path / "out.bin"), {}, "Give the prefix without its ending"),
        (([source], tmp_path / "folder"), {}, "the output prefix is a folder"),
        (([source], tmp_path / "out"), {"workers": 0}, "number of workers"),
        (([source], tmp_path / "out"), {"limit_documents": 0}, "limit of documents"),
        (([source], tmp_path / "out"), {"tokenizer": str(tmp_path / "none")}, "no such tokenizer folder"),
        (([source], source / "out"), {}, "the output cannot be written"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(DataError, match=message):
            prepare(*arguments, **options)
    assert visible(tmp_path) == {"notes.jsonl", "folder"}


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(DataError("bad", where="here", value=3, remedy="Fix it")))
    assert str(error) == "here: bad (found 3). Fix it"


def test_progress_is_a_bar_on_a_terminal_only(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "texts", 3)
    for terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=120)
        prepare([source], tmp_path / "out", overwrite=True, console=console)
        assert ("3 documents" in stream.getvalue()) == terminal
