"""The collectives that are priced against those that the dry run records: each call, to the byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_zaya.config import load_config
from megatron_zaya.plan.collectives import step_flows
from megatron_zaya.plan.muon import exchanges, muon_flows
from megatron_zaya.plan.parameters import rank_parameters
from megatron_zaya.plan.shape import Layout, Precision, batch_of, layout_of, model_of, precision_of
from megatron_zaya.plan.tensors import chunk_tensors

ZAYA1 = Path(__file__).parents[2] / "configs/zaya1_8b.yaml"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
TP4 = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]
EP4 = ["parallel.expert_model_parallel_size=4"]
CP4 = ["parallel.context_parallel_size=4"]
PP2 = ["parallel.pipeline_model_parallel_size=2", "schedule.global_batch_size=8"]
INTERLEAVED = [*PP2, "parallel.virtual_pipeline_model_parallel_size=2", "model.num_layers=4"]
ETP2 = [*TP2, "parallel.expert_tensor_parallel_size=2", "parallel.expert_model_parallel_size=2"]
# Three data-parallel ranks and small buckets: few cuts fall between matrices.
MUON = ["optimizer.optimizer=muon", "parallel.ddp_bucket_size=6000000", "model.num_moe_experts=8"]
RING = ["parallel.cp_comm_type=p2p"]
FULL = ["parallel.recompute_granularity=full"]
SOME = ["parallel.recompute_granularity=selective"]
# Few layers: the loads of eight would be above a kibibyte.
# name: (world, rank, overrides); of context-parallel ranks one in the middle, which has two neighbours
CASES: dict[str, tuple[int, int, list[str]]] = {
    "data": (4, 1, ["schedule.global_batch_size=8"]),
    "data, nothing sharded": (4, 1, ["parallel.use_distributed_optimizer=false"]),
    "expert": (8, 0, EP4),
    "expert, parameters not overlapped": (8, 0, [*EP4, "parallel.overlap_param_gather=false"]),
    "expert, everything again": (8, 0, [*EP4, *FULL]),
    "expert, some again": (8, 0, [*EP4, *SOME, "parallel.recompute_modules=[moe]"]),
    "expert, gathered": (8, 0, [*EP4, "parallel.moe_token_dispatcher_type=allgather"]),
    "expert tensor": (4, 0, ETP2),
    "tensor": (4, 0, TP2),
    "tensor beyond key-value heads, everything again": (4, 0, [*TP4, *FULL]),
    "tensor and expert": (8, 0, [*TP2, *EP4]),
    "context, gathered": (4, 1, CP4),
    "context, ring": (4, 2, [*CP4, *RING]),
    "context of two, ring": (4, 0, ["parallel.context_parallel_size=2", *RING]),
    "context, gathered, attention again": (4, 1, [*CP4, *SOME]),
    "context, ring, one layer again": (4, 1, [*CP4, *RING, *FULL, "parallel.recompute_method=block"]),
    "context and tensor, gathered": (8, 2, [*CP4, *TP2]),
    "context and tensor beyond key-value heads, ring": (16, 4, [*CP4, *TP4, *RING]),
    "pipeline, first": (4, 0, PP2),
    "pipeline, last": (4, 2, PP2),
    "pipeline, own head": (4, 2, [*PP2, "model.share_embeddings_and_output_weights=false"]),
    "interleaved, first": (4, 1, INTERLEAVED),
    "muon, data": (3, 1, [*MUON]),
    "muon, last of three": (3, 2, [*MUON]),
    "muon, iterating in fp32": (3, 0, [*MUON, "optimizer.muon_newton_schulz_dtype=fp32"]),
    "muon, expert": (12, 6, [*MUON, *EP4]),
    "muon, tensor": (6, 3, [*MUON, *TP2]),
    "muon, tensor beyond key-value heads": (12, 7, [*MUON, *TP4]),
    "muon, expert tensor": (12, 5, [*MUON, *ETP2]),
    "muon, tensor and expert": (24, 23, [*MUON, *TP2, *EP4]),
    "muon, context": (12, 9, [*MUON, *CP4]),
    "muon, pipeline, last": (6, 4, [*MUON, *PP2, "schedule.global_batch_size=24"]),
    "muon, interleaved, first": (6, 1, [*MUON, *INTERLEAVED, "schedule.global_batch_size=24"]),
}  # fmt: skip


SUMMED_BYTES = 1024
"""The loss, norms and the loads of few layers, summed once a step and not priced, are smaller."""


@pytest.mark.parametrize("name", CASES)
def test_priced_collectives_are_those_of_the_dry_run(name):
    from megatron_zaya.plan.dryrun.run import dry_run

    world_size, rank, overrides = CASES[name]
    small = ["model.num_layers=2", "schedule.micro_batch_size=1"]
    once = f"schedule.global_batch_size={layout_of(load_config(ZAYA1, overrides), world_size).dp}"
    config = load_config(ZAYA1, [*small, once, *overrides])
    run = dry_run(config, world_size, rank, skip_share=0.0)
    layout, model, precision = layout_of(config, world_size), model_of(config), precision_of(config)
    pp_rank = rank // (world_size // layout.pp)
    flows = step_flows(model, layout, batch_of(config), precision, pp_rank, skip_share=0.0)
    if precision.is_muon:
        exchanged = muon_flows(model, layout, precision, rank)
        assert sum(flow.size_bytes for flow in exchanged) > 0
        flows += exchanged
    priced: Counter[tuple[str, float]] = Counter()
    for flow in flows:
        if flow.size_bytes and flow.calls:
            priced[flow.op, flow.size_bytes] += flow.calls
    seen: Counter[tuple[str, float]] = Counter()
    for call in run.collectives:
        if call.size_bytes and (call.op not in ("all_reduce", "broadcast") or call.size_bytes >= SUMMED_BYTES):
            seen[call.op, call.size_bytes] += call.calls
    assert priced == seen


LAYOUTS = [
    Layout(3),
    Layout(24, tp=2, ep=4),
    Layout(48, tp=4, pp=2, ep=2, etp=4),
    Layout(12, pp=2, vp=2, cp=2, bucket_elements=10**7),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_a_wave_is_priced_by_its_busiest_rank_and_nothing_gets_lost(layout):
    model, precision = model_of(load_config(ZAYA1, ["model.num_layers=4"])), Precision(matrix_moments=4)
    for pp_rank in range(layout.pp):
        first = pp_rank * (layout.world_size // layout.pp)
        ranks = range(first, first + layout.world_size // layout.pp)
        flows = [muon_flows(model, layout, precision, rank) for rank in ranks]
        waves = [wave for part in exchanges(model, layout, pp_rank) for wave in part.waves]
        assert {len(own) for own in flows} == {2 * len(waves)}
        assert waves
        for number, wave in enumerate(waves):
            pieces, results = ([own[2 * number + back].size_bytes for own in flows] for back in (0, 1))
            assert sum(pieces) == sum(results) > 0
            assert 2 * wave.busiest == max(*pieces, *results)
            assert 2 * wave.longest <= max(pieces)


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_tensors_add_up_to_the_parameters_of_a_rank(layout):
    model = model_of(load_config(ZAYA1, ["model.num_layers=4"]))
    for pp_rank in range(layout.pp):
        tensors = [t for stage in range(pp_rank, layout.stages, layout.pp) for t in chunk_tensors(model, layout, stage)]
        found = rank_parameters(model, layout, pp_rank)
        assert sum(t.numel for t in tensors if t.is_expert) == found.expert
        assert sum(t.numel for t in tensors if not t.is_expert) == found.dense
