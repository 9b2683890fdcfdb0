"""Small real data: text folders, prepared pairs and a tokenizer folder, all made in the test's own folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_zaya.data.prepare import prepare


@dataclass
class Settings:
    """Stands for the run's data configuration: the attributes that the data side reads."""

    data_path: list[str]
    split: str = "80,20,0"
    seq_length: int = 16
    tokenizer_model: str = "byte"
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    data_cache_path: str | None = None
    num_workers: int = 0
    extra: dict[str, str] = field(default_factory=dict)


def write_texts(folder: Path, count: int, words: str = "text") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.txt").write_text(f"{words} number {i}: " + "äöü €𝄞\r\n" * (1 + i % 7), encoding="utf-8")
    return folder


def write_tokenizer(folder: Path, *, eos: str | None = "<eos>", pad: str | None = "<pad>") -> Path:
    """A byte-level BPE tokenizer trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox and the lazy dog"] * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": {"content": eos} if eos else None, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared prefix of 60 short documents, byte tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    prepare([write_texts(folder / "texts", 60)], folder / "corpus")
    return folder / "corpus"


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second, smaller prefix with other text."""
    folder = tmp_path_factory.mktemp("second")
    prepare([write_texts(folder / "texts", 25, words="OTHER")], folder / "second")
    return folder / "second"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe")
