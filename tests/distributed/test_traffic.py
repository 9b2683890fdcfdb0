"""The table of docs/parallelism.md against the collectives of real gloo ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.distributed.layouts import ALLGATHER, EP2, TP2, TP4
from tests.ranks import run_ranks
from tests.train.conftest import run_file as make_run_file
from tests.train.conftest import text_prefix  # noqa: F401 (fixture)

DOCUMENT = Path(__file__).parents[2] / "docs" / "parallelism.md"
MODEL = {"H": 32, "Q": 8, "K": 2, "D": 8, "E": 4, "S": 32, "B": 2, "w": 4}
ALONE = {"t": 1, "c": 1, "e": 1}
LAYERS = (1, 3)
CASES = {
    "tensor": (2, TP2, {"t": 2}),
    "tensor_kv": (4, TP4, {"t": 4}),
    "expert_alltoall": (2, EP2, {"e": 2}),
    "expert_allgather": (2, EP2 | ALLGATHER, {"e": 2}),
    "context_p2p": (4, {"context_parallel_size": 4, "cp_comm_type": "p2p"}, {"c": 4}),
    "context_all_gather": (2, {"context_parallel_size": 2, "cp_comm_type": "all_gather"}, {"c": 2}),
}


def documented() -> dict[str, Counter]:
    """Return for each layout of the table: operation -> bytes, by its formula."""
    table: dict[str, Counter] = {}
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4 and cells[0] in CASES:
            sizes = MODEL | ALONE | CASES[cells[0]][2]
            table.setdefault(cells[0], Counter())[cells[2]] += eval(cells[3].strip("`"), {}, sizes)
    return table


def record(run_file: Path, cases: dict[str, dict]) -> dict[str, dict[int, Counter]]:
    """Run on each rank: bytes that it moves in one forward and backward pass, by case and number of layers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from launch.env import read_rank_env
    from megatron_zaya.config import load_config
    from megatron_zaya.parallel.groups import release_process_groups
    from megatron_zaya.plan.dryrun.collectives import CollectiveLog
    from megatron_zaya.train.setup import build_job, distributed_world

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.log = CollectiveLog()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "c10d":
                self.log.see(function._schema.name.split("::")[1], args, "step")
            return function(*args, **(kwargs or {}))

    env = read_rank_env()
    moved: dict[str, dict[int, Counter]] = {}
    with distributed_world(load_config(run_file), env) as device:
        for name, parallel in cases.items():
            for layers in LAYERS:
                overrides = [f"parallel.{key}={value}" for key, value in parallel.items()]
                job = build_job(load_config(run_file, [*overrides, f"model.num_layers={layers}"]), env, device)
                with Recorder() as recorder:
                    forward_and_backward(job)
                totals: Counter = Counter()
                for call in recorder.log.summary():
                    totals[call.op] += call.size_bytes * call.calls
                moved.setdefault(name, {})[layers] = totals
                release_process_groups()
    return moved


def forward_and_backward(job) -> None:
    """One micro-batch through the bare model: no gradient reduction, no optimizer."""
    from megatron_zaya.train.step import forward_step

    loss, _ = forward_step(job.train_data[0], job.model[0].module, job)
    loss.sum().backward()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, text_prefix):  # noqa: F811
    """Bytes per layer and micro-batch by case, summed over the ranks."""
    path = make_run_file.__wrapped__(tmp_path_factory.mktemp("traffic"), text_prefix)
    tree = yaml.safe_load(path.read_text())
    tree["model"] |= dict(num_attention_heads=8, num_query_groups=2, kv_channels=8, num_moe_experts=4, vocab_size=264)
    tree["model"] |= dict(skip_expert_bias=-1e9)  # every token is dispatched: the table counts all rows
    tree["schedule"] |= dict(micro_batch_size=MODEL["B"], global_batch_size=8)
    path.write_text(yaml.safe_dump(tree))
    per_layer: dict[str, Counter] = {}
    for world in (2, 4):
        cases = {name: parallel for name, (ranks, parallel, _) in CASES.items() if ranks == world}
        ranks = run_ranks(record, world, path, cases)
        for name in cases:
            few, many = (sum((rank[name][layers] for rank in ranks), Counter()) for layers in LAYERS)
            per_layer[name] = Counter(
                {op: (many[op] - few[op]) // (LAYERS[1] - LAYERS[0]) for op in many if many[op] != few[op]}
            )
    return per_layer


@pytest.mark.parametrize("case", CASES)
def test_a_layer_moves_what_the_table_says(recorded, case):
    assert recorded[case] == documented()[case]
