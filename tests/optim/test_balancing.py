"""Bias-only balancing: Adam's formula, targets, and that it balances a skewed router without touching a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_zaya.optim.balancing import BiasBalancer
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
        balancer.step(counts, step)
        reference.grad = (counts / counts.sum(dim=1, keepdim=True)).float() - target
        adam.step()
    torch.testing.assert_close(torch.stack([r.balancing_bias for r in routers]), reference.data, rtol=1e-4, atol=1e-6)


def test_a_rate_of_zero_freezes_the_biases(routers):
    before = [r.balancing_bias.clone() for r in routers]
    BiasBalancer(dict(enumerate(routers)), 0.0, None).step(torch.ones(2, 8), 1)
    assert all(torch.equal(a, r.balancing_bias) for a, r in zip(before, routers, strict=True))


def test_a_skewed_router_is_brought_to_even_load(routers):
    """Normalised load entropy above 0.98 on a stream whose probabilities favour two experts."""
    balancer = BiasBalancer({0: routers[0]}, update_rate=5e-3, skip_target=None)
    generator = torch.Generator().manual_seed(3)
    skew = torch.tensor([3.0, 2.0, 0, 0, 0, 0, -1.0, 0])

    def load() -> torch.Tensor:
        probs = torch.softmax(skew + torch.randn(4096, 8, generator=generator), dim=-1)
        return torch.bincount((probs + routers[0].balancing_bias).argmax(dim=-1), minlength=8).double()

    def entropy(counts: torch.Tensor) -> float:
        share = counts / counts.sum()
        return -(share * share.clamp_min(1e-12).log()).sum().item() / math.log(len(share))

    assert entropy(load()) < 0.7
    for step in range(1, 801):
        balancer.step(load()[None], step)
    assert entropy(sum(load() for _ in range(8))) > 0.98


def test_the_state_returns_from_a_checkpoint(routers, pg_collection):
    balancer = BiasBalancer(dict(zip((4, 5), routers, strict=True)), 0.01, None)
    balancer.step(torch.randint(1, 50, (2, 8)).double(), 1)
    described = balancer.sharded_state_dict(pg_collection)
    assert {t.key for t in described.values()} == {
        f"balancing.{m}.{layer}" for m in ("exp_avg", "exp_avg_sq") for layer in (4, 5)
    }
    other = BiasBalancer(dict(zip((4, 5), routers, strict=True)), 0.01, None)
    other.load_state_dict({name: tensor.data.clone() for name, tensor in described.items()})
    assert torch.equal(other.exp_avg_LN, balancer.exp_avg_LN)
    assert torch.equal(other.exp_avg_sq_LN, balancer.exp_avg_sq_LN)
