"""The layouts that are proved equal to one rank: name -> (world size, overrides of the `parallel` section)."""

from __future__ import annotations

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
TP4 = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
TP8 = {"tensor_model_parallel_size": 8, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
CP4 = {"context_parallel_size": 4}
RING = {"cp_comm_type": "p2p"}
PP2 = {"pipeline_model_parallel_size": 2}
INTERLEAVED = PP2 | {"virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
ETP2 = {"expert_tensor_parallel_size": 2}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
RECOMPUTE_FULL = {"recompute_granularity": "full"}
RECOMPUTE_PARTS = {"recompute_granularity": "selective", "recompute_modules": "[layernorm, core_attn, moe]"}

LAYOUTS: dict[str, tuple[int, dict]] = {
    "dp2": (2, {}),
    "tp2": (2, TP2),
    "ep2": (2, EP2),
    "ep2_allgather": (2, EP2 | ALLGATHER),
    "etp2": (2, TP2 | ETP2),
    "tp2_ep2": (2, TP2 | EP2),
    "pp2": (2, PP2),
    "pp2_uneven": (2, PP2 | {"pipeline_model_parallel_layout": [1, 3]}),
    "pp2_interleaved": (2, INTERLEAVED),
    "tp2_dp2": (4, TP2),
    "tp2_ep2_dp2": (4, TP2 | EP2),
    "tp2_pp2_ep2": (4, TP2 | PP2 | EP2),
    "pp2_interleaved_ep2": (4, INTERLEAVED | EP2),
    "tp2_pp2_recompute_full": (4, TP2 | PP2 | RECOMPUTE_FULL),
    "tp2_ep2_recompute_parts": (2, TP2 | EP2 | RECOMPUTE_PARTS),
    "tp4_on_two_kv_heads": (4, TP4),
    "cp2": (2, CP2),
    "cp2_ring": (2, CP2 | RING),
    "cp4": (4, CP4),
    "cp4_ring": (4, CP4 | RING),
    "cp2_tp2": (4, CP2 | TP2),
    "cp2_ring_ep2": (2, CP2 | RING | EP2),
    "cp2_pp2": (4, CP2 | PP2),
    "cp2_ring_pp2_interleaved": (4, CP2 | RING | INTERLEAVED),
    "cp2_dp2": (4, CP2),
    "cp2_tp2_dp2": (8, CP2 | TP2),
    "pp2_interleaved_ep2_cp2": (8, INTERLEAVED | EP2 | CP2),
    "tp8_on_two_kv_heads": (8, TP8),
}

SOAK = ["cp4", "cp2_dp2", "cp2_pp2", "tp2_ep2_dp2", "pp2_interleaved_ep2", "tp8_on_two_kv_heads"]
"""Layouts that only the long test run takes; each is a part or a relative of another."""

PACKED: dict[str, tuple[int, dict]] = {
    "packed_cp2": (2, CP2),
    "packed_cp2_ring_pp2": (4, CP2 | RING | PP2),
    "packed_cp2_tp2_recompute_parts": (4, CP2 | TP2 | RECOMPUTE_PARTS),
}
"""Layouts that train on short documents, several to a sample, kept apart."""

SAVED = ["tp4_on_two_kv_heads", "cp2_tp2"]
"""Layouts whose checkpoint one rank resumes from; the others are covered with the checkpoints themselves."""
