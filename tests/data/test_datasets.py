"""Datasets through the real mcore: content, blends, caching, fingerprints, resuming, ranks, checks."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zaya.data.datasets import CACHE_FOLDER, build_datasets, check_data, order_fingerprint
from megatron_zaya.data.errors import DataError
from megatron_zaya.data.prepare import prepare
from megatron_zaya.data.sampler import ResumableSampler, build_dataloader
from megatron_zaya.data.tokenizer import ByteTokenizer
from tests.data.conftest import Settings, write_texts


def build(config: Settings, train: int = 40, valid: int = 8, seed: int = 1, **options):
    return build_datasets(config, train_samples=train, valid_samples=valid, seed=seed, **options)


def copied(prefix: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for ending in ("bin", "idx", "json"):
        shutil.copy(f"{prefix}.{ending}", folder / f"{prefix.name}.{ending}")
    return folder / prefix.name


def samples(dataset) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset))]


def test_samples_are_shifted_text(corpus: Path, tmp_path: Path) -> None:
    data = build(Settings([str(corpus)], data_cache_path=str(tmp_path)), valid=0)
    assert data.valid is None and len(data.train) >= 40
    item = data.train[0]
    assert sorted(item) == ["labels", "loss_mask", "position_ids", "tokens"]
    assert torch.equal(item["tokens"][1:], item["labels"][:-1])
    assert item["loss_mask"].tolist() == [1.0] * 16 and item["position_ids"].tolist() == list(range(16))


def test_training_and_validation_share_no_document(corpus: Path, tmp_path: Path) -> None:
    config = Settings([str(corpus)], split="50,50", seq_length=64, data_cache_path=str(tmp_path))
    data = build(config, train=30, valid=30)
    tokenizer = ByteTokenizer()
    numbers = []
    for dataset in (data.train, data.valid):
        documents = {int(i) for i in dataset.document_index}
        texts = [tokenizer.decode(dataset.dataset[i]) for i in documents]
        numbers.append({text.split(":")[0] for text in texts})
    assert numbers[0] and numbers[1] and not numbers[0] & numbers[1]


def test_documents_reset_and_end_is_masked_when_asked(corpus: Path, tmp_path: Path) -> None:
    config = Settings([str(corpus)], seq_length=256, data_cache_path=str(tmp_path))
    config = replace(config, reset_position_ids=True, eod_mask_loss=True)
    item = build(config, train=4, valid=0).train[0]
    (ends,) = torch.nonzero(item["tokens"] == ByteTokenizer.eod, as_tuple=True)
    assert len(ends) > 1 and item["loss_mask"][ends].sum() == 0
    assert item["position_ids"][ends[:-1] + 1].tolist() == [0] * (len(ends) - 1)


def test_the_cache_is_beside_the_data_whole_and_used(corpus: Path, tmp_path: Path) -> None:
    prefix = copied(corpus, tmp_path / "data")
    config = Settings([str(prefix)])
    first = samples(build(config).train)
    folders = list((tmp_path / "data" / CACHE_FOLDER).iterdir())
    dates = [path.stat().st_mtime_ns for path in sorted(folders[0].iterdir())]
    assert len(folders) == 1
    assert samples(build(config).train) == first
    assert dates == [path.stat().st_mtime_ns for path in sorted(folders[0].iterdir())]
    build(config, seed=2)
    assert len(list((tmp_path / "data" / CACHE_FOLDER).iterdir())) == 2


def test_new_data_under_the_old_name_get_new_indices(tmp_path: Path) -> None:
    prefix = tmp_path / "set"
    prints = []
    for count in (40, 30):
        shutil.rmtree(tmp_path / "texts", ignore_errors=True)
        prepare([write_texts(tmp_path / "texts", count)], prefix, overwrite=True)
        data = build(Settings([str(prefix)]))
        assert data.train.document_index.max() < count
        prints.append(order_fingerprint(data.train))
    assert prints[0] != prints[1]


def test_an_unwritable_cache_is_an_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"index cache cannot be written.*data_cache_path"):
        build(Settings([str(corpus)], data_cache_path=str(tmp_path / "file")))


def test_blend_follows_the_weights(corpus: Path, second: Path, tmp_path: Path) -> None:
    config = Settings(["3", str(corpus), "1", str(second)], data_cache_path=str(tmp_path))
    data = build(config, train=400, valid=20)
    assert len(data.train) >= 400 and len(data.valid) >= 20
    sources = [int(data.train[i]["dataset_id"]) for i in range(400)]
    assert abs(sources.count(1) / 400 - 0.25) < 0.02
    assert samples(data.train) == samples(build(config, train=400, valid=20).train)


def test_prefixes_without_weights_repeat_by_their_size(corpus: Path, second: Path, tmp_path: Path) -> None:
    config = Settings([str(corpus), str(second)], data_cache_path=str(tmp_path))
    data = build(config, train=2000, valid=0)
    sources = [int(i) for i in data.train.dataset_index]
    share = second.with_suffix(".bin").stat().st_size / sum(
        path.with_suffix(".bin").stat().st_size for path in (corpus, second)
    )
    assert len(data.train) >= 2000 and abs(sources.count(1) / len(sources) - share) < 0.01


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=12), st.integers(1, 60))
def test_any_blend_has_enough_samples(corpus: Path, weights: list[float], train: int) -> None:
    data_path = [entry for weight in weights for entry in (repr(weight), str(corpus))]
    cache = corpus.parent / "blends"
    data = build(Settings(data_path, data_cache_path=str(cache)), train=train, valid=0)
    assert len(data.train) >= train
    data.train[len(data.train) - 1]


def test_fingerprint_follows_the_order_alone(corpus: Path, second: Path, tmp_path: Path) -> None:
    config = Settings([str(corpus)], data_cache_path=str(tmp_path / "cache"))
    base = order_fingerprint(build(config).train)
    moved = copied(corpus, tmp_path / "moved")
    assert len(base) == 16
    assert base == order_fingerprint(build(replace(config, data_path=[str(moved)], data_cache_path=None)).train)
    assert base == order_fingerprint(build(replace(config, eod_mask_loss=True)).train)
    blend = replace(config, data_path=["1", str(corpus), "1", str(second)])
    others = [
        build(config, seed=2),
        build(config, train=4000),
        build(replace(config, seq_length=17)),
        build(replace(config, split="70,30")),
        build(replace(config, data_path=[str(second)])),
        build(blend),
        build(replace(blend, data_path=["2", *blend.data_path[1:]])),
        build(replace(blend, data_path=[*blend.data_path[2:], *blend.data_path[:2]])),
        build(blend, seed=2),
    ]
    prints = {base, *(order_fingerprint(data.train) for data in others)}
    assert len(prints) == len(others) + 1
    assert order_fingerprint(build(blend).train) in prints


def test_resumed_order_is_the_uninterrupted_one(corpus: Path, second: Path, tmp_path: Path) -> None:
    config = Settings(["3", str(corpus), "1", str(second)], data_cache_path=str(tmp_path))

    def batches(consumed: int, workers: int = 0):
        train = build(config).train
        sampler = ResumableSampler(40, consumed, 2, 0, 2)
        return [batch["tokens"] for batch in islice(build_dataloader(train, sampler, workers), len(sampler))]

    whole = batches(0)
    resumed = whole[:4] + batches(16, workers=1)
    assert len(whole) == 10 and all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def run_rank(rank: int, config: Settings, store: str, queue: multiprocessing.Queue, local: bool) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    try:
        # `local`: each rank plays a node with a disk of its own.
        config = replace(config, data_cache_path=f"{config.data_cache_path}/{rank}") if local else config
        if config.data_path == ["RANK"]:  # one path that each rank resolves on a disk of its own
            os.chdir(Path(config.data_cache_path).parent / str(rank))
            config = replace(config, data_path=["set"])
        data = build(config, local_rank=0 if local else None)
        queue.put((rank, order_fingerprint(data.train), samples(data.valid)))
    except DataError as error:
        queue.put((rank, "error", str(error)))
    finally:
        dist.destroy_process_group()


def two_ranks(config: Settings, folder: Path, local: bool = False) -> list[tuple[int, str, object]]:
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (config, str(folder / "store"), queue, local)
    ranks = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    results = sorted(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(timeout=30)
        assert process.exitcode == 0
    return results


def test_two_ranks_read_what_one_built(corpus: Path, second: Path, tmp_path: Path) -> None:
    config = Settings(["3", str(corpus), "1", str(second)], data_cache_path=str(tmp_path / "cache"))
    results = two_ranks(config, tmp_path / "shared")
    alone = build(replace(config, data_cache_path=str(tmp_path / "alone")))
    expected = (order_fingerprint(alone.train), samples(alone.valid))
    assert [result[1:] for result in results] == [expected, expected]
    (folder,) = (tmp_path / "cache").iterdir()
    # 2 splits of 2 prefixes with 4 files, and a blend with 3 per split: the ranks wrote no others.
    assert len(list(folder.iterdir())) == 2 * 2 * 4 + 2 * 3
    # Rank 0 finds a ready cache on its "node", rank 1 none on its own.
    (tmp_path / "nodes").mkdir()
    shutil.copytree(tmp_path / "cache", tmp_path / "nodes" / "0")
    nodes = two_ranks(replace(config, data_cache_path=str(tmp_path / "nodes")), tmp_path / "local", local=True)
    assert [result[1:] for result in nodes] == [expected, expected]


def test_an_error_on_one_rank_ends_all(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = two_ranks(Settings([str(corpus)], data_cache_path=str(tmp_path / "file")), tmp_path / "ranks")
    assert [result[1] for result in results] == ["error", "error"]
    assert results[0][2] == results[1][2] and "index cache cannot be written" in str(results[1][2])


def test_ranks_that_disagree_do_not_start(corpus: Path, tmp_path: Path) -> None:
    prepare([write_texts(tmp_path / "texts", 60)], tmp_path / "1" / "set")
    shutil.copytree(tmp_path / "1", tmp_path / "0")
    prepare([write_texts(tmp_path / "texts", 61)], tmp_path / "1" / "set", overwrite=True)
    config = Settings(["RANK"], data_cache_path=str(tmp_path / "cache"))
    results = two_ranks(config, tmp_path / "ranks")
    assert all("rank 1 and rank 0 see different data" in str(result[2]) for result in results)
    Path(tmp_path, "1", "set.bin").unlink()
    results = two_ranks(config, tmp_path / "again")
    assert all("no such data file [rank 1, " in str(result[2]) for result in results)


def test_check_accepts_good_data(corpus: Path, second: Path) -> None:
    check_data(Settings([str(corpus)]))
    check_data(Settings(["0.5", str(corpus), "1", str(second)]))


def test_check_data_errors(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    good = Settings([str(corpus)])
    lone = copied(corpus, tmp_path / "lone")
    Path(f"{lone}.bin").unlink()
    cut = copied(corpus, tmp_path / "cut")
    with Path(f"{cut}.bin").open("r+b") as stream:
        stream.truncate(100)
    short = copied(corpus, tmp_path / "short")
    with Path(f"{short}.idx").open("r+b") as stream:
        stream.truncate(100)
    alien = copied(corpus, tmp_path / "alien")
    Path(f"{alien}.idx").write_bytes(b"something else, and long enough to be read")
    cases = [
        (
            {"data_path": [f"{corpus}s"]},
            r"corpuss\.idx: there is no such data file\. Did you mean .*/corpus\?",
        ),
        ({"data_path": [f"{corpus}.bin"]}, "without its ending"),
        ({"data_path": [str(tmp_path / "no" / "x")]}, r"zaya data prepare INPUT\.\.\. .*there is no folder"),
        ({"data_path": [str(lone)]}, r"corpus\.bin: there is no such data file"),
        ({"data_path": [str(cut)]}, r"corpus\.bin should have \d+ bytes \(found 100\)"),
        ({"data_path": [str(short)]}, r"the index should have \d+ bytes"),
        ({"data_path": [str(alien)]}, "no Megatron index"),
        ({"data_path": ["1", str(corpus), "2"]}, "do not alternate"),
        ({"split": "100,1x"}, "not one to three shares"),
        ({"split": "999,1,0"}, "the validation share of the data is shorter than one sample of 16"),
        ({"seq_length": 100_000}, r"the training share .*Shorten data\.seq_length"),
        ({"seq_length": 0}, "at least 1"),
        (
            {"tokenizer_model": str(tokenizer_folder)},
            r"another tokenizer .*Set data\.tokenizer_model to byte",
        ),
        ({"tokenizer_model": str(tmp_path / "none")}, "no such tokenizer folder"),
    ]
    for changes, message in cases:
        with pytest.raises(DataError, match=message):
            check_data(replace(good, **changes))


def test_impossible_requests(corpus: Path) -> None:
    with pytest.raises(DataError, match="leaves no validation data"):
        build(Settings([str(corpus)], split="1"))
    with pytest.raises(DataError, match="no samples are asked for"):
        build(Settings([str(corpus)]), train=0, valid=0)
