"""ZayaModel: embedding, layers, head and loss; one pipeline stage of them or all.

    tokens -> embedding -> (e + b) * s in fp32 -> layers (residual, router state) -> norm -> tied head -> loss

Between pipeline stages the two streams travel as one tensor [S, B, H + R] (see docs/adr/0002).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megatron_zaya.model.linear import ColumnParallelLinear
from megatron_zaya.model.loss import head_loss
from megatron_zaya.model.recompute import run_again_later
from megatron_zaya.model.residual import InputScaling, RMSNorm
from megatron_zaya.model.sharding import describe_shard, sharded_tensor
from megatron_zaya.model.transformer_config import ZayaTransformerConfig
from megatron_zaya.parallel.sequence import LocalSequence

EMBEDDING = "embedding.word_embeddings.weight"


class ZayaModel(LanguageModule):
    """The layers ``first_layer`` .. ``first_layer + num_local_layers - 1`` (0-based) with their stage's ends."""

    def __init__(
        self,
        config: ZayaTransformerConfig,
        layer_spec: ModuleSpec,
        vocab_size: int,
        max_sequence_length: int,
        pg_collection: ProcessGroupCollection,
        share_embeddings_and_output_weights: bool = True,
        pre_process: bool = True,
        post_process: bool = True,
        first_layer: int = 0,
        num_local_layers: int | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder  # Megatron-Core's schedules ask
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.first_layer = first_layer
        self.max_sequence_length = max_sequence_length
        self.stage_input: Tensor | None = None
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, vocab_size, max_sequence_length, position_embedding_type="rope", tp_group=pg_collection.tp
            )
            describe_shard(self.embedding.word_embeddings.weight, {0: pg_collection.tp})
            self.input_scaling = InputScaling(config)
        count = config.num_layers if num_local_layers is None else num_local_layers
        self.layers = nn.ModuleList(
            build_module(layer_spec, config=config, layer_number=first_layer + i + 1, pg_collection=pg_collection)
            for i in range(count)
        )
        self.rotary_full = self._rotary(config.rotary_base)
        self.rotary_sliding = self._rotary(config.sliding_rotary_base)
        if post_process:
            self.final_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and share_embeddings_and_output_weights,
                tp_group=pg_collection.tp,
            )
            if self.output_layer.weight is not None:
                describe_shard(self.output_layer.weight, {0: pg_collection.tp})
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def _rotary(self, base: float) -> RotaryEmbedding:
        return RotaryEmbedding(
            kv_channels=self.config.kv_channels,
            rotary_percent=self.config.rotary_percent,
            rotary_base=base,
            cp_group=self.pg_collection.cp,
        )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take the tensor [S, B, H + R] of the stage before; Megatron-Core's schedules call this."""
        self.stage_input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def _streams_in(self, input_ids: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.pre_process:
            return self.input_scaling(self.embedding(input_ids, position_ids)), None
        sizes = [self.config.hidden_size, self.config.router_hidden_size]
        x_SBH, router_state_SBR = self.stage_input.split(sizes, dim=-1)
        return x_SBH, router_state_SBR

    def _local_sequence(self, x_SBH: Tensor, cu_seqlens: Tensor | None) -> LocalSequence:
        rows = x_SBH.shape[0] * (self.tp_group.size() if self.config.sequence_parallel else 1)
        length = rows * self.cp_group.size()
        return LocalSequence.of(length, x_SBH.shape[1], self.cp_group, cu_seqlens, x_SBH.device)

    def _angles(self, rotary: RotaryEmbedding, sequence: LocalSequence) -> Tensor:
        """Return the rotary angles [S, B or 1, 1, rotated width] of the local tokens."""
        table = rotary(sequence.length, packed_seq=True)  # which leaves the choice of rows to us
        return table if sequence.is_plain else table[:, 0, 0][sequence.position_SB].unsqueeze(2)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            input_ids: [B, S] int64; S counts the tokens of this context-parallel rank.
            position_ids: [B, S]; accepted for Megatron's calling convention, RoPE counts positions itself.
            attention_mask: must be None; attention is causal, or a causal window.
            labels: [B, S] int64, or None.
            cu_seqlens: integers on the CPU, where documents start in the whole samples laid end to end, and their
                length: no token then sees another document. None: every sample is one document.

        Returns:
            On the last stage the loss of each token [B, S] in fp32 (with labels) or the logits [B, S, vocabulary]
            of this tensor-parallel rank; on other stages the tensor [S, B, H + R] for the next one.
        """
        assert attention_mask is None, "ZAYA's masks are causal; none is passed"
        x_SBH, router_state_SBR = self._streams_in(input_ids, position_ids)
        sequence = self._local_sequence(x_SBH, cu_seqlens)
        angles = {False: self._angles(self.rotary_full, sequence), True: self._angles(self.rotary_sliding, sequence)}

        def run(layers: range, x_SBH: Tensor, router_state_SBR: Tensor | None) -> tuple[Tensor, Tensor | None]:
            for index in layers:
                layer = self.layers[index]
                rotary = angles[self.config.is_sliding(layer.layer_number)]
                x_SBH, router_state_SBR = layer(x_SBH, router_state_SBR, rotary, sequence)
            return x_SBH, router_state_SBR

        for layers, rerun in self.config.recompute.layer_groups(len(self.layers)):
            streams = (layers, x_SBH, router_state_SBR)
            x_SBH, router_state_SBR = run_again_later(run, *streams) if rerun else run(*streams)
        if not self.post_process:
            return torch.cat([x_SBH, router_state_SBR.to(x_SBH.dtype)], dim=-1)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        x_SBH = self.final_layernorm(x_SBH)
        if labels is None:
            logits_SBV, _ = self.output_layer(x_SBH, weight=weight)
            return logits_SBV.transpose(0, 1).contiguous()
        loss = partial(
            head_loss,
            label_SB=labels.transpose(0, 1),
            workspace_bytes=self.config.loss_workspace_bytes,
            tp_group=self.tp_group,
            sequence_parallel=self.config.sequence_parallel,
            wide="loss" in self.config.fp32_islands,
        )
        loss_SB, _ = self.output_layer(x_SBH, weight=weight, loss=loss)
        return loss_SB.transpose(0, 1).contiguous()

    def global_name(self, name: str) -> str:
        """Translate a parameter or buffer name of this stage to the name in the whole model."""
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) + self.first_layer)
        is_tied_copy = name == "output_layer.weight" and self.share_embeddings_and_output_weights
        return EMBEDDING if is_tied_copy else ".".join(parts)

    def named_global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of this stage under their names in the whole model."""
        for name, parameter in self.named_parameters():
            yield self.global_name(name), parameter

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Describe parameters and persistent buffers to Megatron-Core's checkpoints, by global name."""
        assert not sharded_offsets, "the model is the top of the state"
        described = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if tensor is None:  # the empty extra state of Megatron-Core's linear layers
                continue
            tied_copy = name == "output_layer.weight" and self.share_embeddings_and_output_weights
            key = prefix + self.global_name(name)
            described[prefix + name] = sharded_tensor(key, tensor, self.pg_collection, copy=int(tied_copy))
        return described
