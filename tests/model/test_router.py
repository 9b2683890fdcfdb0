"""The router against a loop over tokens in fp64: choice, mixing weight, state, gradients, buffers."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_zaya.model.router import ZayaRouter
from megatron_zaya.model.transformer_config import zaya_transformer_config
from tests.model.small import relative_error, run_config

EXPERTS, HIDDEN, WIDTH = 4, 12, 6


def build(layer_number: int, dtype=torch.float64, seed: int = 0) -> ZayaRouter:
    config = zaya_transformer_config(
        run_config(num_moe_experts=EXPERTS, hidden_size=HIDDEN, router_hidden_size=WIDTH, num_attention_heads=2)
    )
    config.params_dtype = dtype
    router = ZayaRouter(config, layer_number).train()
    generator = torch.Generator().manual_seed(seed + layer_number)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        router.balancing_bias.copy_(torch.randn(EXPERTS + 1, generator=generator) * 0.3)
    return router


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def token_by_token(router: ZayaRouter, x_TH, previous_TR):
    """Equations 1 to 5 for one token at a time: (probability of the chosen class, chosen class, state)."""
    p = {name: parameter.double() for name, parameter in router.named_parameters()}
    probs, classes, states = [], [], []
    for index, x in enumerate(x_TH):
        state = p["linear_down.weight"] @ x + p["linear_down.bias"]
        if previous_TR is not None:
            state = state + previous_TR[index] * p["previous_scale"]
        normed = state / torch.sqrt((state * state).mean() + router.config.layernorm_epsilon) * p["norm.weight"]
        hidden = gelu(p["linear_1.weight"] @ normed + p["linear_1.bias"])
        logits = p["linear_out.weight"] @ gelu(p["linear_2.weight"] @ hidden + p["linear_2.bias"])
        exponentials = torch.exp(logits - logits.max())
        distribution = exponentials / exponentials.sum()
        chosen = int((distribution.detach() + router.balancing_bias.double()).argmax())
        probs.append(distribution[chosen])
        classes.append(chosen)
        states.append(state)
    return torch.stack(probs), torch.tensor(classes), torch.stack(states)


def tokens(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 50)
    return torch.randn(7, 3, HIDDEN, generator=generator, dtype=torch.float64)


def test_two_layers_equal_the_definition_with_every_gradient():
    """The second router reads the first one's state before its norm, and the gradient goes back through it."""
    first, second = build(1), build(2)
    ours, theirs = (tokens().requires_grad_() for _ in range(2))
    assert not hasattr(first, "previous_scale")

    def run_ours():
        routing_1, state_1 = first(ours, None)
        routing_2, state_2 = second(ours, state_1)
        states = (state_1.flatten(0, 1), state_2.flatten(0, 1))
        return (routing_1.prob_T, routing_2.prob_T), (routing_1.class_T, routing_2.class_T), states

    def run_reference():
        flat = theirs.flatten(0, 1)
        prob_1, class_1, state_1 = token_by_token(first, flat, None)
        prob_2, class_2, state_2 = token_by_token(second, flat, state_1)
        return (prob_1, prob_2), (class_1, class_2), (state_1, state_2)

    gradients, results = [], []
    for run, leaf in ((run_ours, ours), (run_reference, theirs)):
        probs, classes, states = run()
        results.append((probs, classes, states))
        # The second layer's choice alone: what reaches linear_down of the first has gone through the state.
        probs[1].log().sum().backward(retain_graph=True)
        through_state = first.linear_down.weight.grad.clone()
        assert first.linear_1.weight.grad is None, "the state is handed on before the norm and the MLP"
        (probs[0].log().sum() + states[1].square().sum()).backward()
        named = {f"{n}.{name}": p.grad for n, r in ((1, first), (2, second)) for name, p in r.named_parameters()}
        gradients.append(named | {"x": leaf.grad, "through_state": through_state})
        first.zero_grad()
        second.zero_grad()
    for index in (0, 1):
        assert relative_error(results[0][0][index], results[1][0][index]) < 1e-10
        assert torch.equal(results[0][1][index], results[1][1][index])
        assert relative_error(results[0][2][index], results[1][2][index]) < 1e-10
    for name, gradient in gradients[0].items():
        assert relative_error(gradient, gradients[1][name]) < 1e-9, name
    assert gradients[0]["through_state"].abs().max() > 0


def test_the_bias_changes_the_choice_and_never_the_mixing_weight():
    router = build(1)
    with torch.no_grad():
        router.balancing_bias.zero_()
        plain, _ = router(tokens(), None)
        router.balancing_bias[2] = 10.0
        biased, _ = router(tokens(), None)
    assert (plain.class_T != 2).any()
    assert (biased.class_T == 2).all()
    assert (biased.prob_T <= plain.prob_T + 1e-12).all(), "the unbiased probability of a class that is not the largest"
    same = plain.class_T == 2
    assert torch.equal(biased.prob_T[same], plain.prob_T[same])


def test_a_later_layer_insists_on_the_previous_state():
    with pytest.raises(AssertionError, match="router state"):
        build(2)(tokens(), None)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_buffers_stay_fp32(cast):
    router = build(1, torch.float32)
    before = router.balancing_bias.clone()
    getattr(router, cast)()
    assert router.linear_1.weight.dtype != torch.float32
    assert router.balancing_bias.dtype == router.tokens_per_class.dtype == torch.float32
    assert torch.equal(router.balancing_bias, before)


def test_counts_only_while_training_with_gradients():
    router = build(1)
    routing, _ = router(tokens(), None)
    expected = torch.bincount(routing.class_T, minlength=EXPERTS + 1).float()
    assert torch.equal(router.tokens_per_class, expected)
    router(tokens(), None)
    assert torch.equal(router.tokens_per_class, 2 * expected)
    with torch.no_grad():
        router(tokens(), None)
    router.eval()(tokens(), None)
    assert torch.equal(router.tokens_per_class, 2 * expected)


def test_dispatch_maps_leave_the_rows_of_skipped_tokens_empty():
    router = build(1)
    with torch.no_grad():
        router.balancing_bias[-1] = 0.3
    routing, _ = router(tokens(), None)
    probs_TE, map_TE = routing.dispatch_maps()
    assert 0 < routing.skipped_T.sum() < len(routing.skipped_T)
    for token, chosen in enumerate(routing.class_T.tolist()):
        expected = [expert == chosen for expert in range(EXPERTS)]
        assert map_TE[token].tolist() == expected
        assert probs_TE[token].tolist() == [routing.prob_T[token].item() if hit else 0.0 for hit in expected]


def test_bf16_is_close_to_fp64():
    wide, narrow = build(1), build(1, torch.bfloat16)
    with torch.no_grad():
        for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
            a.copy_(b)
    x = tokens().bfloat16()
    with torch.no_grad():
        routing, state = narrow(x, None)
        expected, expected_state = wide(x.double(), None)
    assert state.dtype == torch.bfloat16
    assert routing.prob_T.dtype == torch.float32
    assert torch.isfinite(routing.prob_T).all()
    assert relative_error(state.double(), expected_state) < 0.02
    same = routing.class_T == expected.class_T
    assert same.float().mean() > 0.8
    assert (routing.prob_T - expected.prob_T)[same].abs().max() < 0.1


def test_forced_choices_keep_the_router_gradients_right(pg_collection):
    """Against central differences in fp64, with choices that are nobody's own and that include skips."""
    from megatron_zaya.model.init import initialise
    from tests.model.small import our_model

    config = run_config()
    config.run.fp32_islands = []  # their rounding would drown a difference of two losses
    model = our_model(config, pg_collection, torch.float64).train()
    initialise(model, model.config, seed=5)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # a start is too small: slopes must stand out
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 101, (2, 18), generator=generator)
    forced = torch.randint(0, 5, (3, 34), generator=generator)
    for layer, choices in zip(model.layers, forced, strict=True):
        layer.mlp.router.chosen = lambda class_T, choices=choices: choices

    def loss() -> torch.Tensor:
        return model(tokens[:, :-1], labels=tokens[:, 1:]).double().mean()

    loss().backward()
    for name, parameter in model.layers[1].mlp.router.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        expected = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-4 * direction
                expected.append(loss().item())
                parameter -= sign * 1e-4 * direction
        slope = (expected[0] - expected[1]) / 2e-4
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=2e-3, abs=1e-9), name
