"""What crosses a pipeline stage: the residual stream and the router state, as one tensor [S, B, H + R]."""

from __future__ import annotations

from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.distributed import ProcessGroup

from megatron_zaya.model.transformer_config import ZayaTransformerConfig


class ZayaP2PCommunicator(P2PCommunicator):
    """Megatron-Core's stage-to-stage communication with the last dimension widened by the router state."""

    def __init__(self, pp_group: ProcessGroup, config: ZayaTransformerConfig) -> None:
        super().__init__(pp_group, config)
        self.extra_width = config.router_hidden_size

    def _communicate(self, *, tensor_shape: Any, **kwargs: Any) -> Any:
        """Send and receive; the schedules ask with the shape of the hidden stream alone."""
        if tensor_shape is not None:
            *rows, hidden = tensor_shape
            tensor_shape = (*rows, hidden + self.extra_width)
        return super()._communicate(tensor_shape=tensor_shape, **kwargs)
