"""What transformers saves trains here, and what comes out of here loads there: same logits, and it generates."""

from __future__ import annotations

import pytest
import torch

from megatron_zaya.convert.commands import Options, from_hf, to_hf
from megatron_zaya.convert.verify import verify
from tests.model.small import hf_model, run_config

OPTIONS = Options(workers=1, max_file_bytes=50_000)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that transformers saved, our checkpoint of it, and the way back."""
    root = tmp_path_factory.mktemp("transformers")
    config = run_config(num_layers=4, layer_types=["full", "sliding", "full", "sliding"], sliding_window=7)
    model = hf_model(config, seed=3)
    model.save_pretrained(root / "theirs", max_shard_size="100KB")
    from_hf(root / "theirs", config, root / "ours", OPTIONS)
    to_hf(root / "ours", root / "back", OPTIONS)
    return root


def test_the_exported_folder_loads_and_generates(folders):
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(folders / "back").eval()
    theirs = AutoModelForCausalLM.from_pretrained(folders / "theirs").eval()
    tokens = torch.randint(0, 101, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
        out = ours.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 15)


def test_verify_compares_logits_of_ours_and_transformers(folders):
    report = verify(folders / "ours", folders / "back")
    assert report.equal and "largest difference" in report.logits, report.summary()


def test_verify_finds_another_answer(folders, tmp_path):
    """Equal tensors that a configuration makes another model of: only the logits can tell."""
    import json
    import shutil

    shutil.copytree(folders / "back", tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    values = json.loads(path.read_text())
    values["rope_parameters"]["hybrid"]["rope_theta"] = 100.0
    path.write_text(json.dumps(values))
    report = verify(folders / "ours", tmp_path / "changed")
    assert [d.name for d in report.differences] == ["logits"], report.summary()
