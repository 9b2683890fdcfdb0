"""Plans: Megatron's names, run files with a `parallel:` section, and errors that name the line."""

from __future__ import annotations

import pytest

from topology.errors import TopologyError
from topology.plan import plan_from_text


def test_nodes_and_gpus_stand_in_for_the_world_size() -> None:
    assert plan_from_text("nodes: 16\ngpus: 8\n", 1024).world_size == 128
    assert plan_from_text("expert_model_parallel_size: 8\n", 1024).world_size == 1024


def test_a_run_file_gives_its_parallel_section_and_sizes() -> None:
    run = """
model: {num_layers: 8, hidden_size: 512, something_else: 3}
parallel:
  tensor_model_parallel_size: 2
  sequence_parallel: true
  expert_tensor_parallel_size: null
data: {seq_length: 1024}
"""
    plan = plan_from_text(run, 64)
    assert (plan.tp, plan.dp, plan.etp) == (2, 32, 2)
    assert (plan.workload.num_layers, plan.workload.seq_length) == (8, 1024)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tensor_model_parallel_sise: 2\n",
            r"p.yaml:1: unknown key .* did you mean 'tensor_model_parallel_size'",
        ),
        ("order: tp-dp\npipeline_model_parallel_size: 2\n", "does not name pp"),
        ("world_size: 10\ntensor_model_parallel_size: 4\n", "not divisible by tp"),
        ("world_size: 16\nexpert_model_parallel_size: 32\n", "not divisible by etp"),
        ("world_size: 16\nnodes: 4\n", "not nodes x gpus"),
        ("virtual_pipeline_model_parallel_size: 2\n", "needs pipeline_model_parallel_size"),
        ("context_parallel_size: 4\nhierarchical_context_parallel_sizes: [2, 4]\n", "multiply to 8"),
        ("expert_model_parallel_size: 0\n", r"p.yaml:1: .*greater than or equal to 1"),
        ("workload: {seq_len: 3}\n", r"p.yaml:1: .*did you mean 'seq_length'"),
        ("parallel: 3\n", "must be a mapping"),
        ("- 1\n", "must be a mapping"),
    ],
)
def test_bad_plans_name_line_and_remedy(text: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        plan_from_text(text, 1024, "p.yaml")
