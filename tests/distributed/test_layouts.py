"""Every layout computes what one rank computes: logits, gathered gradients, the first steps of training (fp32).

The layouts are data (layouts.py), the ranks run measure.py. Ranks of equal number share their processes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

from megatron_zaya.data.prepare import prepare
from megatron_zaya.parallel.sequence import merge_zigzag
from tests.distributed.layouts import LAYOUTS, PACKED, SAVED, SOAK
from tests.distributed.measure import GLOBAL_BATCH, REFERENCES, STEPS, measure, resume, variant_of
from tests.ranks import run_ranks
from tests.train.conftest import run_file as make_run_file
from tests.train.conftest import text_prefix  # noqa: F401 (fixture)

TOLERANCE = 1e-5
ALL = LAYOUTS | PACKED


def assemble_shards(ranks: list[list]) -> dict[str, np.ndarray]:
    """Put the shards of all ranks together; copies of one shard must agree on every rank."""
    whole: dict[str, np.ndarray] = {}
    for shards in ranks:
        for key, shape, offset, gradient in shards:
            target = whole.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
            part = target[tuple(slice(o, o + n) for o, n in zip(offset, gradient.shape, strict=True))]
            if np.isnan(part).all():
                part[...] = gradient
            else:
                assert_close(gradient, part, f"copies of {key}")
    assert not any(np.isnan(gradient).any() for gradient in whole.values())
    return whole


def assemble_logits(ranks: list[list]) -> dict[int, np.ndarray]:
    """Put the vocabulary (tensor parallel) and the sequence (context parallel) of each sample together."""
    parts: dict[int, dict[int, dict[int, np.ndarray]]] = {}
    for shards in ranks:
        for sample, tp_rank, cp_rank, logits in shards:
            parts.setdefault(sample, {}).setdefault(cp_rank, {})[tp_rank] = logits
    whole = {}
    for sample, by_rank in parts.items():
        rows = [np.concatenate([p[r] for r in sorted(p)], axis=-1) for _, p in sorted(by_rank.items())]
        whole[sample] = merge_zigzag([torch.from_numpy(part) for part in rows], dim=0).numpy()
    return whole


def assert_close(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    scale = np.abs(theirs).max()
    error = np.abs(ours - theirs).max()
    assert error <= TOLERANCE * scale, f"{what}: {error / scale if scale else error:.2e}"


EVERY = [pytest.param(name, marks=pytest.mark.soak) if name in SOAK else name for name in ALL]


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory, text_prefix):  # noqa: F811
    """Results by layout, of those that tests were selected for: gradients, logits, curve. "one" is the reference."""
    selected = {
        item.callspec.params["layout"]
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec") and "layout" in item.callspec.params
    }
    path = make_run_file.__wrapped__(tmp_path_factory.mktemp("layouts"), text_prefix)
    tree = yaml.safe_load(path.read_text())
    tree["model"] |= dict(num_layers=2, num_attention_heads=8, num_query_groups=2, kv_channels=8)
    tree["model"] |= dict(num_moe_experts=4, vocab_size=264)
    tree["model"] |= dict(layer_types=["full", "sliding"], sliding_window=9, skip_expert_bias=0.0)
    tree["schedule"] |= dict(
        train_iters=STEPS + 2, micro_batch_size=2, global_batch_size=GLOBAL_BATCH, eval_interval=100, eval_iters=1
    )
    tree["data"] |= dict(seq_length=32)
    tree["optimizer"] = {"lr": 1e-3, "min_lr": 1e-3}
    path.write_text(yaml.safe_dump(tree))
    texts = path.parent / "texts"
    texts.mkdir()
    for i in range(200):
        (texts / f"{i:03d}.txt").write_text(f"{i * i}: " + "ab cd ef gh"[: i % 13])
    prepare([texts], path.parent / "short", workers=1)
    results = {}
    worlds = {1: {name: {} for name in REFERENCES.values()}}
    for name, (world, parallel) in ALL.items():
        if name in selected:
            worlds.setdefault(world, {})[name] = parallel
    for world, layouts in worlds.items():
        ranks = run_ranks(measure, world, path, layouts)
        for name in layouts:
            busy = sum(rank[name]["processor_seconds"] for rank in ranks)
            print(f"{name}: {ranks[0][name]['seconds']:.1f} s, {busy:.1f} s of processors")
            results[name] = {
                "gradients": assemble_shards([rank[name]["gradients"] for rank in ranks]),
                "logits": assemble_logits([rank[name]["logits"] for rank in ranks]),
                "curve": ranks[0][name]["curve"],
                "evaluation": ranks[0][name]["evaluation"],
            }
    saved = ["one", *sorted(selected & set(SAVED))]
    for name, loss in run_ranks(resume, 1, path, saved)[0].items():
        results[name]["loss after resuming on one rank"] = loss
    return results


def both(measured: dict, layout: str, what: str) -> tuple:
    """Return a result of the layout and of its reference."""
    return measured[layout][what], measured[REFERENCES[variant_of(layout, ALL[layout][1])]][what]


@pytest.mark.parametrize("layout", EVERY)
def test_logits_equal_those_of_one_rank(measured, layout):
    ours, one = both(measured, layout, "logits")
    assert set(ours) == set(one)
    for sample, logits in one.items():
        assert_close(ours[sample], logits, f"sample {sample}")


@pytest.mark.parametrize("layout", EVERY)
def test_every_gathered_gradient_equals_that_of_one_rank(measured, layout):
    ours, one = both(measured, layout, "gradients")
    assert set(ours) == set(one)
    for name, gradient in one.items():
        assert_close(ours[name], gradient, name)


@pytest.mark.parametrize("layout", EVERY)
def test_the_loss_curve_equals_those_of_one_rank(measured, layout):
    ours, one = (np.array(curve) for curve in both(measured, layout, "curve"))
    np.testing.assert_allclose(ours[:, 0], one[:, 0], rtol=TOLERANCE)
    np.testing.assert_allclose(ours[:, 1], one[:, 1], rtol=10 * TOLERANCE)
    np.testing.assert_allclose(ours[:, 2:], one[:, 2:], rtol=TOLERANCE, err_msg="skip rate, load of the busiest expert")
    (our_loss, our_tokens), (loss, tokens) = both(measured, layout, "evaluation")
    assert our_tokens == tokens and our_loss == pytest.approx(loss, rel=TOLERANCE)


@pytest.mark.parametrize("layout", SAVED)
def test_one_rank_resumes_what_a_layout_saved(measured, layout):
    ours, one = (measured[name]["loss after resuming on one rank"] for name in (layout, "one"))
    assert ours == pytest.approx(one, rel=TOLERANCE)


def test_packed_samples_hold_several_documents(measured):
    """The loss mask leaves out the last token of each document, so the evaluations count documents."""
    batches = GLOBAL_BATCH * 32
    assert measured["one"]["evaluation"][1] == batches
    assert batches - 40 < measured["one_packed"]["evaluation"][1] < batches - 4


def test_the_reference_exercises_several_experts(measured):
    gradient = measured["one"]["gradients"]["layers.1.mlp.experts.linear_fc1"]
    assert (np.abs(gradient).reshape(4, -1).max(axis=1) > 0).sum() >= 2
