"""The parallel layout that is to be placed: Megatron-Core's names, checked for arithmetic.

Accepts a plain plan YAML or a run YAML with a `parallel:` section. Invariant: a `Plan` has a world size that
its degrees divide; whether the fabric can carry it is `topology.legality`'s question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from topology.errors import TopologyError
from topology.yamlio import Document, parse, read

Degree = Annotated[int, Field(ge=1)]
TOKENS = ("tp", "cp", "ep", "dp", "pp")
_MODEL_KEYS = ("num_layers", "hidden_size", "seq_length", "moe_router_topk", "num_moe_experts")
_BATCH_KEYS = ("micro_batch_size", "global_batch_size")


class Workload(BaseModel):
    """What one step moves. Defaults are ZAYA1-8B (https://arxiv.org/abs/2511.17127).

    `dense_parameters` and `expert_parameters` count the whole model; `skew` is the load of the busiest
    expert rank over the mean (1 = perfectly balanced routing).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_layers: Degree = 40
    hidden_size: Degree = 2048
    vocab_size: Degree = 262272
    seq_length: Degree = 4096
    micro_batch_size: Degree = 1
    global_batch_size: Degree = 1024
    num_moe_experts: Degree = 16
    moe_router_topk: Degree = 1
    dense_parameters: Annotated[float, Field(ge=0)] = 0.85e9
    expert_parameters: Annotated[float, Field(ge=0)] = 8.05e9
    gradient_bytes: Degree = 4
    parameter_bytes: Degree = 2
    activation_bytes: Degree = 2
    skew: Annotated[float, Field(ge=1)] = 1.1


class Plan(BaseModel):
    """Degrees of one job. `nodes` x `gpus` may stand in for `world_size`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    world_size: Degree = 1
    tensor_model_parallel_size: Degree = 1
    pipeline_model_parallel_size: Degree = 1
    virtual_pipeline_model_parallel_size: Degree | None = None
    context_parallel_size: Degree = 1
    hierarchical_context_parallel_sizes: list[Degree] | None = None
    hybrid_context_parallel: bool = False
    expert_model_parallel_size: Degree = 1
    expert_tensor_parallel_size: Degree | None = None
    num_distributed_optimizer_instances: Degree = 1
    use_distributed_optimizer: bool = True
    order: str = "tp-cp-ep-dp-pp"
    workload: Workload = Workload()

    @model_validator(mode="before")
    @classmethod
    def _world_from_nodes(cls, data: Any) -> Any:
        if isinstance(data, dict) and ("nodes" in data or "gpus" in data):
            data = dict(data)
            size = int(data.pop("nodes", 1)) * int(data.pop("gpus", 8))
            if data.setdefault("world_size", size) != size:
                raise ValueError(f"world_size {data['world_size']} is not nodes x gpus = {size}")
        return data

    @model_validator(mode="after")
    def _arithmetic(self) -> Plan:
        world, pp = self.world_size, self.pp
        tokens = self.order.lower().split("-")
        if len(set(tokens)) != len(tokens) or any(token not in TOKENS for token in tokens):
            raise ValueError(f"order {self.order!r} must name each of {'-'.join(TOKENS)} at most once")
        for name, size in (("tp", self.tp), ("cp", self.cp), ("dp", 2), ("pp", pp), ("ep", self.ep)):
            if size != 1 and name not in tokens:
                raise ValueError(f"order {self.order!r} does not name {name}")
        if world % (self.tp * self.cp * pp):
            raise ValueError(f"world_size {world} is not divisible by tp*cp*pp = {self.tp * self.cp * pp}")
        if world % (self.etp * self.ep * pp):
            raise ValueError(f"world_size {world} is not divisible by etp*ep*pp = {self.etp * self.ep * pp}")
        if tokens[-1] != "pp" and pp > 1 and self.dp != self.edp:
            raise ValueError("an order that does not end in pp needs equal dense and expert data parallel sizes")
        if self.virtual_pipeline_model_parallel_size is not None and pp == 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
        instances = self.num_distributed_optimizer_instances
        if (self.dp * self.cp) % instances or self.edp % instances:
            raise ValueError(f"num_distributed_optimizer_instances {instances} must divide dp*cp and expert dp")
        if self.hybrid_context_parallel and (self.dp * self.cp) & (self.dp * self.cp - 1):
            raise ValueError(f"hybrid_context_parallel needs dp*cp to be a power of two, not {self.dp * self.cp}")
        levels = self.hierarchical_context_parallel_sizes
        if levels:
            product = 1
            for level in levels:
                product *= level
            if product != self.cp:
                raise ValueError(f"hierarchical_context_parallel_sizes multiply to {product}, not cp = {self.cp}")
        return self

    @property
    def tp(self) -> int:
        """Tensor parallel size."""
        return self.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline parallel size."""
        return self.pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        """Context parallel size."""
        return self.context_parallel_size

    @property
    def ep(self) -> int:
        """Expert parallel size."""
        return self.expert_model_parallel_size

    @property
    def etp(self) -> int:
        """Expert tensor parallel size; the tensor parallel size unless given."""
        return self.expert_tensor_parallel_size or self.tp

    @property
    def dp(self) -> int:
        """Data parallel size of the dense part, without context parallelism."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data parallel size of the experts."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def describe(self) -> str:
        """The layout on one line."""
        return (
            f"world {self.world_size}: tp{self.tp} cp{self.cp} pp{self.pp} dp{self.dp} ep{self.ep} "
            f"etp{self.etp} edp{self.edp}, order {self.order}"
        )

    def resized(self, world_size: int) -> Plan:
        """The same degrees at another world size. Raises ValueError when they do not divide it."""
        return Plan.model_validate({**self.model_dump(), "world_size": world_size})


def load_plan(path: Path, world_size: int) -> Plan:
    """Read a plan or a run YAML; `world_size` is used when the file does not say one.

    Raises:
        TopologyError: the file is malformed or its degrees do not divide the world; names the line.
    """
    return plan_from_document(read(path), world_size)


def plan_from_text(text: str, world_size: int, name: str = "<plan>") -> Plan:
    """Like `load_plan` from text."""
    return plan_from_document(parse(text, name), world_size)


def plan_from_document(document: Document, world_size: int) -> Plan:
    """Like `load_plan` from a parsed document."""
    data = document.data
    if "parallel" in data:
        data = _from_run(document)
        document = Document(document.name, data, _run_lines(document))
    if not {"world_size", "nodes"} & set(data):
        document = Document(document.name, {**data, "world_size": world_size}, document.lines)
    return document.validate(Plan)


def _from_run(document: Document) -> dict[str, Any]:
    """Pick Megatron's parallel names and the sizes that matter from a whole run file; ignore the rest."""
    run = document.data
    parallel = run["parallel"]
    if not isinstance(parallel, dict):
        raise document.error(("parallel",), "section 'parallel' must be a mapping", value=parallel)
    known = set(Plan.model_fields) | {"nodes", "gpus"}
    plan = {key: value for key, value in parallel.items() if key in known and value is not None}
    workload = dict(plan.get("workload", {}))
    for section in ("model", "data", "run", "schedule", "parallel"):
        values = run.get(section)
        if isinstance(values, dict):
            found = {k: v for k, v in values.items() if k in _MODEL_KEYS + _BATCH_KEYS and isinstance(v, int)}
            workload = {**found, **workload}
    if workload:
        plan["workload"] = workload
    return plan


def _run_lines(document: Document) -> dict[tuple[str | int, ...], int]:
    lines = {path[1:]: line for path, line in document.lines.items() if path[:1] == ("parallel",)}
    return lines or document.lines


def require_world(plan: Plan, gpus: int) -> None:
    """Raise TopologyError when the plan wants more ranks than `gpus`."""
    if plan.world_size > gpus:
        raise TopologyError(
            f"the plan wants {plan.world_size} ranks but only {gpus} GPUs are usable",
            value=plan.world_size,
            remedy="lower world_size, repair nodes, or place with --shrink",
        )
