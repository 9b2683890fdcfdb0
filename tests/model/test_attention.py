"""Attention in blocks: the plan holds every visible pair once, and blocks merge to what a mask would give, forward
and backward, for documents, windows and context-parallel parts of the sequence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zaya.model import attention_kernels
from megatron_zaya.model.attention_kernels import block_backward, block_forward
from megatron_zaya.model.attention_plan import visible_pieces
from megatron_zaya.model.context_attention import attend_across
from megatron_zaya.parallel.sequence import LocalSequence, Span, local_spans
from tests.parallel.test_sequence import Group


def seen(documents, window) -> torch.Tensor:
    """Return by brute force which token sees which, [B, S, S]."""
    length = documents[0][-1]
    row, column = torch.arange(length)[:, None], torch.arange(length)
    masks = []
    for starts in documents:
        number = torch.searchsorted(torch.tensor(starts), torch.arange(length), right=True)
        mask = (number[:, None] == number) & (column <= row)
        masks.append(mask & (row - column < window) if window else mask)
    return torch.stack(masks)


def drawn(pieces, rows, columns, batch) -> torch.Tensor:
    """Return how often the pieces hold each pair, [B, rows, columns]."""
    count = torch.zeros(batch, rows, columns, dtype=torch.int64)
    for piece in pieces:
        block = torch.ones(piece.q_stop - piece.q_start, piece.k_stop - piece.k_start, dtype=torch.int64)
        if piece.shape != "full":
            assert block.shape[0] == block.shape[1]
            block = block.tril() if piece.shape == "causal" else block.triu()
        samples = slice(None) if piece.sample is None else piece.sample
        count[samples, piece.q_start : piece.q_stop, piece.k_start : piece.k_stop] += block
    return count


@st.composite
def sequences(draw):
    size, rows, batch = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 7)), draw(st.integers(1, 2))
    length = rows * (2 * size if size > 1 else 1)
    inner = st.sets(st.integers(0, length - 1), max_size=4)
    documents = draw(st.none() | st.tuples(*[inner.map(lambda s: tuple(sorted({0, length} | s)))] * batch))
    return length, batch, size, documents, draw(st.sampled_from([None, 1, 2, 3, 5, 8, 100]))


def rows_of(spans) -> torch.Tensor:
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])


@given(sequences())
@settings(max_examples=300, deadline=None)
def test_the_plan_holds_every_visible_pair_once(case):
    length, batch, size, documents, window = case
    expected = seen(documents or ((0, length),) * batch, window)
    for rank in range(size):
        queries = local_spans(length, rank, size)
        all_keys = [(Span(0, length, 0),), *(local_spans(length, other, size) for other in range(size))]
        for keys in all_keys:
            pieces = visible_pieces(queries, keys, documents, window)
            rows, columns = rows_of(queries), rows_of(keys)
            assert torch.equal(drawn(pieces, len(rows), len(columns), batch), expected[:, rows][:, :, columns].long())
            firsts = [piece.shape == "causal" for piece in pieces]
            assert firsts == sorted(firsts, reverse=True), "the diagonal comes first"


def masked_attention(q, k, v, mask_BST):
    """Softmax attention by its formula."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("sbqd,tbqd->bqst", q, k) / math.sqrt(q.shape[-1])
    prob = logits.masked_fill(~mask_BST.unsqueeze(1), -math.inf).softmax(-1)
    return torch.einsum("bqst,tbqd->sbqd", prob, v)


@pytest.mark.parametrize("kernel", ["cpu", "plain"])
@given(case=sequences(), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_documents_and_windows_equal_a_mask_forward_and_backward(kernel, case, seed):
    length, batch, _, documents, window = case
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, batch, heads, 8) for heads in (4, 2, 2, 4)]
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    sequence = LocalSequence(length, Group(0, 1), documents or ((0, length),) * batch)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = masked_attention(*inputs, seen(sequence.documents, window))
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_kernels, "_kernel_of", lambda q: kernel)
        patch.setattr(attention_kernels, "ROWS_AT_ONCE", 3)
        ours = attend_across(*inputs, sequence, window, "all_gather")
        grads = torch.autograd.grad(ours, inputs, grad)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for gradient, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_and_plain_kernels_agree(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, h, 40, 16, generator=generator).to(dtype) for h in (4, 2, 2, 4))
    results = []
    for kernel in ("cpu", "plain"):
        monkeypatch.setattr(attention_kernels, "_kernel_of", lambda q, kernel=kernel: kernel)
        out, log_sum = block_forward(q, k, v, causal=True)
        results.append((out, log_sum, *block_backward(grad, q, k, v, out, log_sum, causal=True)))
    for fused, plain in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(fused.float(), plain.float(), rtol=tolerance, atol=tolerance)


def test_a_long_sequence_allocates_no_square():
    """131,072 tokens in documents or with a window: a square of them would have 64 GiB."""
    length = 131_072
    q, k, v = (torch.randn(length, 1, 1, 8, requires_grad=True) for _ in range(3))
    documents = LocalSequence(length, Group(0, 1), (tuple(range(0, length + 1, 512)),))
    attend_across(q, k, v, documents, None, "all_gather").sum().backward()
    assert torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all()
    with torch.no_grad():
        whole = LocalSequence(length, Group(0, 1), ((0, length),))
        assert torch.isfinite(attend_across(q, k, v, whole, 512, "all_gather")).all()
