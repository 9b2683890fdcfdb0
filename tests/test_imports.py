"""What the operator's side may import: never torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "modules", ["topology, launch", "launch.cli", "megatron_zaya.config, megatron_zaya.preconditions", "ckpt.steps"]
)
def test_import_brings_no_torch(modules):
    code = f"import sys, {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'megatron.core', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
