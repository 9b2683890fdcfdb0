"""Mistakes and damage: a clear message, exit status 2, and no trace of an output."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from ckpt.errors import CorruptCheckpointError
from megatron_zaya.convert.commands import Options, from_hf, to_hf
from megatron_zaya.convert.errors import ConvertError
from tests.convert.drawn import write_model
from tests.convert.test_round_trips import with_precision
from tests.model.small import run_config

CONFIG = run_config(num_layers=2)
GATE = "model.layers.1.mlp.gate.router_states_scale"


def edit_header(path: Path, change) -> int:
    """Change the header of a safetensors file (its length stays); return where the tensors begin."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])
    return 8 + length


def missing(folder: Path) -> None:
    edit_header(folder / "model.safetensors", lambda header: header.pop(GATE))


def extra(folder: Path) -> None:
    edit_header(folder / "model.safetensors", lambda header: header.update({GATE[:-1]: header.pop(GATE)}))


def misshaped(folder: Path) -> None:
    def change(header):
        header["model.norm.weight"]["shape"] = [6, 8]
        del header["__metadata__"]  # room for a longer shape

    edit_header(folder / "model.safetensors", change)


def mixed_types(folder: Path) -> None:
    edit_header(folder / "model.safetensors", lambda header: header[GATE].update(dtype="I32"))


def not_a_number(folder: Path) -> None:
    path = folder / "model.safetensors"
    places = {}
    data = edit_header(path, lambda header: places.update(header))
    with path.open("r+b") as file:
        file.seek(data + places[GATE]["data_offsets"][0] + 4 * 3)
        file.write(struct.pack("<f", float("nan")))


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def header_cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def other_config(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values |= {"num_experts": 8, "rope_parameters": {"hybrid": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}}}
    (folder / "config.json").write_text(json.dumps(values))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, f"lacks '{GATE}'"),
        (extra, f"lacks '{GATE}'.*did you mean '{GATE[:-1]}'"),
        (misshaped, r"'model.norm.weight' has shape \[6, 8\], \[48\] by the run file"),
        (mixed_types, "previous_scale' is I32 there and would lose bits as F32"),
        (not_a_number, r"previous_scale' holds NaN or infinity at \[3\]; nothing was written"),
        (cut_off, "is cut off: .* ends at byte"),
        (header_cut_off, r"its header is cut off \(500 bytes\)"),
        (other_config, "is another model; num_experts: 8 there, 4 by the run file; rope_parameters"),
        (no_weights, "holds neither model.safetensors nor model.safetensors.index.json"),
        (broken_config, "config.json: is no JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, damage, message):
    source = write_model(tmp_path / "source", CONFIG, files=1)
    damage(source)
    with pytest.raises(ConvertError, match=message):
        from_hf(source, CONFIG, tmp_path / "out", Options())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 6, "kv_channels": 99}, "num_hidden_layers: 6 there, 4 by the run file; kv_channels: 99"),
        ({"swa_layers": [0, 0, 3, 3]}, "swa_layers: .* there, no sliding layer by the run file"),
        ({"model_type": "llama"}, "model_type is 'llama', not 'zaya'"),
    ],
)
def test_an_original_configuration_of_another_model_is_refused(tmp_path, changes, message):
    source = write_model(tmp_path / "source", CONFIG, "original")
    values = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConvertError, match=message):
        from_hf(source, CONFIG, tmp_path / "out", Options())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tensor_too_many_is_named(tmp_path):
    source = write_model(tmp_path / "source", run_config(num_layers=2, share_embeddings_and_output_weights=False))
    values = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConvertError, match=r"holds 'lm_head\.weight', which the model of the run file does not have"):
        from_hf(source, CONFIG, tmp_path / "out", Options())


def test_a_missing_shard_of_several_is_named(tmp_path):
    source = write_model(tmp_path / "source", CONFIG)
    (source / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"model-00002-of-00004.safetensors: cannot be read: No such file"):
        from_hf(source, CONFIG, tmp_path / "out", Options())


def test_an_output_that_exists_is_left_alone(tmp_path):
    source = write_model(tmp_path / "source", CONFIG)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ConvertError, match="out: exists already; nothing is overwritten"):
        from_hf(source, CONFIG, tmp_path / "out", Options())
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    from_hf(source, CONFIG, tmp_path / "ours", Options())
    with pytest.raises(ConvertError, match="exists already"):
        to_hf(tmp_path / "ours", tmp_path / "out", Options())


def test_bits_are_lost_only_when_asked(tmp_path):
    source = write_model(tmp_path / "source", CONFIG)
    narrow = with_precision(CONFIG, "bf16")
    with pytest.raises(ConvertError, match=r"is F32 there and would lose bits as BF16; set run\.precision"):
        from_hf(source, narrow, tmp_path / "out", Options())
    from_hf(source, narrow, tmp_path / "out", Options(rounding=True))


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    from_hf(write_model(tmp_path / "source", CONFIG), CONFIG, tmp_path / "ours", Options())
    path = next((tmp_path / "ours").glob("iter_*/rank_00000.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="does not match its hash"):
        to_hf(tmp_path / "ours", tmp_path / "out", Options())
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_what_transformers_cannot_compute_is_not_exported(tmp_path):
    passing = run_config(num_layers=2, skip_expert="scaled_identity")
    from_hf(write_model(tmp_path / "source", CONFIG), CONFIG, tmp_path / "ours", Options())
    with pytest.raises(ConvertError, match="skip_expert='scaled_identity'"):
        from_hf(tmp_path / "source", passing, tmp_path / "out", Options())
