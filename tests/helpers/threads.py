"""The OpenMP threads of a process."""

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from common.memory import end_waiting_threads


def alive() -> set[str]:
    """The ids of all threads of this process, those included that Python does not know."""
    return set(os.listdir("/proc/self/task"))


@contextlib.contextmanager
def waiting_threads() -> Iterator[set[str]]:
    """The ids of threads that wait for this one to compute again; skips where there are none."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("the threads of a process are only told on Linux")
    threads = torch.get_num_threads()
    try:
        end_waiting_threads()
        torch.set_num_threads(4)
        before = alive()
        torch.ones(2**20).exp_()
        waiting = alive() - before
        if not waiting:
            pytest.skip("this build of PyTorch keeps no OpenMP threads")
        yield waiting
    finally:
        torch.set_num_threads(threads)
