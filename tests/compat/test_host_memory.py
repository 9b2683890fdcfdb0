"""Freed memory stays with a training process: a later step takes no page faults for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from megatron_zaya.compat.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() is True

def step():
    gradients = [torch.ones(40 << 18) for _ in range(4)]  # 40 MiB each: always a mapping of its own by default

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(4):
    step()
before = faults()
step(), step()
print(faults() - before)
"""
PAGES = 2 * 4 * (40 << 20) // 4096


def faults_of_two_steps(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's allocator")
def test_a_later_step_takes_no_page_faults():
    assert faults_of_two_steps("keep") < PAGES / 100
    assert faults_of_two_steps("default") > PAGES / 2  # what the setting is for


def test_another_c_library_is_left_alone(monkeypatch):
    from megatron_zaya.compat import host_memory

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert host_memory.keep_freed_memory() is False
