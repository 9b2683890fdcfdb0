"""The bandwidth a healthy cluster shows, with the thresholds that a preflight check uses.

`pass` is the predicted bus bandwidth less a margin for run-to-run noise; below `fail` something is broken
(a NIC missing from a row of eight costs 12 %). Invariant: rates are bus bandwidth in GB/s as rccl-tests
print it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from topology.cost import CostModel, GroupShape, bus_factor
from topology.fabric import Fabric

PASS_SHARE, FAIL_SHARE = 0.92, 0.80
SIZES_BYTES = tuple(1 << power for power in (20, 24, 28, 30, 33))
OPS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all_relay", "send_recv")


@dataclass(frozen=True)
class Expectation:
    """One row: what to measure, the prediction, and the two thresholds."""

    op: str
    nodes: int
    per_node: int
    size_bytes: int
    time_us: float
    bus_gb_per_s: float
    pass_gb_per_s: float
    fail_gb_per_s: float


def expected_bandwidth(fabric: Fabric, nodes: tuple[int, ...] | None = None) -> list[Expectation]:
    """Expectations for 1, 2, 4, ... nodes up to the cluster; also single-rail rows of one GPU per node."""
    if nodes is None:
        nodes = tuple(n for n in (1, 2, 4, 8, 16, 32, 64, 128, fabric.nodes) if n <= fabric.nodes)
    model = CostModel.for_fabric(fabric)
    rows = []
    per_leaf = fabric.spec.rails.nodes_per_leaf
    for count in sorted(set(nodes)):
        for per_node in (fabric.gpus_per_node, 1):
            if count * per_node == 1:
                continue
            leaves = -(-count // per_leaf)
            shape = GroupShape(count, per_node, leaves if leaves > 1 else 0)
            for op in OPS:
                if op == "send_recv" and (per_node > 1 or count != 2):
                    continue
                rows += [_row(model, op, shape, size) for size in SIZES_BYTES]
    return rows


def _row(model: CostModel, op: str, shape: GroupShape, size_bytes: int) -> Expectation:
    seconds = model.time(op, size_bytes, shape)
    rate = size_bytes * bus_factor(op, shape.ranks) / seconds / 1e9
    return Expectation(
        op,
        shape.nodes,
        shape.per_node,
        size_bytes,
        round(seconds * 1e6, 2),
        round(rate, 3),
        round(rate * PASS_SHARE, 3),
        round(rate * FAIL_SHARE, 3),
    )


def as_records(rows: list[Expectation]) -> list[dict[str, object]]:
    """Rows for JSON."""
    return [asdict(row) for row in rows]
