"""The optimizer table of a run: every parameter of the whole model, its shape, where it goes and why. No weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch.distributed import ProcessGroup

from megatron_zaya.compat.meta import accelerator_on_meta, fake_world
from megatron_zaya.config import RunConfig
from megatron_zaya.config.sections import ParallelConfig
from megatron_zaya.model.sharding import is_expert
from megatron_zaya.optim.rules import Rule, rule_for


@dataclass(frozen=True)
class Row:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    is_expert: bool
    rule: Rule

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """Logical matrices that Muon orthogonalises one by one; 0 for AdamW."""
        return math.prod(self.shape[:-2]) * self.rule.row_parts if self.rule.algorithm == "muon" else 0


def optimizer_table(config: RunConfig) -> list[Row]:
    """Return a row per parameter, in the order of the model. Needs no world and no memory for weights."""
    from megatron_zaya.parallel.groups import build_process_groups, release_process_groups
    from megatron_zaya.train.setup import build_stages

    whole = config.model_copy(update={"parallel": ParallelConfig()})
    with accelerator_on_meta() as device, fake_world(0, 1):
        pg_collection = build_process_groups(whole.parallel, seed=0)
        with torch.device(device):
            (model,) = build_stages(whole, pg_collection)
        rows = [
            Row(name, tuple(p.shape), is_expert(p), rule_for(name, config.optimizer.optimizer))
            for name, p in model.named_global_parameters()
        ]
        release_process_groups()
    return rows


def rows_of(model: Sequence[DistributedDataParallel], optimizer: str, pp_group: ProcessGroup) -> list[Row]:
    """Return a row per parameter of a model that is being trained. Collective over the pipeline stages."""
    described = [tensor for chunk in model for tensor in chunk.module.sharded_state_dict().values()]
    own = [t for t in described if t.data.requires_grad and t.replica_id[0] == 0]  # 1: second copy of a tied embedding
    rows = [Row(t.key, tuple(t.global_shape), is_expert(t.data), rule_for(t.key, optimizer)) for t in own]
    stages: list[Any] = [None] * pp_group.size()
    torch.distributed.all_gather_object(stages, rows, group=pp_group)
    return [row for stage in stages for row in stage]


def text(rows: list[Row]) -> str:
    """Return the table as text; equal parameters of all layers are one line."""
    table = [("parameter", "shape", "optimizer", "matrices", "decay", "why"), *_lines(rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([*body, "", summary(rows), ""])


def _lines(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    layers: dict[Row, int] = {}
    for row in rows:
        same = replace(row, name=re.sub(r"^layers\.\d+\.", "layers.*.", row.name))
        layers[same] = layers.get(same, 0) + 1
    for row, count in layers.items():
        times = f"{count} x " if count > 1 else ""
        shape = " x ".join(map(str, row.shape))
        matrices = f"{times}{row.matrices}" if row.matrices else ""
        decay = "yes" if row.rule.weight_decay else "no"
        yield times + row.name, shape, row.rule.algorithm, matrices, decay, row.rule.why


def summary(rows: list[Row]) -> str:
    """Return one line: how many elements go to which optimizer."""
    muon = sum(row.numel for row in rows if row.rule.algorithm == "muon")
    matrices = sum(row.matrices for row in rows)
    rest = sum(row.numel for row in rows) - muon
    return f"Muon: {muon:,} elements in {matrices:,} matrices; AdamW: {rest:,} elements"
