"""One queue in front of a model: people who come at once are answered one after another, in the order of coming."""

import contextlib
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from common.memory import end_waiting_threads

T = TypeVar("T")
LOOK = 0.5  # seconds between two looks at one's place in the queue


@dataclass(frozen=True)
class Waiting:
    """It is not one's turn yet: so many are ahead."""

    ahead: int

    def __str__(self) -> str:
        others = "another question is" if self.ahead == 1 else f"{self.ahead} other questions are"
        return f"Waiting: {others} answered first."


class ModelQueue:
    """Whoever is first in the queue has the model; whoever leaves, however that comes about, makes room."""

    def __init__(self) -> None:
        self._tickets: list[object] = []
        self._changed = threading.Condition()

    def in_turn(
        self, start: Callable[[], Generator[T, None, None]], stopped: Callable[[], bool]
    ) -> Generator[Waiting | T, None, None]:
        """What `start()` gives, once it is one's turn; before, again and again how many are ahead.

        Ends early where `stopped()` says so. Closing the iterator leaves the queue, whether it waits or not.
        """
        ticket = object()
        with self._changed:
            self._tickets.append(ticket)
        try:
            while not stopped() and (ahead := self._ahead(ticket)):
                yield Waiting(ahead)
                with self._changed:
                    self._changed.wait_for(lambda: self._tickets.index(ticket) < ahead, LOOK)
            if stopped():
                return
            with contextlib.closing(start()) as pieces:
                for piece in pieces:
                    end_waiting_threads()  # the next one may be asked for in another thread
                    yield piece
                    if stopped():
                        return
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def _ahead(self, ticket: object) -> int:
        with self._changed:
            return self._tickets.index(ticket)
