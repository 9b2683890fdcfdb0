"""Memory of every pipeline stage: what is resident, what the passes add, when the peak comes, and how sure that is.

Three peaks, as in the dry run: construction (the gradient buffers are made beside the parameters), the forward and
backward passes, and the optimizer's step. Live tensors are modelled exactly enough to be held against the dry run;
what only the hardware shows (allocator, communication library, kernels, driver) are allowances with a spread, kept
apart and settable.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from math import erf, sqrt

from megatron_zaya.plan.activations import (
    Options,
    Tokens,
    boundary_bytes,
    embedding_footprint,
    head_footprint,
    layer_footprints,
    without_recomputed_parts,
)
from megatron_zaya.plan.parameters import Parameters, rank_parameters
from megatron_zaya.plan.schedule import alive_chunks
from megatron_zaya.plan.shape import Batch, Layout, ModelShape, Precision

GIB = float(2**30)


@dataclass(frozen=True)
class Allowances:
    """What no shape shows. Unverified without the hardware; each can be set (bytes, or a share of live tensors)."""

    driver_bytes: float = 1.5 * GIB
    """Context of the driver and loaded kernels, outside torch's allocator."""
    collectives_bytes: float = 2.0 * GIB
    """Buffers of the communication library, outside torch's allocator."""
    workspace_bytes: float = 0.25 * GIB
    """Scratch memory of matrix products and attention."""
    fragmentation: float = 0.04
    """Reserved by the allocator beyond live tensors, as a share of what the passes add."""
    relative_spread: float = 0.03
    """One standard deviation of the model of live tensors."""
    allowance_spread: float = 0.4
    """One standard deviation of the allowances together, as a share of them."""


@dataclass(frozen=True)
class StageMemory:
    """One pipeline rank. Bytes."""

    pp_rank: int
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for backward passes at the peak, all micro-batches in flight."""
    transient: float
    """Held at once beyond that at the peak: gradients on the way, logits."""
    boundary: float
    """Received from and sent to other stages, at the peak."""
    left_over: float
    """Alive between steps without being needed: inputs of stages, communication buffers."""
    construction_peak: float
    optimizer_peak: float
    microbatches_in_flight: float
    moment: str
    by_module: dict[str, float] = field(default_factory=dict)
    allowance: float = 0.0

    @property
    def resident(self) -> float:
        """Between steps."""
        return self.states + self.left_over

    @property
    def states(self) -> float:
        """Parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def step_peak(self) -> float:
        """Most live bytes in the forward and backward passes."""
        return self.states + self.activations + self.transient + self.boundary

    @property
    def peak(self) -> float:
        """Most live bytes at any time."""
        return max(self.step_peak, self.construction_peak, self.optimizer_peak)

    @property
    def total(self) -> float:
        """Peak with allowances: what the accelerator must have."""
        return self.peak + self.allowance

    def fit_probability(self, capacity_bytes: float, allowances: Allowances) -> float:
        """Return the probability that the stage stays within the capacity (normal spread, see `Allowances`)."""
        live = allowances.relative_spread * (self.peak - self.states) + 0.002 * self.states
        spread = sqrt(live**2 + (allowances.allowance_spread * self.allowance) ** 2)
        return 0.5 * (1 + erf((capacity_bytes - self.total) / (spread * sqrt(2)))) if spread else 1.0


@dataclass(frozen=True)
class Memory:
    """All pipeline ranks of a plan."""

    stages: tuple[StageMemory, ...]
    staging_host_bytes: float
    """Host memory of one rank while a checkpoint is copied out of the accelerator."""

    @property
    def worst(self) -> StageMemory:
        """The rank that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    def fit_probability(self, capacity_bytes: float, allowances: Allowances) -> float:
        """Return the probability that every rank fits; stages err together, so the worst one decides."""
        return min(stage.fit_probability(capacity_bytes, allowances) for stage in self.stages)


@dataclass
class _Chunk:
    """One virtual stage on a rank, per micro-batch."""

    kept: float
    modules: dict[str, float]
    backward: float
    """Largest transient of a layer's backward pass."""
    forward: float
    """Transient at the end of the forward pass."""
    turn: float
    """Transient at the start of a backward pass: the gradient that arrives, and two of the residual scaling's size."""
    tied: float
    """Gradient of a table that embedding and head share: it waits from the loss to the end of the backward pass."""
    embedding: float
    """Transient of the embedding's backward pass, when all else of the micro-batch is gone; 0 without one."""
    head: float
    """Transient of the loss; 0 without a head."""
    received: float
    sent: float


def _layer_bytes(
    m: ModelShape, layout: Layout, t: Tokens, options: Options, is_moe: bool
) -> tuple[dict[str, float], float]:
    """Return what one layer keeps, module by module, and the transient of its backward pass."""
    footprints = layer_footprints(m, layout, t, options, m.num_layers if is_moe else 0)
    if layout.recompute == "selective":
        footprints = without_recomputed_parts(footprints, m, layout, t)
    kept = {name: footprint.kept_bytes for name, footprint in footprints.items()}
    return kept, max(footprint.transient for footprint in footprints.values())


def _stage_bytes(
    m: ModelShape, layout: Layout, t: Tokens, options: Options, layers: range
) -> tuple[dict[str, float], float]:
    """Return what the layers of a virtual stage keep, by module, and the largest transient of a backward pass."""
    modules: dict[str, float] = {}
    largest = 0.0
    rerun, group, stream, routing = 0, 1, 0.0, 0.0
    if layout.recompute == "full":
        block = layout.recompute_method == "block"
        rerun = min(layout.recompute_num_layers, len(layers)) if block else len(layers)
        group = 1 if block else min(layout.recompute_num_layers, len(layers))
        wide = 4 if m.fp32_residual_connection else 2
        stream = wide * t.local * m.hidden_size
        inputs = stream + 2 * t.local * m.router_hidden_size
        # The first input is what the stage received or embedded.
        modules["inputs of recomputed layers"] = inputs * (-(-rerun // group) - 1) + 8 * t.local * rerun * m.is_zaya
        if m.is_zaya and layout.ep * layout.etp > 1:  # every dispatcher holds its last maps, probabilities and rows
            routing = (5 * m.num_moe_experts + 8) * t.local * rerun
    moe_layers = sum(m.is_moe_layer(index) for index in layers)
    kept_layers = len(layers) - rerun
    for is_moe, count in ((True, moe_layers), (False, len(layers) - moe_layers)):
        if not count:
            continue
        kept, transient = _layer_bytes(m, layout, t, options, is_moe)
        if rerun:
            # The last result is not needed again; all else is there when the residual scaling makes two gradients.
            scaling = 2 * stream if m.is_zaya else 0.0
            transient = max(transient, scaling) + routing + sum(kept.values()) * group - stream
        largest = max(largest, transient)
        for name, size in kept.items():
            modules[name] = modules.get(name, 0.0) + size * count * kept_layers / len(layers)
    return modules, largest


def _chunk(m: ModelShape, layout: Layout, t: Tokens, options: Options, precision: Precision, stage: int) -> _Chunk:
    sizes = layout.layers_of_stages(m.num_layers)
    first = sum(sizes[:stage])
    modules, backward = _stage_bytes(m, layout, t, options, range(first, first + sizes[stage]))
    is_first, is_last = stage == 0, stage == layout.stages - 1
    head = 0.0
    if is_first:
        modules["embedding"] = embedding_footprint(m, t).kept_bytes
    if is_last:
        footprint = head_footprint(m, layout, t, options)
        modules["head"], head = footprint.kept_bytes, footprint.transient
        if layout.recompute == "full":  # it is gone; in the place of the norm's tensors is a gradient
            backward -= footprint.kept.get("gathered input of the head", 0.0)
    crossing = boundary_bytes(m, t, precision) if layout.stages > 1 else 0.0
    wide = 4 if m.fp32_residual_connection else 2
    stream = wide * t.local * m.hidden_size
    if not is_last and m.is_zaya and layout.recompute == "none":
        modules["residual scaling"] -= stream  # what leaves the stage is a copy
    table = precision.parameter * m.vocab_size * m.hidden_size / layout.tp
    return _Chunk(
        kept=sum(modules.values()),
        modules=modules,
        backward=backward,
        forward=stream + 6 * t.local * m.router_hidden_size if m.is_zaya else 0.0,
        turn=crossing + 2 * stream if m.is_zaya and not is_last and layout.recompute != "full" else 0.0,
        embedding=table + 1.5 * stream if is_first else 0.0,
        tied=table if is_first and is_last and m.share_embeddings_and_output_weights else 0.0,
        head=head,
        received=0.0 if is_first else crossing,
        sent=0.0 if is_last else crossing,
    )


def optimizer_elements(parameters: Parameters, layout: Layout) -> tuple[float, float]:
    """Return the elements, dense and of experts, whose optimizer state is on this rank."""
    if not layout.use_distributed_optimizer:
        return parameters.dense, parameters.expert
    return parameters.dense / (layout.dp * layout.cp), parameters.expert / layout.edp


def _largest_fragment(parameters: Parameters, layout: Layout) -> tuple[float, float]:
    """Return the largest pieces of one tensor, dense and of experts, that this rank updates."""
    dense, expert = optimizer_elements(parameters, layout)
    return min(dense, parameters.largest_dense), min(expert, parameters.largest_expert)


def optimizer_bytes(parameters: Parameters, layout: Layout, precision: Precision) -> float:
    """Return the fp32 masters and moments of this rank."""
    dense, expert = optimizer_elements(parameters, layout)
    matrices = dense * parameters.dense_matrices / max(1, parameters.dense) + expert
    return (dense + expert) * (precision.master + precision.moments) - matrices * (
        precision.moments - precision.matrix_moments
    )


def _construction_peak(
    parameters: Parameters, layout: Layout, precision: Precision, optimizer: float, drawn: float
) -> float:
    """Return the peak while buffers and optimizer are made.

    The parameters exist, each drawn whole in fp32 (the largest is ``drawn`` bytes). A buffer for the dense ones and
    their gradients is filled, then the dense originals go; the same for the experts, chunk by chunk. Then come the
    fp32 copies and moments, one fragment at a time.
    """
    dense, expert, n = parameters.dense, parameters.expert, parameters.total
    own = precision.parameter if layout.use_distributed_optimizer else 0
    filled = (precision.parameter + precision.gradient) * n
    return max(
        precision.parameter * n + drawn,
        precision.parameter * n + (own + precision.gradient) * dense,
        filled + own * expert / layout.vp,
        filled + optimizer,
    )


def stage_memory(
    m: ModelShape,
    layout: Layout,
    batch: Batch,
    pp_rank: int,
    *,
    precision: Precision | None = None,
    options: Options | None = None,
    allowances: Allowances | None = None,
) -> StageMemory:
    """Return the memory of the ranks of pipeline rank ``pp_rank``."""
    precision, options, allowances = precision or Precision(), options or Options(), allowances or Allowances()
    parameters = rank_parameters(m, layout, pp_rank)
    t = Tokens.of(m, layout, batch, options.expert_load)
    chunks = [_chunk(m, layout, t, options, precision, stage) for stage in range(pp_rank, layout.stages, layout.pp)]
    microbatches = batch.microbatches(layout)
    alive, transient, moment = _worst_moment(chunks, layout, microbatches, pp_rank)
    kept = sum(count * chunk.kept for count, chunk in zip(alive, chunks, strict=True))
    by_module: dict[str, float] = {}
    for count, chunk in zip(alive, chunks, strict=True):
        for name, size in chunk.modules.items():
            by_module[name] = by_module.get(name, 0.0) + count * size
    weights, gradients = parameters.total * precision.parameter, parameters.total * precision.gradient
    optimizer = optimizer_bytes(parameters, layout, precision)
    scratch = 2 * 4 * max(_largest_fragment(parameters, layout))  # torch's Adam, one tensor after the other
    # The gathered sequence keeps its buffer; a stage keeps its last input and the gradient of it.
    held = 2 * t.attention * m.hidden_size if layout.tp > 1 and layout.sequence_parallel else 0.0
    left = held + sum(2 * chunk.received for chunk in chunks)
    has_table = pp_rank in (0, layout.pp - 1)
    drawn = 4.0 * m.vocab_size * m.hidden_size if has_table and m.is_zaya else 0.0
    live = StageMemory(
        pp_rank=pp_rank,
        parameters=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        transient=transient,
        boundary=held + sum(count * (c.received + c.sent) for count, c in zip(alive, chunks, strict=True)),
        left_over=left,
        construction_peak=_construction_peak(parameters, layout, precision, optimizer, drawn),
        optimizer_peak=weights + gradients + optimizer + left + scratch,
        microbatches_in_flight=sum(alive) / layout.vp,
        moment=moment,
        by_module=by_module,
    )
    added = live.peak - live.states
    allowance = (
        allowances.driver_bytes
        + (allowances.collectives_bytes if layout.world_size > 1 else 0.0)
        + allowances.workspace_bytes
        + allowances.fragmentation * added
    )
    return StageMemory(**{**live.__dict__, "allowance": allowance})


def _worst_moment(
    chunks: list[_Chunk], layout: Layout, microbatches: int, pp_rank: int
) -> tuple[tuple[int, ...], float, str]:
    """Return the live micro-batches per chunk, the transient and the name of the moment with the most bytes."""
    worst = (-1.0, (0,) * len(chunks), 0.0, "")
    states = alive_chunks(layout.pp, layout.vp, microbatches, pp_rank, layout.schedule)
    for alive in states:
        total = sum(n * (c.kept + c.received + c.sent) for n, c in zip(alive, chunks, strict=True))
        steady = microbatches * layout.vp > sum(alive)
        for count, chunk in zip(alive, chunks, strict=True):
            if not count:
                continue
            # Input, output and both gradients of the backward pass before are still referred to.
            stale = 2 * (chunk.received + chunk.sent) * steady
            moments = [
                (chunk.head + stale if chunk.head else 0.0, "loss"),
                (chunk.backward + chunk.tied + chunk.sent + stale / 2, "backward pass of the last layer"),
                (chunk.forward + stale, "end of a forward pass"),
                (chunk.turn, "start of a backward pass"),
                (
                    chunk.embedding + 2 * chunk.tied - chunk.kept if chunk.embedding else 0.0,
                    "backward pass of the embedding",
                ),
            ]
            transient, moment = max(moments)
            worst = max(worst, (total + transient, alive, transient, moment))
    return worst[1:]


def plan_memory(
    m: ModelShape,
    layout: Layout,
    batch: Batch,
    *,
    precision: Precision | None = None,
    options: Options | None = None,
    allowances: Allowances | None = None,
    ranks: Collection[int] | None = None,
) -> Memory:
    """Return the memory of every pipeline rank, or of some (the first, the second or the last needs most)."""
    stages = tuple(
        stage_memory(m, layout, batch, rank, precision=precision, options=options, allowances=allowances)
        for rank in (range(layout.pp) if ranks is None else sorted(ranks))
    )
    staging = max(stage.optimizer for stage in stages) + max(stage.parameters for stage in stages) / max(1, layout.dp)
    return Memory(stages, staging)
