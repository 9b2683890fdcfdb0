"""The layouts that are proved equal to one rank: name -> (world size, overrides of the `parallel` section)."""

from __future__ import annotations

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
INTERLEAVED = PP2 | {"virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
EP4 = {"expert_model_parallel_size": 4}
ETP2 = {"expert_tensor_parallel_size": 2}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}

LAYOUTS: dict[str, tuple[int, dict]] = {
    "dp2": (2, {}),
    "tp2": (2, TP2),
    "ep2": (2, EP2),
    "ep2_allgather": (2, EP2 | ALLGATHER),
    "etp2": (2, TP2 | ETP2),
    "etp2_allgather": (2, TP2 | ETP2 | ALLGATHER),
    "tp2_ep2": (2, TP2 | EP2),
    "tp2_ep2_allgather": (2, TP2 | EP2 | ALLGATHER),
    "pp2": (2, PP2),
    "pp2_uneven": (2, PP2 | {"pipeline_model_parallel_layout": [1, 3]}),
    "pp2_interleaved": (2, INTERLEAVED),
    "dp4": (4, {}),
    "tp2_dp2": (4, TP2),
    "ep4": (4, EP4),
    "ep2_dp2": (4, EP2),
    "tp2_ep4": (4, TP2 | EP4),
    "tp2_ep2_dp2": (4, TP2 | EP2),
    "tp2_etp2_ep2": (4, TP2 | ETP2 | EP2),
    "tp2_pp2": (4, TP2 | PP2),
    "tp2_pp2_ep2": (4, TP2 | PP2 | EP2),
    "tp2_pp2_etp2": (4, TP2 | PP2 | ETP2),
    "pp2_ep2": (4, PP2 | EP2),
    "pp2_interleaved_ep2": (4, INTERLEAVED | EP2),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "tp2_pp2_interleaved_ep2_allgather": (4, TP2 | INTERLEAVED | EP2 | ALLGATHER),
    "tp2_pp2_ep2_dp2": (8, TP2 | PP2 | EP2),
    "tp2_pp2_interleaved_ep4_dp2": (8, TP2 | INTERLEAVED | EP4),
}
