"""Expert product and dispatch against a loop over tokens in fp64: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron_zaya.model import experts as experts_module
from megatron_zaya.model.experts import GroupedExperts, grouped_product
from megatron_zaya.model.moe import ZayaMoE, build_dispatcher, mix_dispatched, mix_locally
from megatron_zaya.model.router import Routing
from megatron_zaya.model.transformer_config import zaya_transformer_config
from tests.model.small import relative_error, run_config

EXPERTS, HIDDEN, FFN, SKIP = 4, 16, 8, 4
ROUTINGS = {
    "mixed": [0, 1, 2, 3, SKIP, 1, 1, 0, 3, SKIP, 2, 2],
    "all_to_one": [2] * 12,
    "one_expert_idle": [0, 1, 3, 3, 1, 0, 0, 0, SKIP, 1, 3, 3],
    "all_skipped": [SKIP] * 12,
    "no_skip": [3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0],
    "single_token": [1],
    "single_skipped": [SKIP],
}
PATHS = ("local", "alltoall", "allgather")


def transformer_config(dtype=torch.float64, **model):
    config = zaya_transformer_config(
        run_config(num_moe_experts=EXPERTS, hidden_size=HIDDEN, moe_ffn_hidden_size=FFN, **model)
    )
    config.params_dtype = dtype
    return config


def random_experts(config, pg_collection, seed=0) -> GroupedExperts:
    experts = GroupedExperts(config, pg_collection)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return experts


def token_by_token(x_TH, class_T, prob_T, fc1, fc2):
    """The definition: prob * down(silu(gate x) * up x) of the token's expert, nothing for a skipped token."""
    rows = []
    for x, chosen, prob in zip(x_TH, class_T.tolist(), prob_T, strict=True):
        if chosen == SKIP:
            rows.append(x * 0 + prob * 0)
            continue
        gate, up = fc1[chosen][0] @ x, fc1[chosen][1] @ x
        rows.append(prob * (fc2[chosen] @ (gate * torch.sigmoid(gate) * up)))
    return torch.stack(rows)


def mix(path, x_TH, routing, experts, pg_collection):
    if path == "local":
        return mix_locally(x_TH, routing, experts)
    experts.config.moe_token_dispatcher_type = path
    dispatcher = build_dispatcher(experts.config, pg_collection)
    return mix_dispatched(x_TH.unsqueeze(1), routing, experts, dispatcher).squeeze(1)


def check(path, classes, pg_collection, seed=0, dtype=torch.float64, tolerance=1e-10):
    experts = random_experts(transformer_config(dtype), pg_collection, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = len(classes)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    prob, cotangent = torch.rand(tokens, generator=generator), torch.randn(tokens, HIDDEN, generator=generator)
    leaves = [x, prob, experts.linear_fc1.detach(), experts.linear_fc2.detach()]
    ours, reference = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    reference = [leaf.detach().double().requires_grad_() for leaf in reference]
    ours[2:] = experts.linear_fc1, experts.linear_fc2
    class_T = torch.tensor(classes)

    out = mix(path, ours[0], Routing(ours[1], class_T, EXPERTS), experts, pg_collection)
    expected = token_by_token(reference[0], class_T, reference[1], *reference[2:])
    assert out.dtype == dtype
    out.backward(cotangent.to(dtype))
    expected.backward(cotangent.double())
    pairs = {"out": (out, expected)}
    for name, a, b in zip(("x", "prob", "fc1", "fc2"), ours, reference, strict=True):
        pairs[name] = (torch.zeros_like(a) if a.grad is None else a.grad, b.grad if b.grad is not None else b * 0)
    for name, (a, b) in pairs.items():
        assert torch.isfinite(a).all(), name
        assert relative_error(a.double(), b) < tolerance, name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_the_definition(pg_collection, path, routing):
    # The probabilities are fp32, as the router gives them; so is their gradient.
    check(path, ROUTINGS[routing], pg_collection, tolerance=1e-6)


@settings(max_examples=40, deadline=None)
@given(classes=st.lists(st.integers(0, SKIP), min_size=1, max_size=24), path=st.sampled_from(PATHS))
def test_any_routing_equals_the_definition(pg_collection, classes, path):
    check(path, classes, pg_collection, seed=len(classes), tolerance=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_bf16_is_close(pg_collection, path):
    check(path, ROUTINGS["mixed"], pg_collection, dtype=torch.bfloat16, tolerance=0.03)


@pytest.mark.parametrize("counts", [[3, 0, 5, 8], [16, 0, 0, 0], [4, 4, 4, 4]], ids=str)
def test_fallback_equals_the_grouped_product(monkeypatch, counts):
    x, weight, cotangent = torch.randn(16, 16), torch.randn(4, 32, 16), torch.randn(16, 32)
    results = []
    for works in (True, False):
        monkeypatch.setattr(experts_module, "runs_grouped", lambda device, dtype, works=works: works)
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = grouped_product(*leaves, torch.tensor(counts))
        out.backward(cotangent)
        results.append([out, *(leaf.grad for leaf in leaves)])
    for grouped, fallback in zip(*results, strict=True):
        assert relative_error(fallback, grouped) < 1e-5


@pytest.mark.parametrize("mode", ["zero", "scaled_identity"])
@pytest.mark.parametrize("path", PATHS)
def test_skip_expert_modes(pg_collection, path, mode):
    """The whole mixture of a layer: a skipped token gets nothing, or its input times the probability of skipping."""
    config = transformer_config(skip_expert=mode)
    moe = ZayaMoE(config, 1, pg_collection).double().train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        moe.router.balancing_bias[-1] = 0.2
    if path != "local":
        config.moe_token_dispatcher_type = path
        moe.token_dispatcher = build_dispatcher(config, pg_collection)
    inputs = [torch.randn(9, 2, HIDDEN, generator=generator, dtype=torch.float64)] * 2
    ours, theirs = (x.clone().requires_grad_() for x in inputs)
    out, _ = moe(ours, None)
    out.square().sum().backward()
    gradients = [p.grad.clone() for p in moe.parameters()]
    moe.zero_grad()

    routing, _ = moe.router(theirs, None)
    flat = theirs.flatten(0, 1)
    fc1, fc2 = moe.experts.linear_fc1, moe.experts.linear_fc2
    expected = token_by_token(flat, routing.class_T, routing.prob_T, fc1, fc2)
    skipped = routing.class_T == SKIP
    assert 0 < skipped.sum() < len(skipped)
    if mode == "scaled_identity":
        expected = torch.where(skipped[:, None], routing.prob_T[:, None] * flat, expected)
    expected.square().sum().backward()
    assert relative_error(out.flatten(0, 1), expected) < 1e-10
    assert relative_error(ours.grad, theirs.grad) < 1e-10
    for (name, parameter), gradient in zip(moe.named_parameters(), gradients, strict=True):
        assert relative_error(gradient, parameter.grad) < 1e-9, name


def test_gradients_are_parameters_of_their_own(pg_collection):
    """An optimizer may change a gradient in place: no two share memory, and none is a view of an input."""
    experts = random_experts(transformer_config(torch.float32), pg_collection)
    x = nn.Parameter(torch.randn(12, HIDDEN))
    mix_locally(x, Routing(torch.rand(12), torch.tensor(ROUTINGS["mixed"]), EXPERTS), experts).sum().backward()
    pointers = {t.grad.untyped_storage().data_ptr() for t in (x, experts.linear_fc1, experts.linear_fc2)}
    assert len(pointers) == 3
