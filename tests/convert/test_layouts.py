"""Weights of a real layout, out and into another: through transformers' folder, and through Megatron's torch_dist.

Four ranks (tensor, pipeline and expert parallel) train and save, with our checkpointer and with plain
`dist_checkpointing.save`. This process converts, both ways. Two ranks in another layout load what came back, load the
export with plain `dist_checkpointing.load`, and train on from the import.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ckpt.memory import TORCH_DTYPES
from launch.cli import app
from megatron_zaya.config import load_config
from megatron_zaya.convert import torch_dist_export
from megatron_zaya.convert.commands import Options, from_hf, from_torch_dist, to_hf, to_torch_dist
from megatron_zaya.convert.errors import ConvertError
from megatron_zaya.convert.step import StepWeights
from megatron_zaya.convert.verify import verify
from megatron_zaya.telemetry.jsonl import steps_by_iteration
from tests.distributed.layouts import EP2, PP2, TP2
from tests.ranks import run_ranks
from tests.train.conftest import run_file as make_run_file
from tests.train.conftest import text_prefix  # noqa: F401 (fixture)

COMMON = [
    *("model.num_query_groups=2", "model.vocab_size=264", "model.num_moe_experts=4", "data.num_workers=0"),
    *("schedule.train_iters=4", "checkpoint.save_interval=2"),
]
FIRST, OTHER = ([f"parallel.{key}={value}" for key, value in layout.items()] for layout in (TP2 | PP2 | EP2, EP2))
MODELS = {
    "sliding": ["model.layer_types=[full, sliding]", "model.sliding_window=9"],
    "bf16_muon": ["run.precision=bf16", "optimizer.optimizer=muon"],
}
OPTIONS = Options(max_file_bytes=100_000)


def overrides_of(model: str, name: str, layout: list[str]) -> list[str]:
    return [*COMMON, *MODELS[model], *layout, f"run.name={name}"]


def train_job(path: Path, overrides: list[str], env, device):
    """Train to the end; return the job."""
    from megatron_zaya.train.loop import train
    from megatron_zaya.train.setup import build_callbacks, build_job

    config = load_config(path, overrides)
    job = build_job(config, env, device)
    assert train(job, build_callbacks(config, env)) == "finished"
    job.events.close()
    return job


def train_and_save(path: Path, folder: Path, plain: bool) -> None:
    """Run on each rank: train all models, and save the last weights as Megatron-Core does."""
    from megatron.core import dist_checkpointing

    from launch.env import read_rank_env
    from megatron_zaya.train.setup import distributed_world, release_job

    env = read_rank_env()
    with distributed_world(load_config(path, COMMON), env) as device:
        for model in MODELS:
            job = train_job(path, overrides_of(model, model, FIRST), env, device)
            if plain:
                if env.rank == 0:
                    (folder / f"plain_{model}").mkdir()
                torch.distributed.barrier()
                state = {"model": job.model[0].module.sharded_state_dict(), "iteration": 4}
                dist_checkpointing.save(state, str(folder / f"plain_{model}"))
            release_job(job)


def equal_to_step(described: dict, loaded: dict[str, torch.Tensor], step: StepWeights) -> list[bool]:
    """Return for each weight of this rank whether it has the bits of its part of the step."""
    equal = []
    for name, place in described.items():
        info = step.tensors[place.key]
        raw = torch.empty(int(np.prod(info.shape)) * info.item_bytes, dtype=torch.uint8)
        step.read(place.key, 0, raw.numpy())
        whole = raw.view(TORCH_DTYPES[info.dtype]).view(info.shape)
        box = zip(place.global_offset, place.local_shape, strict=True)
        equal.append(torch.equal(whole[tuple(slice(o, o + n) for o, n in box)], loaded[name].detach()))
    return equal


def load_in_another_layout(path: Path, folder: Path) -> list[bool]:
    """Run on each rank: load what came back through both formats, and train on."""
    from megatron.core import dist_checkpointing

    from launch.env import read_rank_env
    from megatron_zaya.train.setup import build_job, distributed_world, release_job

    env, equal = read_rank_env(), []
    with distributed_world(load_config(path, COMMON), env) as device:
        for model in MODELS:
            step = StepWeights(load_config(path, overrides_of(model, model, FIRST)).run_dir, 2)
            through_hf = ["checkpoint.load_optimizer=false", f"checkpoint.load={folder / f'hf_{model}_ours'}"]
            job = build_job(load_config(path, [*overrides_of(model, f"{model}_hf", OTHER), *through_hf]), env, device)
            stage = job.model[0].module
            equal += equal_to_step(stage.sharded_state_dict(), stage.state_dict(keep_vars=True), step)
            for parameter in stage.parameters():
                parameter.data.fill_(9.0)
            loaded = dist_checkpointing.load({"model": stage.sharded_state_dict()}, str(folder / f"export_{model}"))
            equal += equal_to_step(stage.sharded_state_dict(), loaded["model"], step)
            assert loaded["iteration"] == 2
            release_job(job)
            on = f"checkpoint.load={folder / f'ours_{model}'}"
            release_job(train_job(path, [*overrides_of(model, f"{model}_on", OTHER), on], env, device))
    return equal


def megatron_can_write() -> bool:
    """Megatron-Core 0.19's writer wants psutil."""
    import importlib.metadata
    import importlib.util

    old = importlib.metadata.version("megatron-core").startswith("0.16")
    return old or importlib.util.find_spec("psutil") is not None


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_prefix):  # noqa: F811
    """Folder with a run of each model; its step 2 as export_<model> (torch_dist) and hf_<model>, and both ways back."""
    folder = tmp_path_factory.mktemp("layouts")
    path = make_run_file.__wrapped__(folder, text_prefix)
    run_ranks(train_and_save, 4, path, folder, megatron_can_write())
    for model in MODELS:
        config = load_config(path, overrides_of(model, model, FIRST))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_dist_export, "PIECE", 3000)  # an odd number of rows of several tensors
            to_torch_dist(config.run_dir, folder / f"export_{model}", OPTIONS, iteration=2, with_state=True)
        from_torch_dist(folder / f"export_{model}", config, folder / f"ours_{model}", OPTIONS, with_state=True)
        to_hf(config.run_dir, folder / f"hf_{model}", OPTIONS, iteration=2)
        from_hf(folder / f"hf_{model}", config, folder / f"hf_{model}_ours", OPTIONS)
    return folder, path


def content(step: StepWeights) -> dict[str, bytes]:
    """Return the bytes of every tensor."""
    result = {}
    for name, info in step.tensors.items():
        out = np.empty(int(np.prod(info.shape)) * info.item_bytes, dtype=np.uint8)
        step.read(name, 0, out)
        result[name] = out.tobytes()
    return result


@pytest.mark.parametrize("model", MODELS)
def test_weights_come_back_from_transformers_bit_for_bit(runs, model):
    folder, path = runs
    there = StepWeights(load_config(path, overrides_of(model, model, FIRST)).run_dir, 2)
    back = StepWeights(folder / f"hf_{model}_ours")
    assert len(there.manifest.files) == 4 and back.tensors == there.tensors and content(back) == content(there)


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_step_comes_back_from_torch_dist_bit_for_bit(runs, model):
    folder, path = runs
    there = StepWeights(load_config(path, overrides_of(model, model, FIRST)).run_dir, 2, with_state=True)
    back = StepWeights(folder / f"ours_{model}", with_state=True)
    assert back.manifest.iteration == 2 and back.tensors == there.tensors and content(back) == content(there)
    assert len(list((folder / f"export_{model}").glob("*.distcp"))) > 400  # large ones in pieces
    assert {"optimizer_steps", "train_state", "scheduler"} < set(there.manifest.common)
    assert there.manifest.common.items() <= back.manifest.common.items()
    assert any(name.startswith("optimizer.master.") for name in back.tensors) == (model == "bf16_muon")


def test_another_layout_loads_both_and_megatron_the_export_and_a_run_goes_on(runs):
    folder, path = runs
    for rank in run_ranks(load_in_another_layout, 2, path, folder):
        assert len(rank) > 150 and all(rank)
    for model in MODELS:
        whole, on = (
            steps_by_iteration(load_config(path, overrides_of(model, name, [])).run_dir / "metrics.jsonl")
            for name in (model, f"{model}_on")
        )
        assert set(on) == {3, 4}
        for i, step in on.items():
            assert step["loss"] == pytest.approx(whole[i]["loss"], rel=1e-5 if model == "sliding" else 1e-2)
            assert step["learning_rate"] == whole[i]["learning_rate"]


@pytest.mark.skipif(not megatron_can_write(), reason="Megatron-Core's own writer needs psutil, which is not installed")
@pytest.mark.parametrize("model", MODELS)
def test_what_megatron_saved_from_four_ranks_becomes_a_checkpoint(runs, model, tmp_path):
    folder, path = runs
    overrides = overrides_of(model, model, FIRST)
    arguments = ["convert", "from-torch-dist", folder / f"plain_{model}", path, tmp_path / "ours", *overrides]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    config = load_config(path, overrides)
    there, back = StepWeights(config.run_dir), StepWeights(tmp_path / "ours")
    assert back.tensors == there.tensors and content(back) == content(there)
    with pytest.raises(ConvertError, match=r"lacks 'layers\.2"):
        more = load_config(path, [*overrides, "model.num_layers=3", "model.layer_types=null"])
        from_torch_dist(folder / f"plain_{model}", more, tmp_path / "out", OPTIONS)
    with pytest.raises(ConvertError, match="holds no counters of a run of this program; leave --state away"):
        from_torch_dist(folder / f"plain_{model}", config, tmp_path / "out", OPTIONS, with_state=True)
    assert [found.name for found in tmp_path.iterdir()] == ["ours"]


def test_mistakes_and_damage_are_clear_errors(runs, tmp_path):
    folder, path = runs
    overrides = overrides_of("sliding", "sliding", FIRST)
    config = load_config(path, overrides)
    export, whole = tmp_path / "weights", folder / "export_sliding"
    result = CliRunner().invoke(app, ["convert", "to-torch-dist", str(config.run_dir), str(export)])
    assert result.exit_code == 0, result.output

    def refused(changes: list[str], match: str, source: Path = export, with_state: bool = False) -> None:
        with pytest.raises(ConvertError, match=match):
            from_torch_dist(source, load_config(path, [*overrides, *changes]), tmp_path / "out", OPTIONS, with_state)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    refused(["model.num_moe_experts=8"], "is another model; num_moe_experts: 4 there, 8 by the run file")
    refused(["run.precision=bf16"], "is F32 there and would lose bits as BF16")
    refused(["run.precision=bf16"], r"by run\.precision.*leave --state away", whole, with_state=True)
    refused([], "holds no counters", with_state=True)
    refused([], r"no metadata\.json there", tmp_path)
    with pytest.raises(ConvertError, match="exists already"):
        to_torch_dist(config.run_dir, export, OPTIONS)
    with pytest.raises(ConvertError, match="holds weights only; leave --state away"):
        to_torch_dist(folder / "hf_sliding_ours", tmp_path / "out", OPTIONS, with_state=True)
    found = CliRunner().invoke(app, ["convert", "verify", str(whole), str(folder / "hf_sliding")])
    assert found.exit_code == 0 and "largest difference" in found.output, found.output
    other = verify(whole, folder / "hf_bf16_muon", logits=False)
    assert not other.equal and "type F32 and BF16" in other.summary()
    largest = max(export.glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-2000])
    refused([], r"'embedding.word_embeddings.weight' cannot be read: ")
    largest.unlink()
    refused([], r"'embedding.word_embeddings.weight' cannot be read: .*No such file")


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_metadata_that_would_run_code_are_refused(runs, tmp_path, capsys):
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ConvertError, match=r"\.metadata: is refused or damaged: it wants builtins\.print"):
        from_torch_dist(tmp_path, load_config(runs[1]), tmp_path / "out", OPTIONS)
    assert "never" not in capsys.readouterr().out


def test_metadata_with_a_hole_or_a_way_out_of_the_folder_are_refused(runs, tmp_path):
    folder, path = runs
    config = load_config(path, overrides_of("sliding", "sliding", FIRST))

    def refused(match: str, change) -> None:
        source = shutil.copytree(folder / "export_sliding", tmp_path / "source")
        metadata = pickle.loads((source / ".metadata").read_bytes())
        change(metadata)
        (source / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ConvertError, match=match):
            from_torch_dist(source, config, tmp_path / "out", OPTIONS)
        shutil.rmtree(source)
        assert not list(tmp_path.iterdir())

    def lead_outside(metadata) -> None:
        next(iter(metadata.storage_data.values())).relative_path = "../weights.distcp"

    refused(r"'\.\./weights\.distcp' is no file of this folder", lead_outside)
    name = "embedding.word_embeddings.weight"
    refused(rf"0 of the \d+ elements of '{name}'", lambda metadata: metadata.state_dict_metadata[name].chunks.pop(1))
