"""Bias-only balancing: Adam's formula, targets, and that it balances a skewed router without touching a gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_zaya.optim.balancing import BiasBalancer, load_report
from tests.model.small import our_model, run_config


@pytest.fixture
def routers(pg_collection):
    model = our_model(run_config(num_moe_experts=7, num_layers=2), pg_collection)
    return [layer.mlp.router for layer in model.layers]


def test_steps_are_those_of_torch_adam(routers):
    balancer = BiasBalancer(dict(enumerate(routers)), update_rate=0.01, skip_target=0.1)
    reference = torch.nn.Parameter(torch.stack([r.balancing_bias.clone() for r in routers]))
    adam = torch.optim.AdamW([reference], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    target = torch.tensor([0.9 / 7] * 7 + [0.1])
    for step in range(1, 30):
        counts = torch.randint(0, 50, (2, 8)).double()
        balancer.step(counts[None], step - 1)
        reference.grad = (counts / counts.sum(dim=1, keepdim=True)).float() - target
        adam.step()
    torch.testing.assert_close(torch.stack([r.balancing_bias for r in routers]), reference.data, rtol=1e-4, atol=1e-6)


def test_a_rate_of_zero_freezes_the_biases(routers):
    before = [r.balancing_bias.clone() for r in routers]
    BiasBalancer(dict(enumerate(routers)), 0.0, None).step(torch.ones(1, 2, 8), 0)
    assert all(torch.equal(a, r.balancing_bias) for a, r in zip(before, routers, strict=True))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(skew=st.lists(st.floats(-2, 3), min_size=8, max_size=8), seed=st.integers(0, 1000))
def test_any_skewed_router_is_brought_to_even_load(routers, skew, seed):
    """Normalised load entropy above 0.98 on a synthetic stream, whatever classes its probabilities favour."""
    routers[0].balancing_bias.zero_()
    balancer = BiasBalancer({0: routers[0]}, update_rate=5e-3, skip_target=None)
    generator = torch.Generator().manual_seed(seed)

    def load() -> torch.Tensor:
        probs = torch.softmax(torch.tensor(skew) + torch.randn(2048, 8, generator=generator), dim=-1)
        return torch.bincount((probs + routers[0].balancing_bias).argmax(dim=-1), minlength=8).double()

    def entropy(counts: torch.Tensor) -> float:
        share = counts / counts.sum()
        return -(share * share.clamp_min(1e-12).log()).sum().item() / math.log(len(share))

    for step in range(600):
        balancer.step(load()[None, None], step)
    assert entropy(sum(load() for _ in range(8))) > 0.98


def test_micro_batches_are_updates_of_their_own(routers):
    """Several counts in one call are the same updates as one call each."""
    counts = torch.randint(1, 50, (3, 2, 8), generator=torch.Generator().manual_seed(8)).double()
    together = BiasBalancer(dict(enumerate(routers)), 0.01, None)
    before = [router.balancing_bias.clone() for router in routers]
    assert together.step(counts, 4) == 7
    after = [router.balancing_bias.clone() for router in routers]
    for router, bias in zip(routers, before, strict=True):
        router.balancing_bias.copy_(bias)
    one_by_one, done = BiasBalancer(dict(enumerate(routers)), 0.01, None), 4
    for micro_batch in counts:
        done = one_by_one.step(micro_batch[None], done)
    assert all(torch.equal(router.balancing_bias, bias) for router, bias in zip(routers, after, strict=True))


def test_the_state_is_described_by_global_layer(routers, pg_collection):
    balancer = BiasBalancer(dict(zip((4, 5), routers, strict=True)), 0.01, None)
    described = balancer.sharded_state_dict(pg_collection)
    assert {t.key for t in described.values()} == {
        f"balancing.{m}.{layer}" for m in ("exp_avg", "exp_avg_sq") for layer in (4, 5)
    }


def test_the_report_of_even_and_uneven_load():
    even, one_expert = [10.0] * 4 + [8.0], [40.0, 0, 0, 0, 8.0]
    report = load_report(np.array([even, one_expert]))
    assert report.expert_loads == [[1.0] * 4, [4.0, 0.0, 0.0, 0.0]]
    assert report.skip_rate == pytest.approx([8 / 48] * 2)
    assert (report.max_expert_load, report.load_violation) == (4.0, [0.0, 3.0])
    assert report.load_entropy == pytest.approx([1.0, 0.0], abs=1e-12)
    assert report.dead_experts == [0, 3]
