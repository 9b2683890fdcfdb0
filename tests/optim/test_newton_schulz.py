"""The maths of Muon on one rank: against torch's own Muon, a plain fp64 reference, and the singular values."""

from __future__ import annotations

import pytest
import torch

from megatron_zaya.optim.muon import MuonAdamW
from megatron_zaya.optim.newton_schulz import A, B, C, orthogonalize, update_scale

SHAPES = [(48, 48), (32, 80), (80, 32), (1, 17), (17, 1)]


def reference(gradient: torch.Tensor, steps: int) -> torch.Tensor:
    """The iteration as it is published, in fp64."""
    x = gradient.double() / gradient.double().norm()
    for _ in range(steps):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_it_is_the_published_iteration(shape, steps):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = gradient.clone()
    ours = orthogonalize(gradient, steps, torch.float32)
    torch.testing.assert_close(ours.double(), reference(gradient, steps), rtol=1e-4, atol=1e-5)
    assert torch.equal(gradient, before)


def test_five_steps_bring_singular_values_near_one():
    gradient = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(gradient, 5, torch.float32))
    assert values.min() > 0.65 and values.max() < 1.25
    root_mean_square = orthogonalize(gradient).float().square().mean().sqrt() * update_scale(64, 96)
    assert 0.15 < root_mean_square < 0.25, "AdamW's typical update has a root mean square of 0.2"


def test_a_gradient_of_zero_stays_zero():
    assert not orthogonalize(torch.zeros(8, 12)).any()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_steps_are_those_of_torch_muon(shape, nesterov):
    """bf16 iteration on both sides; torch scales the momentum by 1 - mu, which the iteration divides out."""
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(shape, generator=generator)
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    reference_muon = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    group = dict(params=[ours], algorithm="muon", momentum=0.9, nesterov=nesterov)
    muon = MuonAdamW([group], lr=0.02, weight_decay=0.1)
    muon.allocate()
    muon.update_scales = {ours: update_scale(*shape)}

    def whole(directions):
        for direction in directions.values():
            direction.copy_(orthogonalize(direction))

    muon.orthogonalize = whole
    for _ in range(8):
        gradient = torch.randn(shape, generator=generator)
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        reference_muon.step()
        muon.step()
    moved = (theirs.data - start).abs().max()
    assert moved > 0.05
    assert (ours.data - theirs.data).abs().max() < 0.01 * moved


def test_adamw_groups_are_torch_adamw_bit_for_bit():
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(30, generator=generator)
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    muon = MuonAdamW([dict(params=[ours], algorithm="adamw")], lr=0.01, weight_decay=0.1)
    muon.allocate()
    for _ in range(5):
        theirs.grad = ours.grad = torch.randn(30, generator=generator)
        adamw.step()
        muon.step()
    assert torch.equal(theirs, ours)
    assert muon.steps_done == 5
