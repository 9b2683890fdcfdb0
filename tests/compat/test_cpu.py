"""The CPU stand-ins: active without an accelerator, absent with one."""

from __future__ import annotations

import subprocess
import sys

import torch

from megatron_zaya.compat import capabilities, cpu


def test_cuda_spellings_land_on_the_cpu(pg_collection):
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda", 0), pin_memory=True).device.type == "cpu"
    assert torch.ones(1).to("cuda").cuda().device.type == "cpu"
    assert torch.ones(1).to(device="cuda", dtype=torch.float64).dtype == torch.float64
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.cuda.current_device() == torch.device("cpu")
    assert not torch.cuda.is_available()


def test_streams_and_events_are_inert(pg_collection):
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        event.record()
    assert event.query()
    assert event.elapsed_time(event) == 0.0


def test_random_streams_are_reproducible(pg_collection):
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_with_an_accelerator_nothing_is_touched():
    code = """
import torch
torch.cuda.is_available = lambda: True
before = (torch.zeros, torch.cuda.Stream, torch.cuda.current_device, torch.Tensor.to, torch.Tensor.cuda)
from megatron_zaya.compat import cpu
assert cpu.install() is False
assert before == (torch.zeros, torch.cuda.Stream, torch.cuda.current_device, torch.Tensor.to, torch.Tensor.cuda)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_install_is_idempotent_and_says_that_it_is_active():
    assert cpu.install() is True
    zeros = torch.zeros
    assert cpu.install() is True
    assert torch.zeros is zeros


def test_detection_agrees_with_what_runs():
    rows = {row.name: row for row in capabilities.detect()}
    assert rows["torch"].detail == torch.__version__
    assert rows["grouped product"].available == capabilities.grouped_product_works("cpu", torch.float32)
    assert not rows["accelerator"].available
    assert all(row.consequence for name, row in rows.items() if name not in ("python", "torch"))


def test_megatron_is_imported_without_torchs_compiler_where_nothing_compiles():
    code = """
import sys, torch
compiler = torch.compile
from megatron_zaya.compat import import_megatron
import_megatron()
assert torch.compile is compiler
assert "torch._inductor" not in sys.modules
from megatron.core.fusions.fused_bias_swiglu import swiglu
assert torch.equal(swiglu(torch.ones(1, 2)), torch.nn.functional.silu(torch.ones(1, 1)))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
