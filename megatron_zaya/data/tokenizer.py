"""Tokenizers: the byte-level one that needs no files, and any local Hugging Face tokenizer folder.

Both offer what mcore's GPTDataset reads (`vocab_size`, `eod`, `pad`, `unique_identifiers`) and fast encoding
to numpy arrays. `unique_identifiers` describes the content, not the path, so a tokenizer folder may move
without invalidating prepared data. Nothing here imports torch; `tokenizers` is imported when a folder is
loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_zaya.data.errors import DataError

BYTE = "byte"
"""The name that selects the byte tokenizer wherever a tokenizer is named."""

NO_PAD = -1
"""`pad` of a tokenizer without a padding token of its own; mcore's value too, which no text can contain."""


class Tokenizer(Protocol):
    """What preparing and training need of a tokenizer.

    `vocab_size` is one more than the largest id. `eod` ends every document. `pad` is masked out of the loss
    by mcore, so it must never occur in text: `NO_PAD` where the tokenizer has none. `unique_identifiers` is
    a JSON-able description by which mcore keys its index cache and prepared data remembers its tokenizer.
    """

    vocab_size: int
    eod: int
    pad: int

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """The content's description."""

    def encode(self, text: str) -> np.ndarray:
        """The ids `[n]` of `text`, without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`."""


class ByteTokenizer:
    """UTF-8 bytes as tokens: ids 0 to 255, then `eod` 256 and `pad` 257. Lossless, and needs no files."""

    vocab_size = 258
    eod = 256
    pad = 257

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """The content's description; the same on every machine."""
        return {"class": "ByteTokenizer", "vocab_size": self.vocab_size}

    def encode(self, text: str) -> np.ndarray:
        """The bytes of `text` as uint16 ids `[n]`. Raises UnicodeEncodeError on lone surrogates."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; special ids are left out and a cut-off character becomes U+FFFD."""
        values = np.asarray(ids, dtype=np.int64)
        return values[values < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A folder with `tokenizer.json`, through the `tokenizers` library; no network, no code from the folder.

    The end-of-document token is the folder's `eos_token` (tokenizer_config.json, special_tokens_map.json) or
    its `eos_token_id` (config.json). Special tokens that occur in the text itself are encoded as ordinary
    text: a document that mentions the end-of-document token must not end there.

    Raises DataError when the folder, its tokenizer.json, the end-of-document token or the library is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._special = _special_tokens(self.folder)
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                "a Hugging Face tokenizer folder needs the `tokenizers` package, which is not installed",
                where=self.folder,
                remedy="Install it with `pip install 'megatron-zaya[hf]'`, or use the tokenizer `byte`",
            ) from error
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception for every unreadable file
            raise DataError(
                f"tokenizer.json cannot be read: {error}",
                where=self.folder / "tokenizer.json",
                remedy="Save the tokenizer again with a recent `tokenizers` or `transformers`",
            ) from error
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        eod = self._id("eos")
        if eod is None:
            raise _no_eod(self.folder)
        self.eod = eod
        pad = self._id("pad")
        # A padding token that doubles as end of document would take every document's end out of the loss.
        self.pad = NO_PAD if pad is None or pad == eod else pad

    def _id(self, name: str) -> int | None:
        token = self._special[name]
        if isinstance(token, int):
            return token if 0 <= token < self.vocab_size else None
        return None if token is None else self._backend.token_to_id(token)

    @cached_property
    def unique_identifiers(self) -> dict[str, Any]:
        """The content's description, whatever the path: a hash of tokenizer.json and the special tokens."""
        return _folder_identity(self.folder, self._special)

    def encode(self, text: str) -> np.ndarray:
        """The int32 ids `[n]` of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text, by the library's threads unless TOKENIZERS_PARALLELISM=false."""
        batch = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)
        encodings = batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, special tokens included in their written form."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(name_or_folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer called `byte`, or the Hugging Face one in a folder. Raises DataError as they do."""
    if str(name_or_folder) == BYTE:
        return ByteTokenizer()
    return HuggingFaceTokenizer(name_or_folder)


def tokenizer_identity(name_or_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`load_tokenizer(...).unique_identifiers` without loading the tokenizer or needing its library.

    Raises DataError when the folder or its tokenizer.json is missing, or names no end-of-document token.
    """
    if str(name_or_folder) == BYTE:
        return ByteTokenizer().unique_identifiers
    folder = Path(name_or_folder)
    return _folder_identity(folder, _special_tokens(folder))


def _folder_identity(folder: Path, special: dict[str, str | int | None]) -> dict[str, Any]:
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    return {"class": "HuggingFaceTokenizer", "tokenizer_json_sha256": digest, **special}


def _special_tokens(folder: Path) -> dict[str, str | int | None]:
    """The folder's `eos` and `pad`, each a token's text or id. The first file that names one decides."""
    if not folder.is_dir():
        raise DataError(
            "there is no such tokenizer folder",
            where=folder,
            remedy=f"Give a folder that holds tokenizer.json, or `{BYTE}` for the byte tokenizer",
        )
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            "the tokenizer folder has no tokenizer.json",
            where=folder,
            value=", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty folder",
            remedy="Save the tokenizer in its fast form, as `save_pretrained` of transformers does",
        )
    named = [_read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    model = _read_json(folder / "config.json")
    found: dict[str, str | int | None] = {}
    for name in ("eos", "pad"):
        candidates: list[Any] = [settings.get(f"{name}_token") for settings in named]
        for settings in (model, model.get("text_config") or {}):
            candidates.append(settings.get(f"{name}_token_id"))
        found[name] = next((token for token in map(_plain_token, candidates) if token is not None), None)
    if found["eos"] is None:
        raise _no_eod(folder)
    return found


def _plain_token(value: Any) -> str | int | None:
    """A token as the files spell it: text, `{"content": text}`, an id, or a list whose first id counts."""
    if isinstance(value, dict):
        value = value.get("content")
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"this is not valid JSON: {error}", where=path, remedy="Repair or remove the file") from error
    return content if isinstance(content, dict) else {}


def _no_eod(folder: Path) -> DataError:
    return DataError(
        "the tokenizer names no end-of-document token that is in its vocabulary",
        where=folder,
        remedy='Add `{"eos_token": "..."}` to its tokenizer_config.json, naming a token of tokenizer.json',
    )
