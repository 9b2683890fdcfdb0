"""The residual stream of ZAYA: RMSNorm into a sublayer, learned scales and biases back out of it, all in fp32.

Residual scaling (arXiv 2605.05365, in the form of the released code): with mixer output h and residual x,
x' = (h + b_h) * s_h + (x + b_x) * s_x, four learned vectors of width H per sublayer, started at s = 1 and b = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_zaya.model.derivatives import rms_norm, scaled_sum
from megatron_zaya.model.transformer_config import ZayaTransformerConfig


def mark_replicated(module: nn.Module, config: ZayaTransformerConfig) -> None:
    """Tell Megatron-Core that the parameters of ``module`` are replicated over tensor-parallel ranks.

    Under sequence parallelism each rank then sees a part of the tokens, so the gradients need a sum.
    """
    for parameter in module.parameters(recurse=False):
        parameter.sequence_parallel = config.sequence_parallel


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension; input is cast to the weight's type first (released code)."""

    def __init__(self, config: ZayaTransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.wide = "norm" in config.fp32_islands
        mark_replicated(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden]; the result has the weight's dtype."""
        return rms_norm(x.to(self.weight.dtype), self.weight, self.eps, self.wide)


class InputScaling(nn.Module):
    """(embedding + bias) * scale, before the first layer."""

    def __init__(self, config: ZayaTransformerConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
        mark_replicated(self, config)

    def forward(self, x_SBH: Tensor) -> Tensor:
        """Scale the embedding; the result has its dtype: that of the residual stream."""
        return (x_SBH + self.bias.to(x_SBH.dtype)) * self.scale.to(x_SBH.dtype)


class ResidualScaling(nn.Module):
    """x' = (h + b_h) * s_h + (x + b_x) * s_x on the fp32 residual stream."""

    def __init__(self, config: ZayaTransformerConfig) -> None:
        super().__init__()
        for name in ("hidden_scale", "hidden_bias", "residual_scale", "residual_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype)))
        mark_replicated(self, config)

    def forward(self, hidden_SBH: Tensor, residual_SBH: Tensor) -> Tensor:
        """Merge the output of a sublayer into the residual stream; the result has the residual's dtype."""
        wide = residual_SBH.dtype
        return scaled_sum(
            hidden_SBH.to(wide),
            self.hidden_scale.to(wide),
            self.hidden_bias.to(wide),
            residual_SBH,
            self.residual_scale.to(wide),
            self.residual_bias.to(wide),
        )
