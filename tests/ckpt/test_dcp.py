"""torch.distributed.checkpoint on our files: sharded DTensors on two ranks, whole ones on one, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ckpt.dcp import DcpReader, DcpWriter
from tests.ranks import run_ranks


def values() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return {"a": torch.randn(10, 6, generator=random), "b": torch.randn(7, generator=random)}


def two_ranks(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = values()
    state = {
        "model": {"a": distribute_tensor(whole["a"], mesh, [Shard(0)]), "b": whole["b"].clone()},
        "step": 5,
        "note": "text",
    }
    writer = DcpWriter(folder)
    dcp.save(state, storage_writer=writer)
    writer.checkpointer.close()
    other = distribute_tensor(torch.zeros(10, 6), mesh, [Shard(1)])
    target = {"model": {"a": other, "b": torch.zeros(7)}, "step": 0, "note": ""}
    dcp.load(target, storage_reader=DcpReader(folder))
    assert torch.equal(target["model"]["a"].full_tensor(), whole["a"])
    assert torch.equal(target["model"]["b"], whole["b"])
    assert (target["step"], target["note"]) == (5, "text")
    torch.distributed.destroy_process_group()


def test_sharded_on_two_ranks_then_whole_on_one(tmp_path):
    run_ranks(two_ranks, 2, tmp_path / "step")
    target = {"model": {"a": torch.zeros(10, 6), "b": torch.zeros(7)}, "step": 0}
    dcp.load(target, storage_reader=DcpReader(tmp_path / "step"), no_dist=True)
    assert torch.equal(target["model"]["a"], values()["a"])
    assert target["step"] == 5
    damaged = tmp_path / "step" / "rank_00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointException, match="rank_00001"):
        dcp.load(target, storage_reader=DcpReader(tmp_path / "step"), no_dist=True)


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_an_object_that_would_run_code_is_refused(tmp_path, capsys):
    writer = DcpWriter(tmp_path / "step")
    dcp.save({"bad": Payload()}, storage_writer=writer, no_dist=True)
    writer.checkpointer.close()
    with pytest.raises(CheckpointException, match=r"object 'object/bad' is refused.* it wants .*print"):
        dcp.load({"bad": 1}, storage_reader=DcpReader(tmp_path / "step"), no_dist=True)
    assert "never" not in capsys.readouterr().out
