"""Initialisation, names and stages of the whole model."""

from __future__ import annotations

import pytest
import torch

from megatron_zaya.model.init import initialise
from tests.model.small import copy_from_hf, hf_model, our_model, relative_error, run_config


def initialised(pg_collection, seed=1, **model):
    config = run_config(**model)
    ours = our_model(config, pg_collection)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(float("nan"))
    initialise(ours, ours.config, seed)
    return ours


def test_every_parameter_gets_its_value_from_the_table(pg_collection):
    ours = initialised(pg_collection, hidden_size=64, router_hidden_size=64, vocab_size=400, num_layers=2)
    values = dict(ours.named_parameters())
    assert all(torch.isfinite(p).all() for p in values.values())
    ones = ("norm.weight", "_scale", "input_scaling.scale", ".temperature")
    for name, parameter in values.items():
        if name.endswith(ones):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std() > 0, name
    layer = "layers.1."
    expected = {
        "embedding.word_embeddings.weight": 0.02,
        layer + "self_attention.linear_q": 0.02,
        layer + "self_attention.linear_proj.weight": 0.02 / 2,  # sqrt(2 * 2 layers)
        layer + "mlp.experts.linear_fc1": 0.02,
        layer + "mlp.experts.linear_fc2": 0.02 / 2,
        layer + "mlp.router.linear_1.weight": 64**-0.5,
        layer + "mlp.router.linear_down.weight": 0.02,
        # uniform in +-1/sqrt(fan in) has a standard deviation of bound / sqrt(3)
        layer + "self_attention.conv_q.depthwise_weight": (2 * 3) ** -0.5,
        layer + "self_attention.conv_q.grouped_weight": (2 * 16 * 3) ** -0.5,
    }
    for name, std in expected.items():
        assert values[name].std().item() == pytest.approx(std, rel=0.15), name


def test_initial_values_depend_on_seed_and_name_only(pg_collection):
    first, again, other = (dict(initialised(pg_collection, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.self_attention.linear_q"], other["layers.0.self_attention.linear_q"])
    assert not torch.equal(first["layers.0.self_attention.linear_q"], first["layers.1.self_attention.linear_q"])
    experts = first["layers.0.mlp.experts.linear_fc1"]
    assert not torch.equal(experts[0], experts[1])


def test_a_fresh_model_predicts_uniformly_and_no_key_is_silent(pg_collection):
    ours = initialised(pg_collection)
    tokens = torch.randint(0, 101, (4, 33))
    loss = ours(tokens[:, :-1], labels=tokens[:, 1:]).mean()
    assert loss.item() == pytest.approx(torch.log(torch.tensor(101.0)).item(), rel=0.05)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in ours.named_parameters() if "linear_k" in n)


@pytest.mark.parametrize("split", [(1, 3), (2, 2)])
def test_stages_in_a_row_are_the_whole_model(pg_collection, split):
    """What crosses a stage (residual and router state as one tensor) carries values and gradients exactly."""
    config = run_config(num_layers=4, layer_types=["full", "sliding", "sliding", "full"], sliding_window=5)
    whole = our_model(config, pg_collection).train()
    copy_from_hf(whole, hf_model(config, seed=3), config)
    first = our_model(config, pg_collection, post_process=False, num_local_layers=split[0]).train()
    last = our_model(config, pg_collection, pre_process=False, first_layer=split[0], num_local_layers=split[1]).train()
    weights = dict(whole.named_global_parameters()) | {
        name: buffer for name, buffer in whole.named_buffers() if name.endswith("balancing_bias")
    }
    for stage in (first, last):
        with torch.no_grad():
            for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
                if not name.endswith("tokens_per_class"):
                    tensor.copy_(weights[stage.global_name(name)])

    tokens = torch.randint(0, 101, (2, 20))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    payload = first(inputs)
    assert payload.shape == (19, 2, config.model.hidden_size + config.model.router_hidden_size)
    received = payload.detach().requires_grad_()
    last.set_input_tensor([received])
    loss = last(inputs, labels=labels).mean()
    loss.backward()
    payload.backward(received.grad)
    expected = whole(inputs, labels=labels).mean()
    expected.backward()
    assert loss.item() == expected.item()
    gradients: dict[str, torch.Tensor] = {}
    for stage in (first, last):  # the tied embedding has a part of its gradient on both
        for name, parameter in stage.named_global_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    assert set(gradients) == {name for name, _ in whole.named_global_parameters()}
    for name, parameter in whole.named_global_parameters():
        assert relative_error(gradients[name], parameter.grad) < 1e-6, name


def test_checkpoint_names_are_global_and_whole(pg_collection):
    config = run_config(num_layers=4)
    whole = our_model(config, pg_collection).sharded_state_dict()
    keys = {tensor.key: tensor.global_shape for tensor in whole.values()}
    assert len(keys) == len(whole)
    assert not any("extra_state" in key or "tokens_per_class" in key for key in keys)
    first = our_model(config, pg_collection, post_process=False, num_local_layers=1).sharded_state_dict()
    last = our_model(config, pg_collection, pre_process=False, first_layer=1, num_local_layers=3).sharded_state_dict()
    described = {t.key: t.global_shape for part in (first, last) for t in part.values()}
    assert described == keys
    tied = [t for part in (first, last) for t in part.values() if t.key == "embedding.word_embeddings.weight"]
    assert sorted(t.replica_id[0] for t in tied) == [0, 1], "one copy is written, the other is its replica"
