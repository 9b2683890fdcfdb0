"""Which parallel layouts are legal, and which layers each pipeline stage holds. Pure arithmetic, no torch.

This is the one place that decides: a layout it accepts can be built, any other is refused before a process group is
made. Names are Megatron's: tensor (TP), pipeline (PP), context (CP), expert (EP) and expert-tensor (ETP) parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def _not_divided(name: str, value: int, by: int, what: str) -> list[str]:
    return [] if value % by == 0 else [f"{name}={value} is not divided by {what}={by}"]


def layout_problems(config: RunConfig, world_size: int) -> list[str]:
    """Return every reason why ``world_size`` ranks cannot run this layout; empty if they can."""
    p, m, s, d = config.parallel, config.model, config.schedule, config.data
    tp, pp, ep, etp = (
        p.tensor_model_parallel_size,
        p.pipeline_model_parallel_size,
        p.expert_model_parallel_size,
        p.expert_tensor_parallel_size,
    )
    vp = p.virtual_pipeline_model_parallel_size
    problems = []
    if p.context_parallel_size != 1:
        problems.append("context_parallel_size: context parallelism is not there yet; leave it at 1")
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
        problems += _not_divided("data.seq_length", d.seq_length, tp, "tensor_model_parallel_size")
    problems += _not_divided("model.num_moe_experts", m.num_moe_experts, ep, "expert_model_parallel_size")
    problems += _not_divided("model.moe_ffn_hidden_size", m.moe_ffn_hidden_size, etp, "expert_tensor_parallel_size")
    problems += _not_divided("world size", world_size, tp * pp * p.context_parallel_size, "tensor x pipeline x context")
    problems += _not_divided("world size", world_size, ep * etp * pp, "expert x expert-tensor x pipeline")
    sizes = p.pipeline_model_parallel_layout
    if sizes is not None and (len(sizes) != pp * (vp or 1) or sum(sizes) != m.num_layers):
        problems.append(
            f"pipeline_model_parallel_layout={sizes} must be {pp * (vp or 1)} stages with {m.num_layers} layers in all"
        )
    elif sizes is None and pp * (vp or 1) > m.num_layers:
        problems.append(f"{pp * (vp or 1)} pipeline stages for model.num_layers={m.num_layers}")
    if config.optimizer.optimizer == "muon" and not p.use_distributed_optimizer:
        problems.append("use_distributed_optimizer must be true with optimizer.optimizer=muon: its state is sharded")
    if vp is not None and pp == 1:
        problems.append("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
    data_parallel = max(1, world_size // (tp * pp * p.context_parallel_size))
    per_step = s.micro_batch_size * data_parallel
    problems += _not_divided(
        "schedule.global_batch_size", s.global_batch_size, per_step, "micro_batch_size x data-parallel size"
    )
    if vp is not None and not problems and (s.global_batch_size // per_step) % pp:
        problems.append(f"interleaving needs a multiple of {pp} micro-batches, not {s.global_batch_size // per_step}")
    return problems


def check_layout(config: RunConfig, world_size: int) -> None:
    """Refuse a layout that cannot run.

    Raises:
        ConfigError: names every reason.
    """
    problems = layout_problems(config, world_size)
    if problems:
        listed = "".join(f"\n  parallel: {problem}" for problem in problems)
        raise ConfigError(f"this layout cannot run on {world_size} ranks:{listed}")
