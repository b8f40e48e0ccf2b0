"""The host keeps ahead of a GPU: batches are made an update early, in a thread, and losses are read an update late."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import chain, pairwise
from typing import Any

import torch
from accelerate import Accelerator

from common.log import RunLog
from common.text.batches import Batch
from common.train import loop
from common.train.checkpoints import State


def batches_ahead(
    updates: Iterable[list[int]],
    rows: Sequence[Any],
    batch_size: int,
    accelerator: Accelerator,
    collate: Callable[[Sequence[tuple[Any, bool]]], Batch],
) -> Iterator[tuple[list[int], Callable[[], list[Batch]]]]:
    """The row numbers of every update, and what returns this rank's micro-batches of it, as `loop.micro_batches` does.

    While a GPU runs one update, a thread makes the batches of the next one, and of no later one; what is returned waits
    for them, and raises what went wrong there. On a CPU they are made when they are asked for: a second thread that
    computes would take the cores from the first (`memory.end_waiting_threads`).
    """

    def batches(numbers: list[int]) -> list[Batch]:
        return loop.micro_batches([rows[i] for i in numbers], batch_size, accelerator, collate)

    if accelerator.device.type == "cpu":
        yield from ((numbers, partial(batches, numbers)) for numbers in updates)
        return
    with ThreadPoolExecutor(1, "collate") as thread:
        submitted = ((numbers, thread.submit(batches, numbers).result) for numbers in updates)
        for update, _ in pairwise(chain(submitted, [None])):
            yield update  # type: ignore[misc]


class Ledger:
    """What every update comes to: its figures are read, checked, counted in the state, and logged.

    late: they are read an update late, so that the host does not wait for the device; so it is on a GPU. The run still
    stops before the next update changes the weights, and what keeps weights calls `settle` first.
    """

    def __init__(self, accelerator: Accelerator, state: State, log: RunLog) -> None:
        self.accelerator, self.state, self.log = accelerator, state, log
        self.late = accelerator.device.type == "cuda"
        self._figures: Callable[[], tuple[float, float, float]] | None = None  # of an update that is not settled
        self._rates: dict[str, float] = {}

    def check(
        self,
        loss_sum: torch.Tensor,
        target_count: torch.Tensor,
        norm: torch.Tensor,
        rates: dict[str, float],
        rows: Iterable[str],
    ) -> None:
        """Before an update changes the weights: raises what `loop.finite_mean` does of it; late, of the one before.

        rates: the learning rates, to be logged. rows: the ids of its rows, read only then.
        """
        self._settle()
        figures, update = torch.stack([loss_sum, target_count, norm]), self.state.update
        read = _read_soon(figures) if self.late else figures.tolist

        @cache
        def checked() -> tuple[float, float, float]:
            total, targets, gradient = read()
            mean = loop.finite_mean(total, targets, gradient, self.accelerator, update, rows)
            return mean, targets, gradient

        self._figures, self._rates = checked, rates
        if not self.late:
            checked()

    def count(self, lengths: Sequence[int], seconds: float) -> None:
        """After an update, whose rows have these lengths in tokens."""
        self.state.count(lengths, seconds)
        if not self.late:
            self._settle()

    def settle(self) -> State:
        """The state, with the figures of all updates. Raises what `check` does."""
        started = time.perf_counter()
        self._settle()
        self.state.seconds += time.perf_counter() - started
        return self.state

    def close(self) -> None:
        """After the last update."""
        self.settle()
        self.log.close()

    def _settle(self) -> None:
        figures, self._figures = self._figures, None
        if figures:
            loss, targets, norm = figures()
            self.state.count_loss(loss, targets)
            self.log.update(self.state, loss, **self._rates, grad_norm=norm)


def _read_soon(figures: torch.Tensor) -> Callable[[], list[float]]:
    """Starts to copy a GPU's numbers, after the work that it has; the function returned waits for them alone."""
    copied, arrived = figures.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return copied.tolist()

    return read
