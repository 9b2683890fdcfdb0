"""How long a step takes and where the time goes: passes of all micro-batches, bubbles, what overlap leaves, optimizer.

Per virtual stage the passes of one micro-batch are priced piece by piece (`layer_time`); the pipeline is then simulated
(`pipeline_time`). Gradient reduction hides behind the last backward pass and parameter gathering behind the first
forward pass as far as these reach (`reduction`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_zaya.plan.activations import Options, Tokens
from megatron_zaya.plan.collectives import hop_flows
from megatron_zaya.plan.hardware import Accelerator, Network
from megatron_zaya.plan.layer_time import Assumptions, StageTime, stage_times
from megatron_zaya.plan.memory import optimizer_bytes, optimizer_elements
from megatron_zaya.plan.muon import muon_s
from megatron_zaya.plan.parameters import active_parameters, rank_parameters
from megatron_zaya.plan.pipeline_time import busy_s, simulate
from megatron_zaya.plan.reduction import reduction_s
from megatron_zaya.plan.shape import Batch, Layout, ModelShape, Precision

MUON = "Muon"
"""Its products and its exchange, in `StepTime.parts`."""


@dataclass(frozen=True)
class StepTime:
    """One optimizer step of the slowest pipeline rank."""

    step_s: float
    parts: Mapping[str, float]
    """Seconds by cause; they add up to the step."""
    tokens_per_s: float
    flops_per_token: float
    """Of the model: six per active weight, and attention; recomputation does not count."""
    world_size: int
    peak_tflops: float

    @property
    def tokens_per_gpu_s(self) -> float:
        """Tokens per second and accelerator."""
        return self.tokens_per_s / self.world_size

    @property
    def tflops(self) -> float:
        """Model TFLOP/s per accelerator."""
        return self.tokens_per_gpu_s * self.flops_per_token / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the vendor's peak."""
        return self.tflops / self.peak_tflops


def model_flops_per_token(m: ModelShape, seq_length: int, *, whole_attention: bool = False) -> float:
    """Return forward and backward operations per token: 6 per active weight, and those of attention.

    Attention is 12 x width x length (Narayanan et al., arXiv 2104.04473, equation 3; Kaplan et al., arXiv 2001.08361),
    halved for the causal mask. ``whole_attention`` leaves it whole, as most published TFLOP/s do.
    """
    full = m.num_layers - m.num_sliding_layers
    window = min(m.sliding_window or seq_length, seq_length)
    attention = 6.0 * (m.q_width + m.v_width) / 2 * (full * seq_length + m.num_sliding_layers * 2 * window)
    return 6.0 * active_parameters(m) + (2 if whole_attention else 1) * attention


def _optimizer_s(
    m: ModelShape, layout: Layout, device: Accelerator, precision: Precision, assume: Assumptions, pp_rank: int
) -> float:
    """Read gradients, masters and moments, write masters, moments and parameters; zero gradients; norm."""
    parameters = rank_parameters(m, layout, pp_rank)
    own, state = sum(optimizer_elements(parameters, layout)), optimizer_bytes(parameters, layout, precision)
    passes = own * (2 * precision.gradient + precision.parameter) + 2 * state
    kernels = 1.0 if assume.fused_optimizer else 2.5
    return device.traffic_s(kernels * passes + parameters.total * precision.gradient)


def hop_time_s(m: ModelShape, layout: Layout, batch: Batch, network: Network, precision: Precision) -> float:
    """Return the time from one stage to the next."""
    flows = hop_flows(m, layout, Tokens.of(m, layout, batch, 1.0), precision, 1)
    return max((network.time_s(flow.op, flow.size_bytes, *flow.ranks) for flow in flows), default=0.0)


def plan_step_time(
    m: ModelShape,
    layout: Layout,
    batch: Batch,
    device: Accelerator,
    network: Network,
    *,
    precision: Precision | None = None,
    options: Options | None = None,
    assume: Assumptions | None = None,
) -> StepTime:
    """Return the predicted time of one optimizer step."""
    precision, options, assume = precision or Precision(), options or Options(), assume or Assumptions()
    times = stage_times(m, layout, batch, device, network, options, assume)
    micro = batch.microbatches(layout)
    _, idle = simulate(layout, micro, times, hop_time_s(m, layout, batch, network, precision))
    slowest = max(range(layout.pp), key=lambda rank: busy_s(layout, times, rank))
    whole = StageTime()
    for stage in range(slowest, layout.stages, layout.pp):
        whole.add(times[stage], micro)
    parts = {
        name: whole.forward.get(name, 0.0) + whole.backward.get(name, 0.0)
        for name in {**whole.forward, **whole.backward}
    }
    parts["pipeline bubbles and transfers"] = idle[slowest]
    parts |= reduction_s(m, layout, precision, network, times)
    parts["optimizer"] = _optimizer_s(m, layout, device, precision, assume, slowest)
    if precision.is_muon:
        parts[MUON] = muon_s(m, layout, precision, device, network, slowest)
    step = sum(parts.values())
    return StepTime(
        step_s=step,
        parts={name: seconds for name, seconds in parts.items() if seconds > 0},
        tokens_per_s=batch.tokens / step,
        flops_per_token=model_flops_per_token(m, batch.seq_length),
        world_size=layout.world_size,
        peak_tflops=device.peak_tflops,
    )
