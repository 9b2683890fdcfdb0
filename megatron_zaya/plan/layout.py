"""Which parallel layouts are legal, and which layers each pipeline stage holds. Pure arithmetic, no torch.

This is the one place that decides: a layout it accepts can be built, any other is refused before a process group is
made. Names are Megatron's: tensor (TP), pipeline (PP), context (CP), expert (EP) and expert-tensor (ETP) parallel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_zaya.config import ConfigError, RunConfig


@dataclass(frozen=True)
class Stage:
    """A run of consecutive layers that one (virtual) pipeline stage holds."""

    first_layer: int
    """0-based."""
    num_layers: int


def pipeline_stages(config: RunConfig) -> list[Stage]:
    """Return the stages in the order a token passes them; rank r holds the stages r, r + PP, r + 2 PP, ...

    Without an explicit `pipeline_model_parallel_layout` the layers are spread evenly, longer stages first.
    """
    parallel, layers = config.parallel, config.model.num_layers
    count = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    sizes = parallel.pipeline_model_parallel_layout
    if sizes is None:
        sizes = [layers // count + (index < layers % count) for index in range(count)]
    first = [sum(sizes[:index]) for index in range(len(sizes))]
    return [Stage(start, size) for start, size in zip(first, sizes, strict=True)]


def layout_problems(config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> list[str]:
    """Return every reason why ``world_size`` ranks cannot run this layout; empty if they can.

    With ``ranks_per_node`` the groups that need the fabric inside a node are held to it as well.
    """
    problems = [*_split_problems(config), *_world_problems(config, world_size), *_stage_problems(config)]
    if ranks_per_node is not None and world_size > ranks_per_node:
        problems += _node_problems(config, ranks_per_node)
    return problems or _batch_problems(config, world_size)


def _not_divided(name: str, value: int, by: int, what: str) -> list[str]:
    return [] if value % by == 0 else [f"{name}={value} is not divided by {what}={by}"]


def _context_problems(config: RunConfig) -> list[str]:
    """Return why the sequence cannot be cut in two chunks per context-parallel rank."""
    size, length, model = config.parallel.context_parallel_size, config.data.seq_length, config.model
    if size == 1:
        return []
    problems = _not_divided("data.seq_length", length, 2 * size, "2 x context_parallel_size")
    reach = max(model.cca_time0 + model.cca_time1 - 2, 1)
    if length // (2 * size) < reach:
        problems.append(
            f"data.seq_length={length} in {2 * size} chunks: a chunk must have at least the {reach} tokens that the "
            "convolutions (cca_time0, cca_time1) and the value look back"
        )
    return problems


def _split_problems(config: RunConfig) -> list[str]:
    """Return which tensors or sequences cannot be cut as asked."""
    p, m, d = config.parallel, config.model, config.data
    tp, ep, etp = p.tensor_model_parallel_size, p.expert_model_parallel_size, p.expert_tensor_parallel_size
    problems = []
    problems += _context_problems(config)
    problems += _not_divided("model.num_attention_heads", m.num_attention_heads, tp, "tensor_model_parallel_size")
    if m.num_query_groups % tp and tp % m.num_query_groups:
        problems.append(
            f"model.num_query_groups={m.num_query_groups} and tensor_model_parallel_size={tp}: one must divide the "
            "other; with more ranks than key-value heads, equally many ranks hold each head"
        )
    problems += _not_divided("model.vocab_size", m.vocab_size, tp, "tensor_model_parallel_size")
    if tp > 1 and not p.sequence_parallel:
        problems.append(
            "sequence_parallel must be true with tensor_model_parallel_size > 1: experts see each token once"
        )
    if p.sequence_parallel:
        problems += _not_divided("data.seq_length", d.seq_length, tp * p.context_parallel_size, "tensor x context")
    problems += _not_divided("model.num_moe_experts", m.num_moe_experts, ep, "expert_model_parallel_size")
    problems += _not_divided("model.moe_ffn_hidden_size", m.moe_ffn_hidden_size, etp, "expert_tensor_parallel_size")
    if config.optimizer.optimizer == "muon" and not p.use_distributed_optimizer:
        problems.append("use_distributed_optimizer must be true with optimizer.optimizer=muon: its state is sharded")
    return problems


def _world_problems(config: RunConfig, world_size: int) -> list[str]:
    """Return which products of sizes do not divide the world."""
    p = config.parallel
    dense = p.tensor_model_parallel_size * p.context_parallel_size * p.pipeline_model_parallel_size
    expert = p.expert_model_parallel_size * p.expert_tensor_parallel_size * p.pipeline_model_parallel_size
    return [
        *_not_divided("world size", world_size, dense, "tensor x pipeline x context"),
        *_not_divided("world size", world_size, expert, "expert x expert-tensor x pipeline"),
    ]


def _stage_problems(config: RunConfig) -> list[str]:
    """Return why the layers cannot be dealt out to the pipeline stages."""
    p, layers = config.parallel, config.model.num_layers
    sizes, virtual = p.pipeline_model_parallel_layout, p.virtual_pipeline_model_parallel_size
    count = p.pipeline_model_parallel_size * (virtual or 1)
    problems = []
    if sizes is not None and (len(sizes) != count or sum(sizes) != layers):
        problems.append(f"pipeline_model_parallel_layout={sizes} must be {count} stages with {layers} layers in all")
    elif sizes is None and count > layers:
        problems.append(f"{count} pipeline stages for model.num_layers={layers}")
    if virtual is not None and p.pipeline_model_parallel_size == 1:
        problems.append("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
    return problems


def _node_problems(config: RunConfig, ranks_per_node: int) -> list[str]:
    """Return which groups would leave the node, or leave it in a way that a rails-only fabric cannot carry.

    Tensor-parallel groups exchange activations several times a layer: they stay inside a node. The others may span
    nodes, but whole ones: then each rank has a partner on its own rail wherever the traffic goes.
    """
    p = config.parallel
    tp, etp = p.tensor_model_parallel_size, p.expert_tensor_parallel_size
    inside = {"tensor_model_parallel_size": tp, "expert_tensor_parallel_size": etp}
    whole = {
        "tensor x context": tp * p.context_parallel_size,
        "expert x expert-tensor": etp * p.expert_model_parallel_size,
    }
    leaves = [
        f"{name}={size} does not divide the {ranks_per_node} ranks of a node: such a group must stay inside one"
        for name, size in inside.items()
        if ranks_per_node % size
    ]
    straddles = [
        f"{name}={size} is neither a divisor nor a multiple of the {ranks_per_node} ranks of a node: "
        "its groups would share nodes, and their traffic would cross rails"
        for name, size in whole.items()
        if ranks_per_node % size and size % ranks_per_node
    ]
    return leaves or straddles


def _batch_problems(config: RunConfig, world_size: int) -> list[str]:
    """Return why the global batch cannot be dealt out, for a layout that is legal otherwise."""
    p, s = config.parallel, config.schedule
    pp = p.pipeline_model_parallel_size
    per_step = s.micro_batch_size * (world_size // (p.tensor_model_parallel_size * pp * p.context_parallel_size))
    if s.global_batch_size % per_step:
        return _not_divided(
            "schedule.global_batch_size", s.global_batch_size, per_step, "micro_batch_size x data-parallel size"
        )
    for size in (s.rampup_batch_size or [])[:2]:
        if size % per_step:
            return _not_divided("schedule.rampup_batch_size", size, per_step, "micro_batch_size x data-parallel size")
    micro_batches = s.global_batch_size // per_step
    if p.virtual_pipeline_model_parallel_size is not None and micro_batches % pp:
        return [f"interleaving needs a multiple of {pp} micro-batches, not {micro_batches}"]
    return []


def nearest_layouts(
    config: RunConfig, world_size: int, ranks_per_node: int | None = None, count: int = 3
) -> list[dict[str, Any]]:
    """Return up to ``count`` legal layouts for this world, as changes of the `parallel` section, nearest first.

    Near means few doublings and halvings of the sizes. Model, batch and sequence stay as they are.
    """
    ranked = sorted(_neighbours(config, world_size), key=lambda changes: _distance(config, changes))
    found: list[dict[str, Any]] = []
    for changes in ranked:
        changed = config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})
        if not layout_problems(changed, world_size, ranks_per_node):
            found.append({name: value for name, value in changes.items() if value != getattr(config.parallel, name)})
            if len(found) == count:
                break
    return found


SIZES = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _neighbours(config: RunConfig, world_size: int) -> Iterator[dict[str, Any]]:
    """Yield every way to cut the world, with what must change along with the sizes."""
    p, m = config.parallel, config.model
    world, expert = _divisors(world_size), [size for size in _divisors(m.num_moe_experts) if size <= world_size]
    for tp, cp, pp in itertools.product(
        [size for size in world if m.num_attention_heads % size == 0],
        world if p.context_parallel_size > 1 else [1],
        [size for size in world if size <= m.num_layers],
    ):
        if world_size % (tp * cp * pp):
            continue
        same_stages = pp == p.pipeline_model_parallel_size
        for ep, etp in itertools.product(expert, {1, tp}):
            yield {
                **dict(zip(SIZES, (tp, cp, pp, ep, etp), strict=True)),
                "sequence_parallel": tp > 1 or p.sequence_parallel,
                "pipeline_model_parallel_layout": p.pipeline_model_parallel_layout if same_stages else None,
                "virtual_pipeline_model_parallel_size": p.virtual_pipeline_model_parallel_size if pp > 1 else None,
            }


def _distance(config: RunConfig, changes: dict[str, Any]) -> float:
    return sum(abs(math.log2(changes[name] / getattr(config.parallel, name))) for name in SIZES)


def check_layout(config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> None:
    """Refuse a layout that cannot run.

    Raises:
        ConfigError: names every reason, and the nearest layouts that can.
    """
    problems = layout_problems(config, world_size, ranks_per_node)
    if not problems:
        return
    lines = [f"this layout cannot run on {world_size} ranks:", *(f"  parallel: {problem}" for problem in problems)]
    nearest = nearest_layouts(config, world_size, ranks_per_node)
    if nearest:
        lines.append("nearest layouts that can:")
        lines += ["  " + " ".join(f"parallel.{k}={_as_yaml(v)}" for k, v in changes.items()) for changes in nearest]
    else:
        lines.append("no other cut of these ranks helps: change the world, the batch sizes or the model")
    raise ConfigError("\n".join(lines))


def _as_yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()
