"""How long a step takes and where the time goes: passes of all micro-batches, bubbles, what overlap leaves, optimizer.

Per virtual stage the passes of one micro-batch are priced piece by piece (`layer_time`); the pipeline is then simulated
(`pipeline_time`). Gradient reduction hides behind the last backward pass and parameter gathering behind the first
forward pass as far as these reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_zaya.plan.activations import Options, Tokens
from megatron_zaya.plan.collectives import Flow, data_parallel_flows, hop_flows
from megatron_zaya.plan.hardware import Accelerator, Network
from megatron_zaya.plan.layer_time import Assumptions, StageTime, stage_times
from megatron_zaya.plan.parameters import active_parameters, rank_parameters
from megatron_zaya.plan.pipeline_time import busy_s, simulate
from megatron_zaya.plan.shape import Batch, Layout, ModelShape, Precision

OVERLAP = 0.85
"""Share of a pass behind which reductions can hide: the first bucket must be full before anything is sent."""


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


def model_flops_per_token(m: ModelShape, seq_length: int) -> float:
    """Return forward and backward operations per token: 6 per active weight, 12 x width x length / 2 of attention.

    Source: Kaplan et al., arXiv 2001.08361, with the attention term of Narayanan et al., arXiv 2104.04473, halved
    for the causal mask.
    """
    full = m.num_layers - m.num_sliding_layers
    window = min(m.sliding_window or seq_length, seq_length)
    attention = 6.0 * (m.q_width + m.v_width) / 2 * (full * seq_length + m.num_sliding_layers * 2 * window)
    return 6.0 * active_parameters(m) + attention


def _optimizer_s(
    m: ModelShape, layout: Layout, device: Accelerator, precision: Precision, assume: Assumptions, pp_rank: int
) -> float:
    """Read gradients, masters and moments, write masters, moments and parameters; zero gradients; norm."""
    parameters = rank_parameters(m, layout, pp_rank)
    own = (
        parameters.dense / (layout.dp * layout.cp) + parameters.expert / layout.edp
        if layout.use_distributed_optimizer
        else parameters.total
    )
    per_element = 2 * precision.gradient + 2 * (precision.master + precision.moments) + precision.parameter
    passes = per_element if assume.fused_optimizer else 2.5 * per_element
    seconds = device.traffic_s(own * passes + parameters.total * precision.gradient)
    if precision.matrix_moments < precision.moments:  # Muon: five Newton-Schulz steps of three products
        seconds += _newton_schulz_s(m, layout, device, own / max(1, parameters.total))
    return seconds


def _newton_schulz_s(m: ModelShape, layout: Layout, device: Accelerator, share: float) -> float:
    h, f = m.hidden_size, m.moe_ffn_hidden_size or m.ffn_hidden_size
    short, long = min(h, f), max(h, f)
    one = 5 * (2 * device.product_s(short, long, short) + device.product_s(short, short, short))
    matrices = 3 * m.num_layers * max(1, m.num_moe_experts) / (layout.pp * layout.ep)
    return one * matrices * share


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
    parts |= _once_a_step(m, layout, precision, network, times)
    parts["optimizer"] = _optimizer_s(m, layout, device, precision, assume, slowest)
    step = sum(parts.values())
    return StepTime(
        step_s=step,
        parts={name: seconds for name, seconds in parts.items() if seconds > 0},
        tokens_per_s=batch.tokens / step,
        flops_per_token=model_flops_per_token(m, batch.seq_length),
        world_size=layout.world_size,
        peak_tflops=device.peak_tflops,
    )


def _once_a_step(
    m: ModelShape, layout: Layout, precision: Precision, network: Network, times: list[StageTime]
) -> dict[str, float]:
    """Return what the data-parallel collectives cost beyond what the passes hide."""
    flows = data_parallel_flows(m, layout, precision, 0)
    backward, forward = (
        sum(side) / layout.pp for side in zip(*((t.backward_s, t.forward_s) for t in times), strict=True)
    )
    return {
        "gradients, exposed": exposed_s(flows_s(flows, "gradients", network), backward, layout.overlap_grad_reduce),
        "parameters, exposed": exposed_s(flows_s(flows, "parameters", network), forward, layout.overlap_param_gather),
        "tied and replicated gradients": flows_s(flows, "end", network),
    }


def flows_s(flows: Iterable[Flow], where: str, network: Network) -> float:
    """Return the time of all calls of one kind, one after the other: dense and expert groups share the links."""
    return sum(f.calls * network.time_s(f.op, f.size_bytes, *f.ranks) for f in flows if f.where == where)


def exposed_s(total_s: float, behind_s: float, overlap: bool) -> float:
    """Return what a pass of ``behind_s`` does not hide."""
    return max(0.0, total_s - OVERLAP * behind_s) if overlap else total_s
