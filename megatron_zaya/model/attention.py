"""Causal grouped-query attention over whole sequences, full or in a sliding window; what is split goes elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_zaya.model.attention_derivatives import pair_blocks
from megatron_zaya.model.context_attention import attend_across
from megatron_zaya.model.transformer_config import ZayaTransformerConfig
from megatron_zaya.parallel.sequence import LocalSequence


def attend(q_SBQD: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, mask_ST: Tensor | None = None) -> Tensor:
    """Grouped-query attention through torch's fused kernels, causal unless a mask says what is seen: [S, B, Q, D]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBQD, k_TBKD, v_TBKD))
    grouped = q.shape[1] != k.shape[1]
    out_BQSD = F.scaled_dot_product_attention(q, k, v, mask_ST, is_causal=mask_ST is None, enable_gqa=grouped)
    return out_BQSD.permute(2, 0, 1, 3)


class CausalAttention(nn.Module):
    """Causal attention over all tokens, or over a sliding window of the last ``window`` ones (itself included)."""

    def __init__(self, config: ZayaTransformerConfig, layer_number: int) -> None:
        super().__init__()
        self.window = config.sliding_window if config.is_sliding(layer_number) else None
        self.cp_comm_type = config.cp_comm_type

    def forward(self, q_SBQD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, sequence: LocalSequence | None = None) -> Tensor:
        """Return [S, B, Q*D]; the logits are scaled by 1/sqrt(D).

        ``sequence`` says which rows the S are, and of which documents; None: whole sequences of one document.
        """
        if sequence is not None and not sequence.is_plain:
            return attend_across(q_SBQD, k_SBKD, v_SBKD, sequence, self.window, self.cp_comm_type).flatten(2)
        seq = len(q_SBQD)
        if self.window is None or self.window >= seq:
            return attend(q_SBQD, k_SBKD, v_SBKD).flatten(2)
        return attend_in_window(q_SBQD, k_SBKD, v_SBKD, self.window).flatten(2)


def attend_in_window(q_SBQD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, window: int) -> Tensor:
    """Attend in blocks of ``window`` tokens (W), each to itself and the block before: work grows with S, not S^2.

    The first block is causal; the others (n of them) share one mask and become batch entries.
    """
    seq, batch = q_SBQD.shape[:2]
    blocks = -(-seq // window) - 1
    padding = (0, 0, 0, 0, 0, 0, 0, (blocks + 1) * window - seq)
    q, k, v = (F.pad(x, padding) if padding[-1] else x for x in (q_SBQD, k_SBKD, v_SBKD))
    q_first, q_rest = q.split([window, blocks * window])
    (k_first, k_pairs), (v_first, v_pairs) = (pair_blocks(x, window) for x in (k, v))
    first = attend(q_first, k_first, v_first)

    query, key = torch.arange(window, device=q.device), torch.arange(2 * window, device=q.device)
    distance = query[:, None] + window - key
    mask = (distance >= 0) & (distance < window)
    rest = (q_rest.unflatten(0, (blocks, window)), k_pairs, v_pairs)
    rest = attend(*(x.transpose(0, 1).flatten(1, 2) for x in rest), mask)
    rest_SBQD = rest.unflatten(1, (blocks, batch)).transpose(0, 1).flatten(0, 1)
    return torch.cat([first, rest_SBQD])[:seq]
