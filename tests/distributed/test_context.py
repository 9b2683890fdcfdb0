"""Context parallelism with products in fp64 equals one rank: odd sizes, other tap counts, windows, documents."""

from __future__ import annotations

import pytest
import torch

from megatron_zaya.parallel.sequence import merge_zigzag
from tests.ranks import run_ranks

LENGTH, BATCH, WORLD = 36, 2, 3
SLIDING = dict(layer_types=["sliding", "full"])
CASES = {
    "released taps": dict(model={}),
    "long taps": dict(model=dict(cca_time0=4, cca_time1=3)),
    "no taps": dict(model=dict(cca_time0=1, cca_time1=1)),
    "window within a chunk": dict(model=SLIDING | dict(sliding_window=4)),
    "window over chunks": dict(model=SLIDING | dict(sliding_window=15)),
    "documents": dict(model={}, starts=[0, 1, 2, 20, 36, 41, 72]),
    "documents, long taps, window": dict(
        model=SLIDING | dict(sliding_window=8, cca_time0=4, cca_time1=3), starts=[0, 7, 8, 31, 36, 72]
    ),
    "recomputed": dict(model={}, parallel=dict(recompute_granularity="full")),
}


def run_cases(comm_types: list[str]) -> dict[tuple[str, str], dict]:
    """Run on each rank: its logits and gradients of every case, with the world as context-parallel group."""
    from launch.env import read_rank_env
    from megatron_zaya.model.init import initialise
    from megatron_zaya.parallel.groups import build_process_groups, release_process_groups
    from megatron_zaya.parallel.sequence import split_zigzag
    from megatron_zaya.train.setup import distributed_world
    from tests.model.small import our_model, run_config

    env = read_rank_env()
    tokens = torch.randint(0, 101, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    results = {}
    with distributed_world(run_config(), env):
        for comm_type in comm_types:
            for name, case in CASES.items():
                config = run_config(**dict(num_layers=2) | case["model"])
                parallel = dict(context_parallel_size=env.world_size, cp_comm_type=comm_type) | case.get("parallel", {})
                config.parallel = config.parallel.model_copy(update=parallel)
                groups = build_process_groups(config.parallel, seed=1)
                model = our_model(config, groups, torch.float64).train()
                initialise(model, model.config, seed=7)
                part, labels = (
                    split_zigzag(x, 1, groups.cp.rank(), groups.cp.size()) for x in (tokens, tokens.roll(-1))
                )
                starts = torch.tensor(case["starts"]) if "starts" in case else None
                logits = model(part, cu_seqlens=starts)
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
                gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
                results[name, comm_type] = {"logits": logits.detach(), "gradients": gradients}
                release_process_groups()
    return results


@pytest.fixture(scope="module")
def runs():
    return run_ranks(run_cases, 1, ["all_gather"])[0], run_ranks(run_cases, WORLD, ["all_gather", "p2p"])


@pytest.mark.parametrize("comm_type", ["all_gather", "p2p"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_summed_gradients_equal_those_of_one_rank(runs, case, comm_type):
    one, ranks = runs[0][case, "all_gather"], [rank[case, comm_type] for rank in runs[1]]
    logits = merge_zigzag([rank["logits"] for rank in ranks], dim=1)
    torch.testing.assert_close(logits, one["logits"], rtol=1e-9, atol=1e-10)
    for name, gradient in one["gradients"].items():
        total = sum(rank["gradients"][name] for rank in ranks)
        error = (total - gradient).abs().max() / gradient.abs().max()
        assert error <= 1e-6, name  # the residual stream is fp32 whatever the model is
