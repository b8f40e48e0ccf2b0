"""What a process needs no more goes back to the system, at a bounded price."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.scripts import ROOT
from helpers.threads import alive, waiting_threads

from common import memory


def test_calls_that_come_too_soon_do_nothing(monkeypatch):
    """The next call waits until the pages taken anew since the last one cost little of the time."""
    now = SimpleNamespace(system=0.0, elapsed=100.0)
    monkeypatch.setattr(os, "times", lambda: SimpleNamespace(**vars(now)))
    calls = []
    trimmer = memory._Trimmer(lambda pad: calls.append(now.elapsed) or 1)
    for now.elapsed, now.system in [(105, 0.2), (109, 0.2), (111, 0.2), (112, 0.6), (130, 0.6), (132, 0.6)]:
        trimmer(at_once=False)
    assert calls == [111, 132]
    for now.elapsed in range(133, 200):  # a system that is busy all the time
        now.system += 0.05
        trimmer(at_once=False)
    assert calls == [111, 132, 162, 192]
    trimmer(at_once=True)  # whatever it costs
    assert calls[-1] == 199


def test_a_gpu_or_another_library_has_nothing_to_give_back(monkeypatch):
    def refuse(at_once: bool) -> None:
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


def test_products_of_ever_more_lengths_leave_nothing_more_behind():
    """PyTorch and oneDNN would keep a kernel for each; how large one is depends on the processor."""
    code = """
import sys, torch
from common.memory import keep_few_kernels
if sys.argv[1] == "few":
    keep_few_kernels()
resident = lambda: int(open("/proc/self/statm").read().split()[1])
weights = torch.ones(64, 64, dtype=torch.bfloat16)
for rows in range(1, 801):
    torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weights)
    if rows == 400:
        before = resident()
print((resident() - before) * 4096 / 1e6)
"""
    few, many = (
        float(subprocess.run([sys.executable, "-c", code, kept], cwd=ROOT, capture_output=True, text=True).stdout)
        for kept in ("few", "many")
    )
    if many < 30:
        pytest.skip("on this processor kernels are small or none are compiled")
    assert few < many / 3, (few, many)


def test_few_kernels_are_kept_unless_the_user_says_how_many(monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    memory.keep_few_kernels()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(memory.KERNELS)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    memory.keep_few_kernels()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"


def test_no_thread_waits_once_another_one_is_to_compute():
    with waiting_threads() as waiting:
        memory.end_waiting_threads()
        assert not waiting & alive()
        assert torch.ones(2**20).exp_().sum() > 2**21  # and computing goes on
        memory.end_waiting_threads()
        memory.end_waiting_threads()  # there are none
