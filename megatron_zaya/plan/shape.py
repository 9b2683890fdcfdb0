"""What a plan is about, as numbers: the model, the layout on ranks, the batch. Pure data, no torch.

Generic enough for ZAYA, dense GPT (grouped queries, gated or plain MLP) and other mixtures of experts, so that the
models of memory and time can be held against published measurements of all of them. Invariant: degrees multiply to the
world (`Layout.dp` and `Layout.edp` are what is left).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron_zaya.config import RunConfig

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer; names equal Megatron's."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    ffn_hidden_size: int = 0
    """Inner width of a dense MLP; 0 where every layer has experts."""
    gated_linear_unit: bool = True
    num_moe_experts: int = 0
    moe_router_topk: int = 1
    moe_ffn_hidden_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    num_dense_layers: int = 0
    """Leading layers with a dense MLP in a mixture of experts."""
    attention: Literal["gqa", "cca", "mla"] = "gqa"
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_head_dim: int = 0
    """MLA: width of a query or key head without its rotary part."""
    qk_pos_emb_head_dim: int = 0
    v_head_dim: int = 0
    router_hidden_size: int = 0
    """Width of ZAYA's router state; 0 for a plain linear router."""
    cca_time0: int = 2
    cca_time1: int = 2
    skip_share: float = 0.0
    """Share of the tokens that no expert sees."""
    share_embeddings_and_output_weights: bool = True
    learned_positions: int = 0
    add_bias_linear: bool = False
    dropout: bool = False
    fp32_residual_connection: bool = False
    sliding_window: int | None = None
    num_sliding_layers: int = 0

    @property
    def q_width(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * (self.kv_channels if self.attention != "mla" else self._mla_head)

    @property
    def kv_width(self) -> int:
        """Width of all key heads (values are as wide, but for MLA)."""
        return self.num_query_groups * (self.kv_channels if self.attention != "mla" else self._mla_head)

    @property
    def v_width(self) -> int:
        """Width of the attention's result."""
        return self.num_attention_heads * (self.v_head_dim if self.attention == "mla" else self.kv_channels)

    @property
    def _mla_head(self) -> int:
        return self.qk_head_dim + self.qk_pos_emb_head_dim

    @property
    def is_zaya(self) -> bool:
        """Whether the layers are this project's own implementation."""
        return self.attention == "cca"

    def is_moe_layer(self, index: int) -> bool:
        """Return whether layer ``index`` (0-based) has experts."""
        return self.num_moe_experts > 0 and index >= self.num_dense_layers


@lru_cache(maxsize=4096)
def _even(num_layers: int, stages: int) -> tuple[int, ...]:
    return tuple(num_layers // stages + (i < num_layers % stages) for i in range(stages))


@dataclass(frozen=True)
class Layout:
    """Degrees and switches of one job; names are short forms of Megatron's."""

    world_size: int = 1
    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    cp_comm_type: Literal["all_gather", "p2p"] = "all_gather"
    ep: int = 1
    etp: int = 1
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    sequence_parallel: bool = True
    stage_layers: tuple[int, ...] | None = None
    """Layers of each (virtual) stage; None spreads them evenly, longer stages first."""
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    bucket_elements: int | None = None
    recompute: Recompute = "none"
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: int = 1
    recompute_modules: tuple[str, ...] = ("core_attn",)
    schedule: Literal["1f1b", "zb1p", "gpipe"] = "1f1b"

    @property
    def dp(self) -> int:
        """Ranks that see different sequences."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Ranks that hold copies of the same experts."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def stages(self) -> int:
        """Virtual stages of the whole pipeline."""
        return self.pp * self.vp

    def layers_of_stages(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each virtual stage, in the order a token passes them."""
        if self.stage_layers is not None:
            return self.stage_layers
        return _even(num_layers, self.stages)

    def describe(self) -> str:
        """The degrees that are not 1, the recomputation, on one line."""
        degrees = {"TP": self.tp, "PP": self.pp, "VP": self.vp, "CP": self.cp, "EP": self.ep, "ETP": self.etp}
        shown = [f"{name}{size}" for name, size in degrees.items() if size > 1] + [f"DP{self.dp}"]
        if self.cp > 1 and self.cp_comm_type == "p2p":
            shown.append("ring")
        return " ".join(shown) + ("" if self.recompute == "none" else f" recompute={self.recompute}")


@dataclass(frozen=True)
class Batch:
    """Sequences of one optimizer step."""

    seq_length: int
    micro_batch_size: int
    global_batch_size: int

    def microbatches(self, layout: Layout) -> int:
        """Forward passes per step on one rank."""
        return max(1, self.global_batch_size // (self.micro_batch_size * layout.dp))

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch_size * self.seq_length


@dataclass(frozen=True)
class Precision:
    """Bytes per element of what a rank keeps."""

    parameter: int = 2
    gradient: int = 4
    master: int = 4
    """fp32 copy of the parameters; 0 where the parameters themselves are fp32."""
    moments: int = 8
    """Both of Adam's moments."""
    matrix_moments: int = 8
    """Of hidden matrices: Muon keeps the momentum only (4)."""
    newton_schulz: int = 2
    """What Muon iterates in and sends."""

    @property
    def is_muon(self) -> bool:
        """Whether Muon trains the hidden matrices."""
        return self.matrix_moments < self.moments


def model_of(config: RunConfig) -> ModelShape:
    """Return the sizes of a run file's model; the share of skipped tokens is what the balancing aims at."""
    m, target = config.model, config.optimizer.skip_expert_target
    return ModelShape(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.kv_channels,
        vocab_size=m.vocab_size,
        num_moe_experts=m.num_moe_experts,
        moe_ffn_hidden_size=m.moe_ffn_hidden_size,
        attention="cca",
        router_hidden_size=m.router_hidden_size,
        cca_time0=m.cca_time0,
        cca_time1=m.cca_time1,
        skip_share=1 / (m.num_moe_experts + 1) if target is None else target,
        share_embeddings_and_output_weights=m.share_embeddings_and_output_weights,
        fp32_residual_connection=True,
        sliding_window=m.sliding_window,
        num_sliding_layers=sum(kind == "sliding" for kind in m.layer_types or []),
    )


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """Return the layout of a run file on ``world_size`` ranks."""
    p = config.parallel
    sizes = p.pipeline_model_parallel_layout
    return Layout(
        world_size=world_size,
        tp=p.tensor_model_parallel_size,
        pp=p.pipeline_model_parallel_size,
        vp=p.virtual_pipeline_model_parallel_size or 1,
        cp=p.context_parallel_size,
        cp_comm_type=p.cp_comm_type,
        ep=p.expert_model_parallel_size,
        etp=p.expert_tensor_parallel_size,
        dispatcher=p.moe_token_dispatcher_type,
        sequence_parallel=p.sequence_parallel,
        stage_layers=tuple(sizes) if sizes is not None else None,
        use_distributed_optimizer=p.use_distributed_optimizer,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        bucket_elements=p.ddp_bucket_size,
        recompute=p.recompute_granularity or "none",
        recompute_method=p.recompute_method,
        recompute_num_layers=p.recompute_num_layers,
        recompute_modules=tuple(p.recompute_modules),
    )


def batch_of(config: RunConfig) -> Batch:
    """Return the batch of a run file."""
    s = config.schedule
    return Batch(config.data.seq_length, s.micro_batch_size, s.global_batch_size)


def precision_of(config: RunConfig) -> Precision:
    """Return the bytes per element of a run file."""
    wide = config.run.precision == "fp32"
    gradient = 4 if wide or config.parallel.grad_reduce_in_fp32 else 2
    matrices = 4 if config.optimizer.optimizer == "muon" else 8
    iterated = 2 if config.optimizer.muon_newton_schulz_dtype == "bf16" else 4
    return Precision(
        4 if wide else 2, gradient, master=0 if wide else 4, matrix_moments=matrices, newton_schulz=iterated
    )
