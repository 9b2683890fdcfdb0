"""Which layouts are legal: held against the rank groups that Megatron-Core itself makes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from megatron_zaya.config import ConfigError, RunConfig
from megatron_zaya.plan.layout import check_layout, layout_problems, nearest_layouts, pipeline_stages

SIZES = st.sampled_from([1, 2, 3, 4, 8, 16])


def run_config(world: int, layers: int = 8, **parallel) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": dict(
                num_layers=layers,
                hidden_size=64,
                num_attention_heads=8,
                num_query_groups=2,
                kv_channels=16,
                num_moe_experts=16,
                moe_ffn_hidden_size=32,
                vocab_size=512,
            ),
            "parallel": parallel,
            "schedule": dict(global_batch_size=world * 8, micro_batch_size=1),
            "data": dict(seq_length=256),
        }
    )


@st.composite
def layouts(draw):
    world = draw(st.sampled_from([1, 2, 4, 6, 8, 16, 24, 64, 128]))
    tp = draw(SIZES)
    parallel = dict(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        context_parallel_size=draw(SIZES),
        pipeline_model_parallel_size=draw(SIZES),
        expert_model_parallel_size=draw(SIZES),
        expert_tensor_parallel_size=draw(st.sampled_from([1, tp])),
    )
    return world, draw(st.sampled_from([2, 4, 8])), run_config(world, **parallel)


def rank_groups(config: RunConfig, world: int) -> dict[str, list[list[int]]]:
    """Return the groups of Megatron-Core's default rank order."""
    p = config.parallel
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    etp, ep = p.expert_tensor_parallel_size, p.expert_model_parallel_size
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tp, ep=1, dp=world // (tp * pp * cp), pp=pp, cp=cp, order=order)
    expert = RankGenerator(tp=etp, ep=ep, dp=world // (etp * ep * pp), pp=pp, cp=1, order=order)
    return {
        "tp": dense.get_ranks("tp"),
        "tp_cp": dense.get_ranks("tp-cp"),
        "etp": expert.get_ranks("tp"),
        "etp_ep": expert.get_ranks("tp-ep"),
    }


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_groups_of_a_legal_layout_cover_the_world_and_respect_the_nodes(case):
    world, per_node, config = case
    if layout_problems(config, world, per_node):
        return
    for kind, groups in rank_groups(config, world).items():
        assert sorted(rank for group in groups for rank in group) == list(range(world)), kind
        for group in groups:
            ranks_of_node = {node: sum(rank // per_node == node for rank in group) for node in range(world)}
            touched = {node: count for node, count in ranks_of_node.items() if count}
            if kind in ("tp", "etp"):
                assert len(touched) == 1, (kind, group)
            assert len(touched) == 1 or set(touched.values()) == {per_node}, (kind, group)


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_a_refusal_names_legal_neighbours(case):
    world, per_node, config = case
    nearest = nearest_layouts(config, world, per_node)
    for changes in nearest:
        changed = config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})
        assert layout_problems(changed, world, per_node) == []
    if layout_problems(config, world, per_node):
        assert nearest, "this model and batch always fit somehow: every rank alone"
        assert {} not in nearest
        with pytest.raises(ConfigError, match="nearest layouts that can"):
            check_layout(config, world, per_node)
    else:
        assert nearest[0] == {}
        check_layout(config, world, per_node)


@given(st.integers(1, 24), st.sampled_from([1, 2, 3, 4]), st.sampled_from([None, 2, 3]))
@settings(max_examples=100, deadline=None)
def test_stages_hold_every_layer_once_and_in_order(layers, pp, virtual):
    config = run_config(
        pp, layers=layers, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=virtual
    )
    if layout_problems(config, pp):
        return
    stages = pipeline_stages(config)
    held = [layer for stage in stages for layer in range(stage.first_layer, stage.first_layer + stage.num_layers)]
    assert held == list(range(layers))
    assert max(stage.num_layers for stage in stages) - min(stage.num_layers for stage in stages) <= 1


@pytest.mark.parametrize(
    ("world", "per_node", "parallel", "reason"),
    [
        (8, 8, {"tensor_model_parallel_size": 3, "sequence_parallel": True}, "num_attention_heads=8 is not divided"),
        (16, 4, {"tensor_model_parallel_size": 8, "sequence_parallel": True}, "must stay inside one"),
        (24, 8, {"expert_model_parallel_size": 3}, "num_moe_experts=16 is not divided"),
        (16, 8, {"pipeline_model_parallel_size": 16}, "16 pipeline stages for model.num_layers=8"),
        (4, 8, {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": [2, 2, 2]}, "must be 4 stages"),
        (2, 8, {"tensor_model_parallel_size": 2}, "sequence_parallel must be true"),
    ],
)
def test_each_refusal_says_why(world, per_node, parallel, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        check_layout(run_config(world, **parallel), world, per_node)
    assert "nearest layouts that can" in str(refused.value)


def test_groups_that_straddle_nodes_are_refused():
    config = run_config(24, expert_model_parallel_size=4)
    assert layout_problems(config, 24, ranks_per_node=8) == []
    assert "cross rails" in layout_problems(config, 24, ranks_per_node=6)[0]
