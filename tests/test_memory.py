"""Freed memory goes back to the system, at a bounded price."""

import subprocess
import sys
import time

import pytest
from helpers.scripts import ROOT

from common import memory


def test_calls_that_come_too_soon_do_nothing(monkeypatch):
    """A call that takes 10 ms is due again a second later."""
    calls = []
    trimmer = memory._Trimmer(lambda pad: calls.append(time.sleep(0.01)) or 1)
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    for now in (100.0, 100.5, 100.9, 101.02, 101.03):
        clock[0] = now
        trimmer()
    assert len(calls) == 2


def test_a_gpu_or_another_library_has_nothing_to_give_back(monkeypatch):
    def refuse() -> None:
        raise AssertionError

    monkeypatch.setattr(memory, "_trimmer", lambda: refuse)
    memory.give_back("cuda")
    monkeypatch.setattr(memory, "_trimmer", lambda: None)
    memory.give_back("cpu")


@pytest.mark.skipif(memory._trimmer() is None, reason="not glibc")
def test_freed_tensors_leave_the_process():
    """Tensors of half a megabyte, freed under one that stays, are 400 MB less for the process."""
    code = """
import torch
from common.memory import give_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

tensors = [torch.ones(2**16, dtype=torch.double) for _ in range(800)]
kept = torch.ones(100)
before = resident()
del tensors[:-1]
give_back("cpu")
print((before - resident()) / 1e6)
"""
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**33), "PATH": ""}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert float(ended.stdout) > 350, ended.stderr
