"""How many parameters one rank holds: exact counts, split into those of experts and all others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from megatron_zaya.plan.shape import Layout, ModelShape


@dataclass(frozen=True)
class Parameters:
    """Elements on one rank."""

    dense: int = 0
    """Reduced over all data-parallel ranks."""
    expert: int = 0
    """Reduced over the ranks that hold the same experts."""
    dense_matrices: int = 0
    """Of the dense ones, those in hidden matrices, which Muon trains; experts are such matrices too."""
    largest_dense: int = 0
    """The largest single tensor that is no expert."""
    largest_expert: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(
            self.dense + other.dense,
            self.expert + other.expert,
            self.dense_matrices + other.dense_matrices,
            max(self.largest_dense, other.largest_dense),
            max(self.largest_expert, other.largest_expert),
        )

    def times(self, count: int) -> Parameters:
        """Return ``count`` copies side by side."""
        sizes = (self.dense * count, self.expert * count, self.dense_matrices * count)
        return Parameters(*sizes, self.largest_dense, self.largest_expert)

    @property
    def total(self) -> int:
        """All elements."""
        return self.dense + self.expert


def _norm(m: ModelShape) -> int:
    return m.hidden_size * (2 if m.add_bias_linear else 1)


def attention_parameters(m: ModelShape, tp: int) -> int:
    """Return the elements of one layer's attention on a rank, its norm left out."""
    h = m.hidden_size
    if m.attention == "mla":
        down = h * (m.kv_lora_rank + m.qk_pos_emb_head_dim) + m.kv_lora_rank
        up = m.kv_lora_rank * m.num_attention_heads * (m.qk_head_dim + m.v_head_dim)
        query = h * m.q_width
        if m.q_lora_rank:
            down += h * m.q_lora_rank + m.q_lora_rank
            query = m.q_lora_rank * m.q_width
        return down + (up + query + m.v_width * h) // tp
    kv_parts = min(tp, m.num_query_groups)
    weights = (2 * m.q_width * h) // tp + 2 * m.kv_width * h // kv_parts
    if m.attention == "gqa":
        bias = (m.q_width // tp + 2 * m.kv_width // kv_parts + h) if m.add_bias_linear else 0
        return weights + bias
    channels = m.q_width // tp + m.kv_width // kv_parts
    convolutions = channels * (m.cca_time0 + 1 + m.kv_channels * m.cca_time1 + 1)
    return weights + convolutions + m.num_query_groups // kv_parts


def mlp_parameters(m: ModelShape, ffn: int, tp: int) -> int:
    """Return the elements of one MLP on a rank."""
    first = (2 if m.gated_linear_unit else 1) * ffn
    bias = first // tp + m.hidden_size if m.add_bias_linear else 0
    return (first + ffn) * m.hidden_size // tp + bias


def router_parameters(m: ModelShape, first_layer: bool) -> int:
    """Return the elements of one router."""
    r = m.router_hidden_size
    if not r:
        return m.hidden_size * m.num_moe_experts
    state = 0 if first_layer else r
    return (m.hidden_size + 1) * r + state + r + 2 * (r + 1) * r + r * (m.num_moe_experts + 1)


def layer_parameters(m: ModelShape, layout: Layout, index: int) -> Parameters:
    """Return what layer ``index`` (0-based) puts on a rank."""
    dense = attention_parameters(m, layout.tp) + 2 * _norm(m)
    matrices = (2 * m.q_width // layout.tp + 2 * m.kv_width // min(layout.tp, m.num_query_groups)) * m.hidden_size
    if m.is_zaya:
        dense += 2 * 4 * m.hidden_size
    if not m.is_moe_layer(index):
        mlp = mlp_parameters(m, m.ffn_hidden_size, layout.tp)
        return Parameters(dense + mlp, 0, matrices + mlp, mlp // 2)
    dense += router_parameters(m, index == 0)
    if m.moe_shared_expert_intermediate_size:
        dense += mlp_parameters(m, m.moe_shared_expert_intermediate_size, layout.tp)
    r = m.router_hidden_size
    matrices += m.hidden_size * r + 2 * r * r + r * (m.num_moe_experts + 1)
    per_expert = mlp_parameters(m, m.moe_ffn_hidden_size, layout.etp)
    local = m.num_moe_experts // layout.ep
    return Parameters(dense, local * per_expert, matrices, m.hidden_size, local * per_expert * 2 // 3)


def embedding_parameters(m: ModelShape, tp: int) -> Parameters:
    """Return what the embedding puts on a rank of the first stage."""
    table = m.vocab_size * m.hidden_size // tp
    more = m.learned_positions * m.hidden_size + (2 * m.hidden_size if m.is_zaya else 0)
    return Parameters(table + more, largest_dense=table)


def head_parameters(m: ModelShape, tp: int, own_table: bool) -> Parameters:
    """Return what the final norm and the output layer put on a rank of the last stage."""
    table = m.vocab_size * m.hidden_size // tp if own_table else 0
    return Parameters(_norm(m) + table, largest_dense=table)


def chunk_parameters(m: ModelShape, layout: Layout, stage: int) -> Parameters:
    """Return what virtual stage ``stage`` puts on a rank."""
    sizes = layout.layers_of_stages(m.num_layers)
    first = sum(sizes[:stage])
    last = first + sizes[stage]
    # Layers are alike but for the first one of the model and the dense ones of a mixture.
    kinds = Counter((index == 0, m.is_moe_layer(index)) for index in range(first, last))
    total = Parameters()
    for (is_first, is_moe), count in kinds.items():
        index = 0 if is_first else m.num_layers if is_moe or not m.num_moe_experts else m.num_dense_layers - 1
        total = total + layer_parameters(m, layout, index).times(count)
    if stage == 0:
        total = total + embedding_parameters(m, layout.tp)
    if stage == layout.stages - 1:
        own = layout.stages > 1 or not m.share_embeddings_and_output_weights
        total = total + head_parameters(m, layout.tp, own)
    return total


def rank_parameters(m: ModelShape, layout: Layout, pp_rank: int) -> Parameters:
    """Return what all virtual stages of a pipeline rank put on it."""
    degrees = Layout(
        tp=layout.tp, pp=layout.pp, vp=layout.vp, ep=layout.ep, etp=layout.etp, stage_layers=layout.stage_layers
    )
    return _rank_parameters(m, degrees, pp_rank)


@lru_cache(maxsize=65536)
def _rank_parameters(m: ModelShape, layout: Layout, pp_rank: int) -> Parameters:
    total = Parameters()
    for stage in range(pp_rank, layout.stages, layout.pp):
        total = total + chunk_parameters(m, layout, stage)
    return total


def model_parameters(m: ModelShape) -> Parameters:
    """Return the sizes of the whole model."""
    return rank_parameters(m, Layout(), 0)


def active_parameters(m: ModelShape) -> int:
    """Return the elements of matrices that a token meets, the embedding table left out (the head counts)."""
    whole = model_parameters(m)
    experts = whole.expert * m.moe_router_topk // max(1, m.num_moe_experts)
    table = m.vocab_size * m.hidden_size
    return whole.dense - (0 if m.share_embeddings_and_output_weights else table) + experts
