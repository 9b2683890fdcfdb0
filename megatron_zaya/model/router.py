"""The ZAYA router (arXiv 2605.05365, eqs. 1-5, and the released code): which expert, if any, a token goes to.

    r      = W_down x + b                  + scale * r of the layer before (depth averaging, EDA; not in layer 1)
    logits = W3 gelu(W2 gelu(W1 norm(r)))  over the experts and, last, the skip class
    chosen = argmax(softmax(logits) + balancing bias);   mixing weight = the unbiased probability of the chosen

The state handed on is r after the addition and before the norm. The balancing bias is a buffer, never a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_zaya.model.recompute import chosen_once
from megatron_zaya.model.residual import RMSNorm, mark_replicated
from megatron_zaya.model.transformer_config import ZayaTransformerConfig


@dataclass
class Routing:
    """What the router decided for T tokens."""

    prob_T: Tensor
    """Unbiased probability of the chosen class (differentiable)."""
    class_T: Tensor
    """Chosen class, int64; the number of experts means skip."""
    num_experts: int

    @property
    def skipped_T(self) -> Tensor:
        """True where no expert works on the token."""
        return self.class_T == self.num_experts

    def dispatch_maps(self) -> tuple[Tensor, Tensor]:
        """Return (probabilities [T, E], boolean map [T, E]) as Megatron-Core's token dispatchers take them.

        The row of a skipped token is empty.
        """
        map_TN = F.one_hot(self.class_T, self.num_experts + 1).bool()
        map_TE = map_TN[:, : self.num_experts].contiguous()
        return self.prob_T.unsqueeze(-1) * map_TE, map_TE


class Linear(nn.Linear):
    """A replicated product, marked for Megatron-Core's gradient reduction under sequence parallelism."""

    def __init__(self, config: ZayaTransformerConfig, size_in: int, size_out: int, bias: bool) -> None:
        super().__init__(size_in, size_out, bias=bias, dtype=config.params_dtype)
        mark_replicated(self, config)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: model/init.py fills every parameter."""


class ZayaRouter(MegatronModule):
    """Router of one layer, replicated on every rank."""

    def __init__(self, config: ZayaTransformerConfig, layer_number: int) -> None:
        super().__init__(config=config)
        width, classes = config.router_hidden_size, config.num_router_classes
        self.linear_down = Linear(config, config.hidden_size, width, bias=True)
        self.has_previous = layer_number > 1
        if self.has_previous:
            self.previous_scale = nn.Parameter(torch.empty(width, dtype=config.params_dtype))
            mark_replicated(self, config)
        self.norm = RMSNorm(config, width, eps=config.layernorm_epsilon)
        self.linear_1 = Linear(config, width, width, bias=True)
        self.linear_2 = Linear(config, width, width, bias=True)
        self.linear_out = Linear(config, width, classes, bias=False)
        bias = torch.zeros(classes, dtype=torch.float32)
        bias[-1] = config.skip_expert_bias
        self.register_buffer("balancing_bias", bias)
        self.micro_batch_counts: list[Tensor] = []
        """Tokens per class of each training forward pass since the last optimizer step, fp32."""
        self.chosen: Callable[[Tensor], Tensor] | None = None
        """Sees the choices [T] once per forward pass, and returns those that count; see train/router_replay.py."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ZayaRouter:
        """Move the buffers with the module, but never cast them: a bias step is below bf16's resolution."""
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    @property
    def tokens_per_class(self) -> Tensor:
        """Tokens per class since the last optimizer step, fp32."""
        return sum(self.micro_batch_counts, start=torch.zeros_like(self.balancing_bias))

    def forward(self, x_SBH: Tensor, previous_SBR: Tensor | None) -> tuple[Routing, Tensor]:
        """Route.

        Args:
            x_SBH: normed input of the mixture of experts.
            previous_SBR: router state of the layer before; None in the first layer.

        Returns:
            The routing of the S*B tokens, and the state [S, B, R] for the next layer.
        """
        state_SBR = self.linear_down(x_SBH)
        if self.has_previous:
            assert previous_SBR is not None, "every layer but the first needs the router state of the layer before"
            state_SBR = state_SBR + previous_SBR.to(state_SBR.dtype) * self.previous_scale
        hidden = F.gelu(self.linear_1(self.norm(state_SBR)))
        logits_SBN = self.linear_out(F.gelu(self.linear_2(hidden)))
        probs_TN = torch.softmax(self.config.widened("router", logits_SBN).flatten(0, 1), dim=-1)
        counting = self.training and torch.is_grad_enabled()
        class_T = chosen_once(lambda: self._choose(probs_TN.detach(), counting))
        prob_T = probs_TN.gather(1, class_T.unsqueeze(1)).squeeze(1)
        return Routing(prob_T, class_T, self.config.num_moe_experts), state_SBR

    def _choose(self, probs_TN: Tensor, counting: bool) -> Tensor:
        """Return the class of each token, and add them to the counts."""
        class_T = (probs_TN + self.balancing_bias).argmax(dim=-1)
        if self.chosen is not None:
            class_T = self.chosen(class_T)
        if counting:
            self.micro_batch_counts.append(torch.bincount(class_T, minlength=self.config.num_router_classes).float())
        return class_T
