"""Weights that come in and go out again are the same bits, whatever the layout, the types and the way."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from launch.cli import app
from megatron_zaya.config import RunConfig
from megatron_zaya.convert.commands import Options, from_hf, to_hf
from megatron_zaya.convert.hf import HF
from megatron_zaya.convert.original import ORIGINAL
from megatron_zaya.convert.output import _Content
from megatron_zaya.convert.safetensors_files import SafetensorsFolder, index_json, plan_files
from megatron_zaya.convert.verify import verify
from megatron_zaya.convert.weights import size_of, to_ours, to_theirs
from tests.convert.drawn import drawn, write_model
from tests.model.small import run_config

SLIDING = dict(num_layers=4, layer_types=["full", "sliding", "full", "sliding"], sliding_window=7)
MODELS = {
    "base": {},
    "sliding": SLIDING,
    "untied": dict(share_embeddings_and_output_weights=False),
    "one_layer_long_taps": dict(num_layers=1, cca_time0=4, cca_time1=3, num_query_groups=1, num_moe_experts=1),
}
OPTIONS = Options(workers=2, max_file_bytes=60_000)


def with_precision(config: RunConfig, precision: str) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"precision": precision})})


def assert_equal(a: Path, b: Path) -> None:
    """Every tensor of two model folders has the same name, type, shape and bits; so have the files beside them."""
    report = verify(a, b, logits=False)
    assert report.equal and report.tensors > 20, report.summary()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (a, b))
    assert ours == theirs
    for name in ("generation_config.json", "tokenizer.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.parametrize("layout", ["transformers", "original"])
@pytest.mark.parametrize("model", MODELS)
def test_in_and_out_again_is_bit_equal(tmp_path, model, layout):
    config = run_config(**MODELS[model])
    source = write_model(tmp_path / "source", config, layout)
    from_hf(source, config, tmp_path / "ours", OPTIONS)
    to_hf(tmp_path / "ours", tmp_path / "back", OPTIONS, layout)
    assert_equal(source, tmp_path / "back")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_narrow_weights_come_back_in_their_own_types(tmp_path, precision):
    config = with_precision(run_config(**SLIDING), precision)
    source = write_model(tmp_path / "source", config, "transformers", "BF16", biases="BF16", files=1)
    from_hf(source, config, tmp_path / "ours", OPTIONS)
    to_hf(tmp_path / "ours", tmp_path / "back", Options())
    assert_equal(source, tmp_path / "back")


def test_the_two_other_layouts_become_each_other(tmp_path):
    config = run_config(**SLIDING)
    write_model(tmp_path / "transformers", config)
    from_hf(tmp_path / "transformers", config, tmp_path / "ours", OPTIONS)
    to_hf(tmp_path / "ours", tmp_path / "original", OPTIONS, "original")
    stages = {name.split(".")[2] for name in SafetensorsFolder(tmp_path / "original").tensors if ".layers." in name}
    assert stages == {str(i) for i in range(8)}
    from_hf(tmp_path / "original", config, tmp_path / "ours2", OPTIONS)
    for a, b in (("ours", "ours2"), ("transformers", "original"), ("original", "ours")):
        report = verify(tmp_path / a, tmp_path / b, logits=False)
        assert report.equal, report.summary()


def test_the_original_layout_shifts_residual_scales_by_one_stage(tmp_path):
    """By hand, not through the table: stage 2l+1 scales behind attention l, stage 2l+2 behind mixture l."""
    config = run_config()
    from_hf(write_model(tmp_path / "source", config, "original"), config, tmp_path / "ours", OPTIONS)
    to_hf(tmp_path / "ours", tmp_path / "hf", OPTIONS)
    theirs, hf = drawn(config, "original"), SafetensorsFolder(tmp_path / "hf")

    def values(weights, name: str) -> np.ndarray:
        info = weights.tensors[name]
        out = np.empty(int(np.prod(info.shape)) * info.item_bytes, dtype=np.uint8)
        weights.read(name, 0, out)
        return out.view(np.float32).reshape(info.shape)

    for new, old in {
        "model.input_hidden_states_scale": "model.layers.0.res_scale.hidden_states_scale",
        "model.layers.0.post_attention_residual_scale.residual_bias": "model.layers.1.res_scale.residual_bias",
        "model.layers.0.post_mlp_residual_scale.residual_bias": "model.layers.2.res_scale.residual_bias",
        "model.layers.2.post_mlp_residual_scale.hidden_states_bias": "model.res_scale.hidden_states_bias",
        "model.layers.1.self_attn.qkv_proj.conv_qk_grouped.weight": "model.layers.2.self_attn.qkv.conv_qk.1.weight",
        "model.layers.1.mlp.gate.router_states_scale": "model.layers.3.zaya_block.router.router_states_scale",
    }.items():
        np.testing.assert_array_equal(values(hf, new), values(theirs, old))
    expert = values(theirs, "model.layers.5.zaya_block.experts.local_experts.3.linear_fc1.weight")
    np.testing.assert_array_equal(values(hf, "model.layers.2.mlp.experts.gate_up_proj")[3], expert)


def test_the_command_line_converts_and_verifies(tmp_path):
    config = run_config()
    write_model(tmp_path / "source", config)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))

    def zaya(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
        return result.exit_code, result.output

    assert zaya("from-hf", tmp_path / "source", tmp_path / "run.yaml", tmp_path / "ours")[0] == 0
    assert zaya("to-original", tmp_path / "ours", tmp_path / "original")[0] == 0
    assert zaya("to-hf", tmp_path / "ours", tmp_path / "back", "--max-file-gb", "0.001")[0] == 0
    report = tmp_path / "report.json"
    code, text = zaya("verify", tmp_path / "source", tmp_path / "original", "--no-logits", "--report", report)
    assert code == 0, text
    assert json.loads(report.read_text())["equal"] is True


def test_released_shapes_there_and_back_without_the_model_in_memory():
    """All 40 layers under their released names and sizes, 17.7 GB that are drawn where they are read, never stored."""
    model = RunConfig().model
    theirs = drawn(RunConfig(), "original", "BF16")
    ours = to_ours(theirs, ORIGINAL, model)
    hf = to_theirs(ours, HF, model)
    back = to_theirs(to_ours(hf, HF, model), ORIGINAL, model)
    assert size_of(hf.tensors) == size_of(theirs.tensors) > 17_600_000_000
    assert hf.tensors["model.layers.39.mlp.experts.gate_up_proj"].shape == (16, 4096, 2048)
    assert set(back.tensors) == set(theirs.tensors)
    random = np.random.default_rng(1)
    for name, info in theirs.tensors.items():
        assert back.tensors[name] == info, name
        numel = int(np.prod(info.shape))
        count = min(numel, 2048)
        for start in (0, int(random.integers(0, numel - count + 1)), numel - count):
            blocks = [np.empty(count * info.item_bytes, dtype=np.uint8) for _ in range(2)]
            theirs.read(name, start, blocks[0])
            back.read(name, start, blocks[1])
            assert np.array_equal(*blocks), (name, start)


def test_released_shapes_lie_in_the_planned_files_where_the_headers_say():
    """The files of an export of the released model, read at random places: nothing of their 17.7 GB is written."""
    model = RunConfig().model
    hf = to_theirs(to_ours(drawn(RunConfig(), "original", "BF16"), ORIGINAL, model), HF, model)
    files = plan_files(hf, 4 << 30)
    index = index_json(hf, files)["weight_map"]
    assert len(files) == 5 and set(index) == set(hf.tensors)
    random = np.random.default_rng(2)
    for file in files:
        (length,) = struct.unpack("<Q", file.header[:8])
        header = json.loads(file.header[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        assert sorted(names) == sorted(name for name in index if index[name] == file.name)
        assert file.size == 8 + length + max(header[name]["data_offsets"][1] for name in names) <= 4 << 30
        content = _Content(file, hf)
        for name in random.choice(names, 40):
            first, last = header[name]["data_offsets"]
            assert header[name]["shape"] == list(hf.tensors[name].shape)
            size = min(last - first, 4096)
            for begin in (first, last - size):
                there, expected = (np.empty(size, dtype=np.uint8) for _ in range(2))
                content.fill(8 + length + begin, there)
                hf.read(name, (begin - first) // 2, expected)
                assert np.array_equal(there, expected), name
