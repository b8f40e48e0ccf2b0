"""What belongs to one browser at a page: its conversations, one per model. Knows no Gradio."""

import contextlib
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from common.data.conversations import Message
from common.errors import InputError
from common.options import Sampling
from common.use.chat_state import ChatState
from common.use.model_queue import ModelQueue, Waiting
from common.use.text_models import TextModel

S = TypeVar("S")
Models = Sequence[tuple[str, TextModel]]
KEPT = 500  # browsers whose conversations are kept; those not used for longest go first
REFRESH = 0.05  # seconds between two pictures of an answer that is being written
OWN = "own"  # the choice that is no persona


class Sessions(Generic[S]):
    """What belongs to one browser, by Gradio's name of it, so that nobody sees another's."""

    def __init__(self, new: Callable[[], S]) -> None:
        self._new, self._lock = new, threading.Lock()
        self._found: OrderedDict[str, S] = OrderedDict()

    def of(self, request: Any) -> S:
        """The session of the browser that asks (a `gradio.Request`); made when it asks first."""
        with self._lock:
            session = self._found.pop(request.session_hash, None) or self._new()
            self._found[request.session_hash] = session
            while len(self._found) > KEPT:
                self._found.popitem(last=False)
            return session


class Turn:
    """One answer at a time in a session, which a person can stop. `stopped()`: somebody did."""

    def __init__(self) -> None:
        self._running, self._stop = threading.Lock(), threading.Event()

    def stop(self) -> None:
        """Ends the answer that is being written, at its next token."""
        self._stop.set()

    def stopped(self) -> bool:
        return self._stop.is_set()

    def __enter__(self) -> "Turn":
        """Raises InputError while another answer is being written; one that is being stopped is waited for."""
        if not self._running.acquire(timeout=30 if self.stopped() else 0.01):
            raise InputError("An answer is being written. Stop it first.")
        self._stop.clear()
        return self

    def __exit__(self, *_: Any) -> None:
        self._running.release()


@dataclass
class Pane:
    """One model's conversation. asked: a question that waits. written: the answer so far, while it is written."""

    state: ChatState
    asked: str | None = None
    written: str = ""

    def shown(self) -> list[Message]:
        """The turns that the page shows."""
        turns = list(self.state.messages)
        if self.asked is not None:
            turns.append({"role": "user", "content": self.asked})
        if self.written:
            turns.append({"role": "assistant", "content": self.written})
        return turns


class Conversations:
    """One browser's conversations, one per model, all asked the same."""

    def __init__(self, queue: ModelQueue, models: Models, sampling: Sampling, persona: str = OWN) -> None:
        self.queue, self.turn = queue, Turn()
        self.own = [model.system for _, model in models]
        self.panes = [Pane(ChatState(in_sequence(model), sampling)) for _, model in models]
        self.use_persona(persona)

    def shown(self) -> list[list[Message]]:
        """The turns of every conversation."""
        return [pane.shown() for pane in self.panes]

    def use_persona(self, name: str) -> None:
        """A persona's system turn in every conversation; OWN: each model's own."""
        for pane, own in zip(self.panes, self.own, strict=True):
            if name == OWN:
                pane.state.system = own
            else:
                pane.state.use_persona(name)

    def clear(self) -> None:
        """New conversations; an answer that is being written is stopped and forgotten."""
        self.turn.stop()
        for pane in self.panes:
            pane.state, pane.asked, pane.written = replace(pane.state, messages=[]), None, ""

    def answer(self, question: str | None, settings: dict[str, str], anew: bool = False) -> Iterator[str]:
        """Asks every model, or (question None) the last question again; yields what is going on, after each change.

        anew: in new conversations. Raises InputError for settings out of bounds, while an answer is being written, and
        without room for one.
        """
        with self.turn:
            panes = self.panes
            try:
                for pane in panes:
                    pane.state.change_sampling(settings)
                    if anew:
                        pane.state.reset()
                    pane.asked = question
                yield ""
                shown = time.monotonic()
                with contextlib.closing(self.queue.in_turn(partial(self._pieces, question), self.turn.stopped)) as turn:
                    for found in turn:
                        if isinstance(found, Waiting) or time.monotonic() - shown > REFRESH:
                            yield str(found)
                            shown = time.monotonic()
            finally:
                for pane in panes:
                    pane.asked, pane.written = None, ""

    def _pieces(self, question: str | None) -> Generator[str, None, None]:
        asked = [pane.state.questions() for pane in self.panes]
        last = max(asked, key=len)  # a model that was stopped, or had no word to say, has not kept the last question
        if question is None and not last:
            raise InputError("nothing has been asked yet.")
        for pane, before in zip(self.panes, asked, strict=True):
            state = pane.state
            again = question is None and len(before) == len(last)
            pieces = state.stream_retry() if again else state.stream_answer(question or last[-1])
            pane.asked = None
            with contextlib.closing(pieces):
                for piece in pieces:
                    if pane.state is state:
                        pane.written += piece
                    yield "Writing."
            pane.written = ""


def in_sequence(model: TextModel) -> Callable[[list[Message], Sampling], Iterator[str]]:
    """Answers with this model, or continues the last turn as a text; each answer has another seed than the one before.

    So a person's answers do not depend on who else asks in between.
    """
    number = itertools.count()

    def answer(turns: list[Message], sampling: Sampling) -> Iterator[str]:
        torch.manual_seed((sampling.seed + next(number)) % 2**32)
        yield from model.pieces(turns if model.template else turns[-1]["content"], sampling)

    return answer
