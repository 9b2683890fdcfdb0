"""Freed memory stays with a training process: a later step takes no page faults for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from megatron_zaya.compat.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() is True

def step():
    gradients = [torch.ones(80 << 18) for _ in range(2)]  # 80 MiB each: always a mapping of its own by default

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

with ThreadPoolExecutor(1) as other:  # as gloo's: its memory is no other
    run = step if sys.argv[2] == "main" else lambda: other.submit(step).result()
    for _ in range(12):  # the heap grows until freed neighbours hold what is asked for, with its alignment
        run()
    before = faults()
    run(), run()
print(faults() - before)
"""
PAGES = 2 * 2 * (80 << 20) // 4096


def faults_of_two_steps(how: str, thread: str) -> int:
    done = subprocess.run([sys.executable, "-c", STEPS, how, thread], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's allocator")
@pytest.mark.parametrize("thread", ["main", "other"])
def test_a_later_step_takes_no_page_faults(thread):
    assert faults_of_two_steps("keep", thread) < PAGES / 100
    assert faults_of_two_steps("default", thread) > PAGES / 2  # what the setting is for


def test_another_c_library_is_left_alone(monkeypatch):
    from megatron_zaya.compat import host_memory

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert host_memory.keep_freed_memory() is False
