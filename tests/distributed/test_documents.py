"""Packed documents: what stands in one changes nothing in another, bit for bit, also where a document spans ranks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron_zaya.parallel.sequence import merge_zigzag
from tests.ranks import run_ranks

LENGTH, BATCH = 32, 2
# Documents of both samples, some inside a chunk of 8 tokens and some over several; WATCHED is the one in question.
STARTS = [0, 5, 6, 19, 32, 42, 64]
WATCHED = slice(6, 19)
MODEL = dict(num_layers=2, layer_types=["full", "sliding"], sliding_window=5)
LAYOUTS = {
    1: {"cp1": {}},
    2: {"cp2_all_gather": {"context_parallel_size": 2}, "cp2_p2p": {"context_parallel_size": 2, "cp_comm_type": "p2p"}},
}


def texts() -> dict[str, torch.Tensor]:
    """Return the packed samples [B, S] and variants of them in all other documents, and each document alone."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 101, (BATCH * LENGTH,), generator=generator)
    watched = torch.zeros(BATCH * LENGTH, dtype=torch.bool)
    watched[WATCHED] = True
    other = torch.where(watched, tokens, (tokens + 37) % 101)
    constant = torch.where(watched, tokens, torch.full_like(tokens, 7))
    return {name: x.view(BATCH, LENGTH) for name, x in dict(tokens=tokens, other=other, constant=constant).items()}


def run_documents(layouts: dict[str, dict]) -> dict[str, dict]:
    """Run on each rank: logits of every text, and gradients of the watched document's loss."""
    import torch

    from launch.env import read_rank_env
    from megatron_zaya.model.init import initialise
    from megatron_zaya.parallel.groups import build_process_groups, release_process_groups
    from megatron_zaya.parallel.sequence import split_zigzag
    from megatron_zaya.train.setup import distributed_world
    from tests.model.small import our_model, run_config

    results = {}
    with distributed_world(run_config(), read_rank_env()):
        for name, parallel in layouts.items():
            config = run_config(**MODEL)
            config.parallel = config.parallel.model_copy(update=parallel)
            groups = build_process_groups(config.parallel, seed=1)
            model = our_model(config, groups).train()
            initialise(model, model.config, seed=5)

            def part(x: torch.Tensor, group=groups.cp) -> torch.Tensor:
                return split_zigzag(x, 1, group.rank(), group.size())

            def run(tokens: torch.Tensor, starts: list[int], loss_mask: torch.Tensor, model=model, part=part) -> dict:
                model.zero_grad()
                routed = []
                hooks = [
                    layer.mlp.router.register_forward_hook(lambda m, i, out: routed.append(out[0].class_T))
                    for layer in model.layers
                ]
                labels = part(tokens.roll(-1))
                logits = model(part(tokens), cu_seqlens=torch.tensor(starts))
                loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
                (loss * part(loss_mask)).sum().backward()
                for hook in hooks:
                    hook.remove()
                gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
                return {"logits": logits.detach(), "gradients": gradients, "classes": torch.stack(routed)}

            mask = torch.zeros(BATCH * LENGTH)
            mask[WATCHED.start : WATCHED.stop - 1] = 1  # the label of the last token is in the next document
            mask = mask.view(BATCH, LENGTH)
            result = {text: run(tokens, STARTS, mask) for text, tokens in texts().items()}
            result["one document"] = run(texts()["tokens"], [0, LENGTH, 2 * LENGTH], mask)
            # All tokens to one expert: then every product has the same rows in the same places.
            for layer in model.layers:
                layer.mlp.router.balancing_bias[0] += 10
            result |= {f"{text} on one expert": run(tokens, STARTS, mask) for text, tokens in texts().items()}
            results[name] = result
            release_process_groups()
    return results


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict]]:
    """Results by layout, of each rank."""
    found = {}
    for world, layouts in LAYOUTS.items():
        ranks = run_ranks(run_documents, world, layouts)
        found |= {name: [rank[name] for rank in ranks] for name in layouts}
    return found


def logits_of(ranks: list[dict], text: str) -> torch.Tensor:
    """Return [B * S, vocabulary] in the order of the text."""
    return merge_zigzag([rank[text]["logits"] for rank in ranks], dim=1).flatten(0, 1)


NAMES = [name for layouts in LAYOUTS.values() for name in layouts]


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("changed", ["other", "constant"])
def test_a_change_in_other_documents_leaves_this_one_bit_identical(runs, layout, changed):
    ranks = runs[layout]
    before, after = (logits_of(ranks, f"{text} on one expert") for text in ("tokens", changed))
    assert torch.equal(before[WATCHED], after[WATCHED])
    assert not torch.equal(before, after)
    for rank in ranks:
        before, after = (rank[f"{text} on one expert"]["gradients"] for text in ("tokens", changed))
        different = [name for name in before if not torch.equal(before[name], after[name])]
        assert not different


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("changed", ["other", "constant"])
def test_nor_does_it_where_experts_get_other_numbers_of_rows(runs, layout, changed):
    """A matrix product may round a row differently among more rows: all that is left of the other documents."""
    before, after = (logits_of(runs[layout], text) for text in ("tokens", changed))
    torch.testing.assert_close(before[WATCHED], after[WATCHED], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", NAMES)
def test_without_boundaries_the_change_would_be_seen(runs, layout):
    packed, whole = (logits_of(runs[layout], text) for text in ("tokens", "one document"))
    assert not torch.allclose(packed[WATCHED], whole[WATCHED], rtol=1e-3)
    first = slice(0, STARTS[1])  # but not by the first document of a sample
    torch.testing.assert_close(packed[first], whole[first], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", NAMES)
def test_packed_documents_equal_documents_alone(runs, pg_collection, layout):
    """The model of one rank, each document a sample of its own that starts at position 0."""
    from megatron_zaya.model.init import initialise
    from tests.model.small import our_model, run_config

    model = our_model(run_config(**MODEL), pg_collection).train()
    initialise(model, model.config, seed=5)
    packed, tokens = logits_of(runs[layout], "tokens"), texts()["tokens"].flatten()
    for start, stop in pairwise(STARTS):
        alone = model(tokens[None, start:stop])[0]
        torch.testing.assert_close(packed[start:stop], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", NAMES)
def test_gradients_of_context_parallel_ranks_add_up(runs, layout):
    expected = runs["cp1"][0]["tokens"]["gradients"]
    for name, gradient in expected.items():
        total = sum(rank["tokens"]["gradients"][name] for rank in runs[layout])
        torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item() + 1e-9)
