"""The compiled operations: each against plain torch in fp64, whatever the number of threads, and the model without."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from megatron_zaya.model import attention_derivatives, derivatives, fused
from tests.model.small import our_model, relative_error, run_config

SEQ, BATCH = 37, 3
TOKENS = SEQ * BATCH


@pytest.fixture(autouse=True)
def compiled():
    if fused.LIBRARY is None:
        assert not any(map(shutil.which, ("cc", "gcc"))), "a compiler is here, but fused.c was not compiled"
        pytest.skip("no compiler")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), requires_grad=True)


def heads(queries: int, keys: int, width: int, half: int, rows: int = TOKENS):
    return (
        random(rows, queries + keys, width),
        random(rows, queries + keys, width, seed=1),
        random(queries + keys, 1),
        *(function(random(rows, half).detach()) for function in (torch.cos, torch.sin)),
        queries,
    )


class Heads(torch.autograd.Function):
    """`fused.heads` as one operation."""

    @staticmethod
    def forward(ctx, convolved, plain, length, cos, sin, queries):
        out, *kept = fused.heads(convolved.transpose(0, 1).contiguous(), plain, length, cos, sin, queries)
        ctx.save_for_backward(*kept, length, cos, sin)
        ctx.queries = queries
        return out

    @staticmethod
    def backward(ctx, grad):
        grad_plain = torch.full((*grad.shape[:2], grad.shape[2]), math.nan)
        convolved, length = fused.heads_backward(grad, *ctx.saved_tensors, ctx.queries, grad_plain)
        return convolved.transpose(0, 1), grad_plain, length, None, None, None


def plain_heads(convolved, plain, length, cos, sin, queries):
    group = queries // (plain.shape[1] - queries)
    q, k = plain.split([queries, plain.shape[1] - queries], dim=1)
    q_mean = (q + k.repeat_interleave(group, dim=1)) / 2
    k_mean = q_mean.unflatten(1, (-1, group)).mean(2)
    x = torch.nn.functional.normalize(convolved + torch.cat([q_mean, k_mean], dim=1), dim=-1) * length
    half, (cos, sin) = cos.shape[1], (y.repeat_interleave(len(x) // len(y), dim=0).unsqueeze(1) for y in (cos, sin))
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def plain_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def plain_swiglu(gate_up, weight):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up * weight


def convolution(queries: int, keys: int, width: int, taps: tuple[int, int]):
    """Return the eight weights, and an input for them: the two convolutions in a row are the reference."""
    shapes = [((c, 1, taps[0]), (c,), (c, width, taps[1]), (c,)) for c in (queries * width, keys * width)]
    return [random(*shape, seed=seed) for seed, stream in enumerate(shapes) for shape in stream]


def merged(*weights):
    weight, bias = attention_derivatives.merged_convolution(*(dict(enumerate(weights[i : i + 4])) for i in (0, 4)))
    return torch.cat([weight.flatten(), bias.flatten()])


def plain_merged(*weights):
    """Return what the two convolutions answer to single ones and to nothing: their taps and their bias."""
    first, first_bias, second, second_bias = (torch.cat(pair) for pair in zip(weights[:4], weights[4:], strict=True))
    channels, width, heads = len(first), second.shape[1], len(second) // second.shape[1]
    taps = first.shape[2] + second.shape[2] - 1

    def convolve(x_BCS):
        hidden = torch.nn.functional.conv1d(x_BCS, first, first_bias, groups=channels)
        return torch.nn.functional.conv1d(hidden, second, second_bias, groups=heads)[:, :, 0]

    nothing = torch.zeros(1, channels, taps, dtype=first.dtype)
    bias = convolve(nothing)
    ones = torch.zeros(width, taps, heads, width, taps, dtype=first.dtype)
    for i in range(width):
        for tap in range(taps):
            ones[i, tap, :, i, tap] = 1
    answers = convolve(ones.view(width * taps, channels, taps)) - bias
    weight = answers.view(width, taps, heads, width).permute(1, 2, 0, 3)
    return torch.cat([weight.flatten(), bias.flatten()])


ORDER = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
KEPT = 80
WIDE = 70  # no multiple of a vector
# What is called, the reference, the arguments. Rows: fewer than a block, several blocks and a rest, one.
CASES = {
    "norm": (lambda x, w: derivatives.rms_norm(x, w, 1e-5), plain_norm, (random(SEQ, 9, WIDE), random(WIDE))),
    "norm_of_one_row": (lambda x, w: derivatives.rms_norm(x, w, 1e-5), plain_norm, (random(1, 5), random(5))),
    "scaled_sum": (
        derivatives.scaled_sum,
        lambda a, s, c, b, t, d: (a + c) * s + (b + d) * t,
        [random(*shape, seed=i) for i, shape in enumerate(2 * [(SEQ, 9, WIDE), (WIDE,), (WIDE,)])],
    ),
    "swiglu": (derivatives.weighted_swiglu, plain_swiglu, (random(301, 2 * WIDE), random(301, 1))),
    "take_rows": (
        lambda x: derivatives.take_rows(x, ORDER, ORDER.argsort(), KEPT),
        lambda x: x[ORDER[:KEPT]],
        (random(TOKENS, 9),),
    ),
    "spread_rows": (
        lambda x: derivatives.spread_rows(x, ORDER, ORDER.argsort(), KEPT),
        lambda x: torch.zeros(TOKENS, 9, dtype=x.dtype).index_copy(0, ORDER[:KEPT], x),
        (random(KEPT, 9),),
    ),
    "merged": (merged, plain_merged, convolution(4, 2, 12, (2, 2))),
    "merged_long_taps": (merged, plain_merged, convolution(3, 1, 5, (4, 3))),
    "merged_single_taps": (merged, plain_merged, convolution(1, 1, 8, (1, 1))),
    "heads": (Heads.apply, plain_heads, heads(4, 2, 24, 5)),
    "heads_in_blocks": (Heads.apply, plain_heads, heads(2, 2, 16, 8, rows=700)),
    "heads_of_one_group": (Heads.apply, plain_heads, heads(3, 1, 64, 16)),
}


def results(function, arguments, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the output and the gradients of all arguments that want one."""
    leaves = [x.detach().to(dtype).requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in arguments]
    out = function(*leaves)
    out.backward(random(*out.shape).detach().to(dtype))
    return [out.detach(), *(x.grad for x in leaves if torch.is_tensor(x) and x.requires_grad)]


@pytest.mark.parametrize("case", CASES)
def test_an_operation_and_its_gradients_equal_their_formula(case):
    function, formula, arguments = CASES[case]
    compiled = results(function, arguments, torch.float32)
    expected = results(formula, arguments, torch.float64)
    assert len(compiled) == len(expected) > 1
    for got, wanted in zip(compiled, expected, strict=True):
        assert relative_error(got.double(), wanted) < 2e-6


@pytest.mark.parametrize("case", CASES)
def test_results_do_not_depend_on_the_number_of_threads(case):
    function, _, arguments = CASES[case]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(function, arguments, torch.float32)
        torch.set_num_threads(3)
        three = results(function, arguments, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_angles_may_be_shared_by_the_sequences_of_a_batch():
    convolved, plain, length, _, _, queries = heads(2, 1, 12, 4)
    angles = random(SEQ, 4).detach()
    each = angles.repeat_interleave(BATCH, dim=0)
    shared = Heads.apply(convolved, plain, length, angles.cos(), angles.sin(), queries)
    assert torch.equal(shared, Heads.apply(convolved, plain, length, each.cos(), each.sin(), queries))


def test_swiglu_keeps_its_accuracy_over_the_whole_range():
    gate = torch.cat([torch.linspace(-86, 86, 100_001), torch.logspace(-30, 1, 1001), -torch.logspace(-30, 1, 1001)])
    rows = torch.stack([gate, torch.ones_like(gate)], dim=1)
    out = fused.swiglu(rows, torch.ones(len(rows), 1))[:, 0].double()
    assert ((out / torch.nn.functional.silu(gate.double()) - 1).abs() < 1e-6).all()
    grad = fused.swiglu_backward(torch.ones(len(rows), 1), rows, torch.ones(len(rows), 1))[0][:, 0].double()
    wide = gate.double().requires_grad_()
    torch.nn.functional.silu(wide).sum().backward()
    assert (grad - wide.grad).abs().max() < 1e-6
    far = torch.tensor([[-1e30, 1.0], [-200.0, 1.0], [1e30, 1.0]])
    assert torch.allclose(fused.swiglu(far, torch.ones(3, 1))[:, 0], torch.tensor([0.0, 0.0, 1e30]), atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("case", ["norm", "scaled_sum", "swiglu", "heads", "merged"])
def test_what_is_not_a_number_shows_in_the_output(case, bad):
    function, _, arguments = CASES[case]
    first = arguments[0].detach().clone()
    first[0, ..., 0] = bad
    assert not function(first, *arguments[1:]).isfinite().all()


def test_a_norm_of_zero_has_a_gradient():
    zero = torch.zeros(1, 3, 8, requires_grad=True)
    cos, sin = torch.ones(1, 4), torch.zeros(1, 4)
    out = Heads.apply(zero, zero.detach(), torch.ones(3, 1), cos, sin, 2)
    out.sum().backward()
    assert (out == 0).all() and zero.grad.isfinite().all()


@pytest.mark.parametrize(("length", "documents"), [(1, None), (2, None), (41, None), (41, [0, 5, 6, 41, 82])])
def test_the_model_is_the_same_without(pg_collection, monkeypatch, length, documents):
    config = run_config(num_query_groups=2, cca_time0=3)
    model = our_model(config, pg_collection, torch.float32).train()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=index) * 0.3 + (parameter.ndim == 1))
    tokens = torch.randint(0, config.model.vocab_size, (2, length), generator=torch.Generator().manual_seed(3))
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)

    def run(wide: torch.dtype) -> list[torch.Tensor]:
        twin = our_model(config, pg_collection, wide).train()
        twin.load_state_dict(model.state_dict())
        loss = twin(tokens, labels=tokens, cu_seqlens=cu_seqlens)
        loss.sum().backward()
        return [loss.detach(), *(p.grad for p in twin.parameters())]

    compiled = run(torch.float32)
    monkeypatch.setattr(fused, "LIBRARY", None)
    plain, expected = run(torch.float32), run(torch.float64)
    largest = max(wanted.abs().max().item() for wanted in expected)
    for got, same, wanted in zip(compiled, plain, expected, strict=True):
        # The queries of a sequence of one token have no gradient but rounding.
        allowed = 1e-4 * max(wanted.abs().max().item(), 1e-3 * largest)
        assert all((x.double() - wanted).abs().max() < allowed for x in (got, same))


def test_only_real_fp32_tensors_on_a_cpu_fit():
    assert fused.fits(torch.ones(2), torch.nn.Parameter(torch.ones(2)))
    assert not fused.fits(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    assert not fused.fits(torch.ones(2, device="meta"))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert not fused.fits(torch.ones(2))
