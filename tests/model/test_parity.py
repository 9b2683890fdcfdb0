"""Our model against transformers' ZayaForCausalLM: logits, loss and the gradient of every parameter."""

from __future__ import annotations

import pytest
import torch

from megatron_zaya.convert.in_memory import from_hf, to_hf
from tests.model.small import copy_from_hf, hf_model, our_model, relative_error, run_config

TOLERANCE = 1e-5
# In fp32 a gradient that is a sum of cancelling terms (a temperature) carries more rounding than that, on both sides.
GRADIENT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}

CASES = {
    "base": {},
    "one_kv_head": dict(num_query_groups=1, num_attention_heads=3),
    "no_grouping": dict(num_attention_heads=2, num_query_groups=2, kv_channels=24, rotary_percent=0.25),
    "four_kv_heads": dict(num_attention_heads=8, num_query_groups=4, kv_channels=8, hidden_size=40),
    "full_rope_long_taps": dict(rotary_percent=1.0, cca_time0=4, cca_time1=3),
    "single_taps": dict(cca_time0=1, cca_time1=1),
    "many_experts": dict(num_moe_experts=11, moe_ffn_hidden_size=16, router_hidden_size=33, num_layers=5),
    "one_expert": dict(num_moe_experts=1, num_layers=1),
    "sliding": dict(
        layer_types=["full", "sliding", "full", "sliding"], num_layers=4, sliding_window=7, sliding_rotary_base=500.0
    ),
    "untied": dict(share_embeddings_and_output_weights=False),
}


def both(pg_collection, case: str, dtype: torch.dtype, seed: int):
    config = run_config(**CASES[case])
    theirs = hf_model(config, dtype, seed)
    ours = our_model(config, pg_collection, dtype).train()
    copy_from_hf(ours, theirs, config)
    return config, ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_transformers(pg_collection, case, dtype):
    seed = sorted(CASES).index(case) + 20
    config, ours, theirs = both(pg_collection, case, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    batch, seq = (3, 29) if seed % 2 else (2, 41)
    tokens = torch.randint(0, config.model.vocab_size, (batch, seq + 1), generator=generator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]

    their_logits = theirs(inputs, use_cache=False).logits
    their_loss = torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), labels.flatten())
    their_loss.backward()
    our_logits = ours(inputs)
    our_loss = ours(inputs, labels=labels).mean()
    our_loss.backward()

    skipped = sum(layer.mlp.router.tokens_per_class[-1].item() for layer in ours.layers)
    routed = sum(layer.mlp.router.tokens_per_class.sum().item() for layer in ours.layers)
    assert 0 < skipped < routed, "the case must exercise both the experts and the skip class"

    assert relative_error(our_logits, their_logits) < TOLERANCE
    assert abs(our_loss.item() / their_loss.item() - 1) < TOLERANCE
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    gradients |= {n: b for n, b in theirs.named_buffers() if n.endswith("balancing_biases")}
    expected = from_hf(gradients, config.model)
    errors = {n: relative_error(p.grad, expected[n]) for n, p in ours.named_global_parameters()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < GRADIENT_TOLERANCE[dtype], f"{worst}: {errors[worst]:.2e}"


def test_conversion_table_is_exact_in_both_directions(pg_collection):
    config = run_config(**CASES["sliding"])
    theirs = hf_model(config).state_dict()
    theirs.pop("lm_head.weight")
    back = to_hf(from_hf(theirs, config.model), config.model)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


def test_a_later_token_never_changes_an_earlier_logit(pg_collection):
    config = run_config(**CASES["sliding"])
    ours = our_model(config, pg_collection)
    copy_from_hf(ours, hf_model(config, seed=5), config)
    tokens = torch.randint(0, 100, (1, 24))
    changed = tokens.clone()
    changed[0, 15:] = (changed[0, 15:] + 1) % 100
    with torch.no_grad():
        before, after = ours(tokens), ours(changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15], after[:, 15])
