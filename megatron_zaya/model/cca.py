"""Compressed convolutional attention (CCA, arXiv 2510.04476, as released in ZAYA1).

    q, k  = x Wq, x Wk                                      compressed heads
    qk    = grouped_conv(depthwise_conv([q | k]))            both causal over time, the second mixes one head's channels
    q, k  = qk + mean coupling of the unconvolved q and k
    q, k  = sqrt(D) q/|q|,  sqrt(D) temperature k/|k|        then RoPE on a part of each head
    v     = [x_t Wv_current | x_{t-1} Wv_delayed]            half of the value width comes from the previous token
    out   = softmax(q k / sqrt(D)) v Wo                      grouped-query attention, full or sliding window

Every parameter is one logical tensor, split over tensor-parallel ranks along its first dimension (heads). With more
ranks than key-value heads, several ranks hold the same key-value head (see sharding.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.utils import divide
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_zaya.model import fused
from megatron_zaya.model.attention_derivatives import (
    attention_inputs,
    causal_taps,
    merged_convolution,
    normalised_sum,
    rotate,
)
from megatron_zaya.model.recompute import run_again_later
from megatron_zaya.model.sharding import describe_shard, sum_over_ranks
from megatron_zaya.model.transformer_config import ZayaTransformerConfig
from megatron_zaya.parallel.sequence import LocalSequence, exchange_halo


@dataclass
class CCASubmodules:
    """The replaceable parts of :class:`CompressedConvolutionalAttention`."""

    linear_qkv: ModuleSpec | type
    """Column-parallel product without a weight of its own: it takes the concatenated q, k and v weights."""
    core_attention: ModuleSpec | type
    linear_proj: ModuleSpec | type


class CausalHeadConvolution(nn.Module):
    """Weights of the two causal convolutions over time for one stream (q or k) of ``heads`` heads.

    Shapes are those of torch's Conv1d: depthwise [heads*D, 1, cca_time0], grouped by head [heads*D, D, cca_time1].
    """

    def __init__(
        self,
        config: ZayaTransformerConfig,
        heads: int,
        shard_group: ProcessGroup,
        replica_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        width, dtype = config.kv_channels, config.params_dtype
        shapes = {
            "depthwise_weight": (heads * width, 1, config.cca_time0),
            "depthwise_bias": (heads * width,),
            "grouped_weight": (heads * width, width, config.cca_time1),
            "grouped_bias": (heads * width,),
        }
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
            describe_shard(parameter, {0: shard_group}, replica_group)
            self.register_parameter(name, parameter)

    def forward(self) -> dict[str, Tensor]:
        """Return the weights by name. A call, so that gathering them is waited for (overlap_param_gather)."""
        return dict(self.named_parameters())


def causal_convolution(
    x_SBC: Tensor,
    weight_kXDD: Tensor,
    bias_X1D: Tensor,
    before: Sequence[Tensor] | None = None,
    position_SB: Tensor | None = None,
) -> Tensor:
    """Convolve each head over time.

    Args:
        x_SBC: the concatenated q and k channels.
        weight_kXDD: taps of the merged convolution; ``bias_X1D`` its bias.
        before: for each of the equal chunks that ``x_SBC`` consists of, the k - 1 rows [k - 1, B, C] before it; None
            means one chunk, and that the sequence starts here and they are zero. Only the input of the first of the two
            convolutions is padded: its bias reaches the rows before the start.
        position_SB: position of each token in its document, where there are several: rows before it are zero.

    Returns:
        [T, X, D] for the T = S * B tokens and X heads, in the dtype of ``x_SBC``; X is its outer dimension in memory.
    """
    batch, dtype, head_width = x_SBC.shape[1], x_SBC.dtype, weight_kXDD.shape[2]
    weight_kXDD, bias_X1D = weight_kXDD.to(dtype), bias_X1D.to(dtype)
    count = 1 if before is None else len(before)
    positions = [None] * count if position_SB is None else [p.flatten() for p in position_SB.chunk(count)]
    out = []
    for chunk, (chunk_SBC, position_T) in enumerate(zip(x_SBC.chunk(count), positions, strict=True)):
        x_RBC = chunk_SBC if before is None else torch.cat([before[chunk], chunk_SBC])
        x_XRD = x_RBC.unflatten(-1, (-1, head_width)).flatten(0, 1).transpose(0, 1)
        out.append(causal_taps(x_XRD, weight_kXDD, bias_X1D, batch, len(chunk_SBC) * batch, position_T))
    return (out[0] if len(out) == 1 else torch.cat(out, dim=1)).transpose(0, 1)


def mean_of_other_queries(plain_TXD: Tensor, replica_group: ProcessGroup) -> Tensor:
    """Return what the mean coupling of the one key head of this rank lacks: the query heads of its other holders.

    The ranks of ``replica_group`` have equal shares of the query heads of that key head. Zero for the query heads.
    """
    queries = plain_TXD.shape[1] - 1
    own_T1D = plain_TXD[:, :queries].mean(dim=1, keepdim=True)
    all_T1D = sum_over_ranks(own_T1D, replica_group) / replica_group.size()
    return F.pad((all_T1D - own_T1D) / 2, (0, 0, queries, 0))


def delay_one_token(x_SBV: Tensor, before: Sequence[Tensor] | None = None, position_SB: Tensor | None = None) -> Tensor:
    """Shift rows by one token.

    Args:
        x_SBV: the rows.
        before: for each of the equal chunks that ``x_SBV`` consists of, the row [1, B, V] before it; None means one
            chunk, and zero.
        position_SB: position of each token in its document, where there are several: each starts with zero.
    """
    if before is None:
        before = (x_SBV.new_zeros(1, *x_SBV.shape[1:]),)
    chunks = x_SBV.chunk(len(before))
    delayed = torch.cat([rows for row, chunk in zip(before, chunks, strict=True) for rows in (row, chunk[:-1])])
    return delayed if position_SB is None else delayed.masked_fill((position_SB == 0).unsqueeze(-1), 0)


class CompressedConvolutionalAttention(MegatronModule):
    """CCA of one layer; see the module header for the formulas."""

    def __init__(
        self,
        config: ZayaTransformerConfig,
        submodules: CCASubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        tp_size = pg_collection.tp.size()
        replicated = tp_size > config.num_query_groups
        kv_group = pg_collection.kv_shard if replicated else pg_collection.tp
        self.kv_replica_group = pg_collection.kv_replica if replicated else None
        self.query_heads = divide(config.num_attention_heads, tp_size)
        self.kv_heads = divide(config.num_query_groups, kv_group.size())
        self.q_width = self.query_heads * config.kv_channels
        self.kv_width = self.kv_heads * config.kv_channels
        # Of all value rows, the second half is delayed; this rank holds a contiguous part of them.
        first_delayed = divide(config.num_query_groups * config.kv_channels, 2)
        self.current_width = min(max(first_delayed - kv_group.rank() * self.kv_width, 0), self.kv_width)

        for name, rows in (("linear_q", self.q_width), ("linear_k", self.kv_width), ("linear_v", self.kv_width)):
            weight = nn.Parameter(torch.empty(rows, config.hidden_size, dtype=config.params_dtype))
            self.register_parameter(name, weight)
        self.temperature = nn.Parameter(torch.empty(self.kv_heads, dtype=config.params_dtype))
        describe_shard(self.linear_q, {0: pg_collection.tp})
        for parameter in (self.linear_k, self.linear_v, self.temperature):
            describe_shard(parameter, {0: kv_group}, self.kv_replica_group)
        self.conv_q = CausalHeadConvolution(config, self.query_heads, pg_collection.tp)
        self.conv_k = CausalHeadConvolution(config, self.kv_heads, kv_group, self.kv_replica_group)

        common = dict(config=config, init_method=config.init_method, bias=False, skip_bias_add=False, is_expert=False)
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            tp_size * (self.q_width + 2 * self.kv_width),
            gather_output=False,
            skip_weight_param_allocation=True,
            tp_group=pg_collection.tp,
            **common,
        )
        self.core_attention = build_module(submodules.core_attention, config=config, layer_number=layer_number)
        self.linear_proj = build_module(
            submodules.linear_proj,
            config.num_attention_heads * config.kv_channels,
            config.hidden_size,
            input_is_parallel=True,
            tp_group=pg_collection.tp,
            **common,
        )
        describe_shard(self.linear_proj.weight, {1: pg_collection.tp})

    def forward(self, x_SBH: Tensor, rotary_pos_emb: Tensor, sequence: LocalSequence | None = None) -> Tensor:
        """Attend.

        Args:
            x_SBH: the normed input (a part of the sequence under sequence parallelism).
            rotary_pos_emb: rotary angles [S, B or 1, 1, rotated width] of this context-parallel rank's tokens, fp32.
            sequence: which tokens they are, and of which documents; None: whole sequences of one document.
        """
        weight = torch.cat([self.linear_q, self.linear_k, self.linear_v])
        qkv_SBC, _ = self.linear_qkv(x_SBH, weight=weight)
        if self.config.recompute.reruns("core_attn"):
            attended_SBC = run_again_later(self._attend, qkv_SBC, rotary_pos_emb, sequence)
        else:
            attended_SBC = self._attend(qkv_SBC, rotary_pos_emb, sequence)
        out, _ = self.linear_proj(attended_SBC)
        return out

    def _attend(self, qkv_SBC: Tensor, rotary_pos_emb: Tensor, sequence: LocalSequence | None) -> Tensor:
        """Return the attention output [S, B, Q * D] of this rank's heads: all between the two projections."""
        temperature = self.config.widened("qk_norm", self.temperature)
        temperature_X1 = torch.cat([temperature.new_ones(self.query_heads), temperature])[:, None]
        length_X1 = temperature_X1 * math.sqrt(self.config.kv_channels)
        convolution = merged_convolution(self.conv_q(), self.conv_k())
        angles = rotary_pos_emb[..., : rotary_pos_emb.shape[-1] // 2]  # the other half repeats them
        before, position_SB = self._neighbourhood(qkv_SBC, sequence)

        # q and k stay side by side (X = Q + K heads) until attention: one kernel each for what they share.
        tensors = (qkv_SBC, *convolution, length_X1, angles)
        whole = before is None and self.kv_replica_group is None
        if whole and fused.fits(*tensors):
            qk_SBXD, v_SBV = attention_inputs(*tensors, self.query_heads, self.current_width, position_SB)
        else:
            qk_SBXD, v_SBV = self._inputs(*tensors, before, position_SB)
        q_SBQD, k_SBKD = qk_SBXD.split([self.query_heads, self.kv_heads], dim=2)
        return self.core_attention(q_SBQD, k_SBKD, v_SBV.unflatten(2, (self.kv_heads, -1)), sequence)

    def _inputs(
        self,
        qkv_SBC: Tensor,
        weight_kXDD: Tensor,
        bias_X1D: Tensor,
        length_X1: Tensor,
        angles: Tensor,
        before: tuple[list[Tensor], list[Tensor]] | None,
        position_SB: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return q and k [S, B, X, D] and v [S, B, V] as attention takes them."""
        qk_before, delayed_before = before or (None, None)
        qk_SBC, v_SBV = qkv_SBC.split([self.q_width + self.kv_width, self.kv_width], dim=-1)
        plain_TXD = qk_SBC.unflatten(2, (-1, self.config.kv_channels)).flatten(0, 1)
        convolved_TXD = causal_convolution(qk_SBC, weight_kXDD, bias_X1D, qk_before, position_SB)
        convolved_TXD, plain_TXD = (self.config.widened("qk_norm", x) for x in (convolved_TXD, plain_TXD))
        if self.kv_replica_group is not None:
            convolved_TXD = convolved_TXD + mean_of_other_queries(plain_TXD, self.kv_replica_group)
        qk_TXD = normalised_sum(convolved_TXD, plain_TXD, length_X1, self.query_heads)
        qk_SBXD = rotate(qk_TXD.to(qkv_SBC.dtype).unflatten(0, qkv_SBC.shape[:2]), angles)

        current, delayed = v_SBV.split([self.current_width, self.kv_width - self.current_width], dim=-1)
        delayed = delay_one_token(delayed, delayed_before, position_SB)
        return qk_SBXD, torch.cat([current, delayed], dim=-1)

    def _neighbourhood(
        self, qkv_SBC: Tensor, sequence: LocalSequence | None
    ) -> tuple[tuple[list[Tensor], list[Tensor]] | None, Tensor | None]:
        """Return the rows before each local chunk, of q and k and of the delayed value, and positions in documents.

        One exchange brings both. None stands for what needs no care.
        """
        if sequence is None:
            return None, None
        position_SB = None if sequence.documents is None else sequence.position_SB
        if sequence.group.size() == 1:
            return None, position_SB
        reach = self.config.cca_time0 + self.config.cca_time1 - 2
        rows = exchange_halo(qkv_SBC, max(reach, 1), sequence.group)
        qk_width, skipped = self.q_width + self.kv_width, max(reach, 1) - reach
        qk_before = [block[skipped:, :, :qk_width] for block in rows]
        delayed_before = [block[-1:, :, qk_width + self.current_width :] for block in rows]
        return (qk_before, delayed_before), position_SB
