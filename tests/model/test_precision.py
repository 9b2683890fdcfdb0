"""bf16 with fp32 islands: each does something, all together come closest to fp32."""

import pytest
import torch

from megatron_zaya.config import RunConfig
from megatron_zaya.model.init import initialise
from tests.model.small import our_model, run_config

ISLANDS = ["residual", "norm", "qk_norm", "router", "loss"]


def run(pg_collection, precision: str, islands: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of every token, and all gradients in one row."""
    tree = run_config(num_layers=6).model_dump() | {"run": {"precision": precision, "fp32_islands": islands}}
    config = RunConfig.model_validate(tree)
    model = our_model(config, pg_collection, torch.bfloat16 if precision == "bf16" else torch.float32)
    initialise(model, model.config, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter  # far enough from zero for rounding to show
    tokens = torch.randint(0, 101, (4, 32), generator=torch.Generator().manual_seed(1))
    loss = model(tokens, labels=tokens.roll(-1, 1))
    loss.mean().backward()
    assert loss.dtype == torch.float32
    gradient = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    assert torch.isfinite(gradient).all()
    return loss.detach(), gradient


@pytest.fixture(scope="module")
def with_all(pg_collection):
    return run(pg_collection, "bf16", ISLANDS)


@pytest.mark.parametrize("island", ISLANDS)
def test_each_island_changes_the_result(pg_collection, with_all, island):
    loss, gradient = run(pg_collection, "bf16", [name for name in ISLANDS if name != island])
    assert not (torch.equal(loss, with_all[0]) and torch.equal(gradient, with_all[1]))
    assert (loss - with_all[0]).abs().max() < 0.5


def test_all_islands_are_closer_to_fp32_than_none(pg_collection, with_all):
    exact, _ = run(pg_collection, "fp32", ISLANDS)
    none, _ = run(pg_collection, "bf16", [])
    assert (with_all[0] - exact).abs().mean() < 0.8 * (none - exact).abs().mean()


def test_islands_do_nothing_to_an_fp32_run(pg_collection):
    (loss, gradient), (again, gradient_again) = (run(pg_collection, "fp32", islands) for islands in (ISLANDS, []))
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)
