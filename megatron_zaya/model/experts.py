"""SwiGLU experts as one stacked grouped product: rows sorted by expert, one weight tensor for all local experts.

fc1 has the shape [E, 2, F, H] (gate, then up) and fc2 [E, H, F], so expert parallelism splits the first dimension and
expert tensor parallelism the F dimension of the same logical tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import divide
from torch import Tensor, nn

from megatron_zaya.compat.capabilities import grouped_product_works
from megatron_zaya.model.derivatives import run_product, weighted_swiglu
from megatron_zaya.model.recompute import run_again_later
from megatron_zaya.model.sharding import describe_shard
from megatron_zaya.model.transformer_config import ZayaTransformerConfig


def runs_grouped(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether the experts run as torch's grouped product, or one after the other.

    On a CPU torch's grouped product is a loop as well, one that fills its results with zeros first.
    """
    return device_type != "cpu" and grouped_product_works(device_type, dtype)


def grouped_product(x_TI: Tensor, weight_EOI: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiply each run of rows with its expert's matrix.

    Args:
        x_TI: rows sorted by expert.
        weight_EOI: one [out, in] matrix per expert.
        tokens_per_expert: [E] integers that sum to T, on any device.

    Returns:
        [T, O].
    """
    if runs_grouped(x_TI.device.type, x_TI.dtype):
        offsets = tokens_per_expert.to(x_TI.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(x_TI, weight_EOI.transpose(1, 2), offs=offsets)
    return run_product(x_TI, weight_EOI, tokens_per_expert.tolist())


class GroupedExperts(MegatronModule):
    """The experts of this rank."""

    def __init__(self, config: ZayaTransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        experts = divide(config.num_moe_experts, pg_collection.ep.size())
        ffn = divide(config.moe_ffn_hidden_size, pg_collection.expt_tp.size())
        hidden, dtype = config.hidden_size, config.params_dtype
        self.linear_fc1 = nn.Parameter(torch.empty(experts, 2, ffn, hidden, dtype=dtype))
        self.linear_fc2 = nn.Parameter(torch.empty(experts, hidden, ffn, dtype=dtype))
        for weight in (self.linear_fc1, self.linear_fc2):
            weight.allreduce = False  # Megatron-Core's mark of an expert: reduced over expert-data-parallel ranks
            describe_shard(weight, {0: pg_collection.ep, 2: pg_collection.expt_tp})

    def forward(self, x_TH: Tensor, tokens_per_expert: Tensor, probs_T: Tensor) -> Tensor:
        """Return prob * down(silu(gate(x)) * up(x)) for each row, [T, H], in the dtype of ``x_TH``."""
        if x_TH.shape[0] == 0:
            # Keep every edge of the graph: the all-to-all in the backward pass is collective.
            nothing = 0.0 * (self.linear_fc1.sum() + self.linear_fc2.sum())
            return x_TH * probs_T.unsqueeze(-1).to(x_TH.dtype) + nothing
        if self.config.recompute.reruns("experts"):
            return run_again_later(self._compute, x_TH, tokens_per_expert, probs_T)
        return self._compute(x_TH, tokens_per_expert, probs_T)

    def _compute(self, x_TH: Tensor, tokens_per_expert: Tensor, probs_T: Tensor) -> Tensor:
        gate_up = grouped_product(x_TH, self.linear_fc1.flatten(1, 2), tokens_per_expert)
        inner_TF = weighted_swiglu(gate_up, probs_T.unsqueeze(-1).to(x_TH.dtype))
        return grouped_product(inner_TF, self.linear_fc2, tokens_per_expert)
