"""What a process keeps on a CPU although it needs it no more: freed memory, kernels of past shapes, threads."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

SHARE = 0.02  # of the time that the system may spend on giving back and, which is most of it, on taking pages anew
LONGEST = 30.0  # seconds between two calls, where the system has other work as well
KERNELS = 256  # some updates' worth; 64 are too few for one, which then takes 14 % longer


class _Trimmer:
    """Calls `malloc_trim` once the system's work since its last call is at most SHARE of the time, or after LONGEST."""

    def __init__(self, trim: Callable[[int], int]) -> None:
        self.trim, self.last = trim, os.times()

    def __call__(self, at_once: bool) -> None:
        now = os.times()
        elapsed = now.elapsed - self.last.elapsed
        if at_once or elapsed >= LONGEST or now.system - self.last.system <= SHARE * elapsed:
            self.trim(0)
            self.last = now


def _function(name: str) -> Any:
    """A function of the C libraries in this process; None where there is none, or where this is not Linux."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


@functools.cache
def _trimmer() -> _Trimmer | None:
    """None where the C library is not glibc."""
    trim = _function("malloc_trim")
    return trim and _Trimmer(trim)


def give_back(device_type: str, at_once: bool = False) -> None:
    """Gives freed memory back to the system, on a CPU and where the C library can; to be called after every batch.

    at_once: whatever it costs, as what comes next is of another kind.
    Batches of ever new shapes leave free blocks in which the next tensors do not fit, and without this call a process
    only grows. It takes a few percent of the time, whatever a call costs: calls that come too soon do nothing. A call
    after every update took 10 % of training, as the pages of every batch had to be taken anew.
    """
    trimmer = _trimmer()
    if trimmer and device_type == "cpu":
        trimmer(at_once)


def keep_few_kernels() -> None:
    """Makes oneDNN keep KERNELS compiled kernels instead of 1,024; to be called before the first product on a CPU.

    Every length of a batch has kernels of its own, with their buffers, and PyTorch keeps 1,024 a second time, for every
    kind of product. With a model of 135M, 40 updates of other lengths left 545 MB in use instead of 287, growing with
    each; not one update took longer.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")


def end_waiting_threads() -> None:
    """Ends the OpenMP threads that wait for this thread to compute again; to be called before another one computes.

    Every thread that computes has its own, and where there are more than cores, those of libgomp sleep instead of
    spinning between two operations (GOMP_SPINCOUNT in its manual), so that nothing is gained from a second core: a
    model of 135M then took 2.2 times as long for an answer on two cores, and 1.5 times for an update. Does nothing
    where there is no OpenMP 5 runtime.
    """
    if pause := _function("omp_pause_resource_all"):
        pause(1)  # omp_pause_soft
