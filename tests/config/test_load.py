"""Run files: strictness, messages, overrides, round trip."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_zaya.config import ConfigError, RunConfig, dump_config, json_schema, load_config

SHIPPED = sorted(Path("configs").glob("*.yaml"))
SMOKE = "configs/smoke_cpu.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_run_files_load_and_resolve_to_themselves(path, tmp_path):
    config = load_config(path)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump_config(config))
    assert load_config(resolved) == config


def test_released_model_has_the_published_sizes():
    model = load_config("configs/zaya1_8b.yaml").model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.num_query_groups) == (40, 2048, 8, 2)
    assert (model.kv_channels, model.num_moe_experts, model.router_hidden_size) == (128, 16, 256)
    assert (model.vocab_size, model.share_embeddings_and_output_weights) == (262_272, True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layer=3", "model.num_layer: unknown key; did you mean 'num_layers'?"),
        ("optimizer.hidden_size=3", "optimizer.hidden_size: unknown key; it belongs to model.hidden_size"),
        ("modell={}", "modell: unknown key; did you mean 'model'?"),
        ("schedule.micro_batch_size=many", "schedule.micro_batch_size: Input should be a valid integer (got 'many')"),
        ("schedule.micro_batch_size=3", "global_batch_size=16 must be a multiple of micro_batch_size=3"),
        ("model.num_attention_heads=7", "num_attention_heads=7 must be a multiple of num_query_groups=2"),
        ("model.rotary_percent=0.03", "kv_channels * rotary_percent"),
        ("model.sliding_window=null", "sliding_window is not set"),
        ("model.layer_types=[full]", "layer_types has 1 entries for num_layers=4"),
        ("optimizer.min_lr=1", "min_lr=1 is above lr=0.003"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("schedule.lr_warmup_iters=100", "lr_warmup_iters=100 must be below"),
        ("run.name=../up", "run.name"),
        ("model.x", "write it as section.key=value"),
        ("run.seed.deep=1", "run.seed: Input should be a valid integer"),
        ("data.data_path=[a", "not valid YAML"),
    ],
)
def test_a_mistake_is_explained(override, message):
    with pytest.raises(ConfigError) as error:
        load_config(SMOKE, [override])
    assert message in str(error.value)


def test_every_mistake_is_listed_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(SMOKE, ["model.num_layer=3", "run.sed=1", "schedule.train_iters=0"])
    assert "3 problems" in str(error.value)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", "+1e-05"])
def test_exponents_are_numbers(text):
    assert load_config(SMOKE, [f"optimizer.min_lr={text}"]).optimizer.min_lr == 1e-5


def test_overrides_apply_in_order_and_reach_missing_sections(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run:\n")
    config = load_config(path, ["model.num_layers=1", "model.num_layers=2", "data.data_path=[x]"])
    assert config.model.num_layers == 2
    assert config.data.data_path == ["x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("run: [", "not valid YAML"), ("- 1", "top level must be sections"), ("run: {seed: 1, seed: 2}", "given twice")],
)
def test_a_file_that_is_no_run_file(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_a_missing_file():
    with pytest.raises(ConfigError, match="no such run file"):
        load_config("nowhere.yaml")


def test_schema_describes_every_section():
    schema = json_schema()
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert "Key-value heads." in schema["$defs"]["ModelConfig"]["properties"]["num_query_groups"]["description"]
