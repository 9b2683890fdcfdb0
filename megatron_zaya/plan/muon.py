"""What Muon adds to a step: Newton-Schulz products, and the exchange of matrices that the shards of ZeRO-1 cut.

ZeRO-1 cuts each bucket into equal chunks, so a matrix lies on one, two or many ranks. Whoever owns it gets the pieces
in one all-to-all and returns the result in another, while it iterates on the matrix before (`optim/exchange.py`).
Where the cuts fall is decided by the buckets; here every rank is given the mean of what the holders exchange.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from megatron_zaya.plan.collectives import bucket_elements, group
from megatron_zaya.plan.hardware import Accelerator, Network
from megatron_zaya.plan.shape import Layout, ModelShape

STEPS = 5
"""Newton-Schulz iterations (arXiv 2511.17127, section V)."""


class Matrices(NamedTuple):
    """Equal logical matrices of one pipeline rank, and the ranks among which they are shared out."""

    number: float
    rows: float
    columns: float
    ranks: tuple[int, int]
    """Stride and size of the group."""
    chunk: float
    """Elements of a bucket that one rank keeps."""
    split: int = 1
    """Ranks of the group that hold a slab of each matrix whatever the cuts: tensor parallelism."""

    @property
    def elements(self) -> float:
        """Of one matrix."""
        return self.rows * self.columns

    @property
    def cut_share(self) -> float:
        """Share of the matrices that lie on several ranks."""
        if self.split > 1 or self.chunk < self.elements:
            return 1.0
        return 0.0 if self.chunk % self.elements == 0 else self.elements / self.chunk


def hidden_matrices(m: ModelShape, layout: Layout) -> list[Matrices]:
    """Return what Muon trains on one pipeline rank; matrices of attention and routers as two of their mean sizes."""
    h, layers, dense = m.hidden_size, m.num_layers / layout.pp, layout.dp * layout.cp
    bucket = bucket_elements(layout)
    found = []
    stride, size = group(layout, "dp_cp")
    everyone = (1 if layout.tp > 1 else stride, size * layout.tp)
    kept = max(bucket, layers * (m.q_width + m.kv_width) * h / layout.tp) / dense
    for width, per_layer in ((m.q_width, 2), (m.kv_width, 2), (m.router_hidden_size, 1)):
        if width:
            found.append(Matrices(per_layer * layers, width, h, everyone, kept, layout.tp))
    if m.num_moe_experts:
        f, local = m.moe_ffn_hidden_size, m.num_moe_experts / layout.ep
        ranks, kept = group(layout, "ep_dp"), max(bucket, local * f / layout.etp * h) / layout.edp
        found.append(Matrices(3 * local * layers, f, h, ranks, kept, layout.etp))
    return found


def muon_s(m: ModelShape, layout: Layout, device: Accelerator, network: Network) -> float:
    """Return the time of orthogonalising all matrices of a pipeline rank; each has one owner, load is even."""
    return sum(_orthogonalise_s(matrices, device, network) for matrices in hidden_matrices(m, layout))


def _orthogonalise_s(matrices: Matrices, device: Accelerator, network: Network) -> float:
    short, long = sorted((matrices.rows, matrices.columns))
    iteration = 2 * device.product_s(short, long, short) + device.product_s(short, short, short)
    own = ceil(matrices.number / matrices.ranks[1])
    cut = matrices.number * matrices.cut_share
    # bf16 pieces out and results back, in waves of one matrix per owner
    waves = ceil(cut / matrices.ranks[1])
    share = 2 * cut * matrices.elements / matrices.ranks[1] / max(1, waves)
    exchange = 2 * waves * network.time_s("all_to_all", share, *matrices.ranks)
    return max(STEPS * iteration * own, exchange)
