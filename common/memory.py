"""Memory that glibc keeps of freed tensors is given back to the system, so that a process stays as small as it can."""

import ctypes
import functools
import sys
import time
from collections.abc import Callable

SHARE = 0.01  # of the time that may go into giving back; as much again goes into taking pages anew


class _Trimmer:
    """Calls `malloc_trim` as often as it costs no more than SHARE of the time, by the clock of its last call."""

    def __init__(self, trim: Callable[[int], int]) -> None:
        self.trim, self.due = trim, 0.0

    def __call__(self) -> None:
        started = time.perf_counter()
        if started >= self.due:
            self.trim(0)
            ended = time.perf_counter()
            self.due = ended + (ended - started) / SHARE


@functools.cache
def _trimmer() -> _Trimmer | None:
    """None where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim and _Trimmer(trim)


def give_back(device_type: str) -> None:
    """Gives freed memory back to the system, on a CPU and where the C library can; to be called after every batch.

    Batches of ever new shapes leave free blocks in which the next tensors do not fit, and without this call a process
    only grows. It takes about 2 % of the time, whatever a call costs: calls that come too soon do nothing.
    """
    trimmer = _trimmer()
    if trimmer and device_type == "cpu":
        trimmer()
