"""The head's loss in blocks equals torch's cross-entropy of the whole logits, forward and backward, on any ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_zaya.model.loss import head_loss
from tests.ranks import run_ranks

TOKENS, HIDDEN, VOCABULARY = (7, 3), 16, 50


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(*TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCABULARY, TOKENS, generator=generator)
    upstream = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    upstream[2, 1] = 0.0  # a masked token
    return x.requires_grad_(), weight.requires_grad_(), labels, upstream


def whole(dtype=torch.float64):
    x, weight, labels, upstream = problem(dtype)
    logits = (x @ weight.T).flatten(0, 1)
    loss = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), labels.flatten(), reduction="none")
    (loss * upstream.flatten()).sum().backward()
    return loss.view(TOKENS).detach(), x.grad, weight.grad


@pytest.mark.parametrize("columns", [1, 7, 16, 49, 50, 1000])
def test_blocks_equal_the_whole(pg_collection, columns):
    x, weight, labels, upstream = problem()
    workspace = columns * 8 * labels.numel()
    loss = head_loss(x, weight, labels, workspace, pg_collection.tp)
    (loss * upstream).sum().backward()
    for ours, theirs in zip((loss.detach(), x.grad, weight.grad), whole(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("columns", [9, 1000])
def test_fp32_equals_to_a_millionth(pg_collection, columns):
    x, weight, labels, upstream = problem(torch.float32)
    loss = head_loss(x, weight, labels, columns * 4 * labels.numel(), pg_collection.tp)
    (loss * upstream).sum().backward()
    for ours, theirs in zip((loss.detach(), x.grad, weight.grad), whole(torch.float32), strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_extreme_logits_stay_finite(pg_collection):
    x = torch.tensor([[[300.0]], [[-300.0]]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = head_loss(x, weight, torch.tensor([[0], [1]]), 8, pg_collection.tp)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(2, 1)) and torch.isfinite(x.grad).all()


def on_two_ranks(sequence_parallel: bool) -> list:
    """Run on each rank: loss and gradients of its shard of the vocabulary (and of the sequence)."""
    import datetime

    import torch.distributed as dist

    from megatron_zaya.compat import cpu

    cpu.install()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    group, rank = dist.group.WORLD, dist.get_rank()
    x, weight, labels, upstream = problem()
    x, labels, upstream = x[:6].detach(), labels[:6], upstream[:6]
    local = (x[rank * 3 : rank * 3 + 3] if sequence_parallel else x).requires_grad_()
    shard = weight[rank * 25 : rank * 25 + 25].detach().requires_grad_()
    loss = head_loss(local, shard, labels, 11 * 8 * labels.numel(), group, sequence_parallel)
    (loss * upstream).sum().backward()
    dist.destroy_process_group()
    return [loss.detach(), local.grad, shard.grad]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_split_vocabulary_equals_the_whole(sequence_parallel):
    x, weight, labels, upstream = problem()
    x, labels, upstream = x[:6].detach().requires_grad_(), labels[:6], upstream[:6]
    loss = F.cross_entropy((x @ weight.T).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    (loss * upstream).sum().backward()
    ranks = run_ranks(on_two_ranks, 2, sequence_parallel)
    for rank, (ours, x_grad, weight_grad) in enumerate(ranks):
        torch.testing.assert_close(ours, loss.detach())
        expected = x.grad[rank * 3 : rank * 3 + 3] if sequence_parallel else x.grad
        torch.testing.assert_close(x_grad, expected)
        torch.testing.assert_close(weight_grad, weight.grad[rank * 25 : rank * 25 + 25])
