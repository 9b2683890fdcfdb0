"""Activation recompute: the same loss and gradients to the last bit, less memory, nothing counted twice."""

import pytest
import torch

from megatron_zaya.model.init import initialise
from megatron_zaya.model.recompute import RecomputePlan
from tests.model.small import our_model, run_config

PLANS = {
    "layernorm": dict(granularity="selective", modules=["layernorm"]),
    "core_attn": dict(granularity="selective", modules=["core_attn"]),
    "experts": dict(granularity="selective", modules=["experts"]),
    "moe": dict(granularity="selective", modules=["moe"]),
    "all_parts": dict(granularity="selective", modules=["layernorm", "core_attn", "experts", "moe"]),
    "full_uniform_1": dict(granularity="full", method="uniform", num_layers=1),
    "full_uniform_2": dict(granularity="full", method="uniform", num_layers=2),
    "full_block_2": dict(granularity="full", method="block", num_layers=2),
}
NOTHING = dict(granularity=None)


def build(pg_collection, plan: dict):
    fields = {f"recompute_{name}": value for name, value in plan.items()}
    config = run_config(layer_types=["full", "sliding", "full"], sliding_window=8)
    config = config.model_validate(config.model_dump() | {"parallel": fields})
    model = our_model(config, pg_collection).train()
    initialise(model, model.config, seed=7)
    return model


def run(model, between=lambda model: None):
    """Return loss, gradients, token counts."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 101, (2, 33), generator=generator)
    loss = model(tokens[:, :-1], labels=tokens[:, 1:]).mean()
    between(model)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), gradients, [layer.mlp.router.tokens_per_class for layer in model.layers]


@pytest.mark.parametrize("name", PLANS)
def test_a_recomputed_step_equals_a_kept_one_bit_for_bit(pg_collection, name):
    loss, gradients, counts = run(build(pg_collection, NOTHING))
    again_loss, again_gradients, again_counts = run(build(pg_collection, PLANS[name]))
    assert torch.equal(loss, again_loss)
    assert gradients.keys() == again_gradients.keys()
    for parameter, gradient in gradients.items():
        assert torch.equal(gradient, again_gradients[parameter]), parameter
    for count, again in zip(counts, again_counts, strict=True):
        assert torch.equal(count, again)
        assert count.sum() == 64


@pytest.mark.parametrize("name", ["moe", "full_uniform_1"])
def test_a_bias_that_moves_between_the_passes_does_not_reroute_the_second_one(pg_collection, name):
    def move_bias(model):
        for layer in model.layers:
            layer.mlp.router.balancing_bias.copy_(torch.randn(5))

    _, gradients, _ = run(build(pg_collection, NOTHING))
    _, again, counts = run(build(pg_collection, PLANS[name]), between=move_bias)
    for parameter, gradient in gradients.items():
        assert torch.equal(gradient, again[parameter]), parameter
    assert all(count.sum() == 64 for count in counts)


def bytes_kept_by_a_forward_pass(model) -> int:
    """Return what was allocated in a forward pass and is still there at its end."""
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = model(tokens, labels=tokens).mean()
    del loss
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


def test_recompute_keeps_fewer_bytes(pg_collection):
    kept = {name: bytes_kept_by_a_forward_pass(build(pg_collection, plan)) for name, plan in PLANS.items()}
    everything = bytes_kept_by_a_forward_pass(build(pg_collection, NOTHING))
    assert all(bytes_ < everything for bytes_ in kept.values()), (everything, kept)
    assert kept["full_uniform_2"] < kept["full_uniform_1"] < kept["all_parts"] < kept["core_attn"]
    assert kept["full_uniform_1"] < kept["full_block_2"]


def test_layer_groups_cover_every_layer_once():
    for method, size, expected in [("uniform", 2, [2, 2, 1]), ("uniform", 9, [5]), ("block", 2, [1, 1, 3])]:
        plan = RecomputePlan("full", method, size)
        groups = plan.layer_groups(5)
        assert [len(layers) for layers, _ in groups] == expected
        assert [layer for layers, _ in groups for layer in layers] == list(range(5))
    assert [rerun for _, rerun in RecomputePlan("full", "block", 2).layer_groups(5)] == [True, True, False]
    assert RecomputePlan().layer_groups(5) == [(range(5), False)]
