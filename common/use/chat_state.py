"""A conversation and the settings of its answers, as a terminal and a page share it. Knows no model: a function
answers. Imports neither torch nor transformers."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field

from common.data.conversations import Message
from common.errors import InputError
from common.options import Sampling, check, convert
from common.use.personas import Persona, choose_persona


@dataclass
class ChatState:
    """The turns of a conversation, its system turn, and the settings of its answers.

    answer: gives the pieces of the next answer to (turns, settings).
    """

    answer: Callable[[list[Message], Sampling], Iterator[str]]
    sampling: Sampling
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def turns(self) -> list[Message]:
        """The conversation with its system turn."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages

    def questions(self) -> list[str]:
        """What has been asked."""
        return [turn["content"] for turn in self.messages if turn["role"] == "user"]

    def stream_answer(self, question: str) -> Generator[str, None, None]:
        """The pieces of the answer to a question, as they are written.

        What was written is kept even if the iterator is closed early; without a word of an answer, nothing is.
        """
        self.messages.append({"role": "user", "content": question})
        answer = ""
        try:
            with contextlib.closing(self.answer(self.turns(), self.sampling)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    answer += piece
                    yield piece
        finally:
            if answer.strip():
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def stream_retry(self) -> Generator[str, None, None]:
        """The pieces of another answer to the last question; without one, what there was is kept.

        Raises InputError if nothing has been asked.
        """
        exchange = self.undo()
        before = len(self.messages)
        try:
            yield from self.stream_answer(exchange[0]["content"])
        finally:
            if len(self.messages) == before:
                self.messages += exchange

    def undo(self) -> list[Message]:
        """Removes the last question and what followed it, and returns them. Raises InputError if there is none."""
        questions = [i for i, turn in enumerate(self.messages) if turn["role"] == "user"]
        if not questions:
            raise InputError("nothing has been asked yet.")
        exchange = self.messages[questions[-1] :]
        del self.messages[questions[-1] :]
        return exchange

    def reset(self) -> None:
        """Begins a new conversation; the system turn and the settings stay."""
        self.messages.clear()

    def use_persona(self, name: str) -> Persona:
        """Makes the persona's system turn that of the conversation. Raises InputError where there is no such one."""
        persona = choose_persona(name)
        self.system = persona.system_prompt
        return persona

    def change_sampling(self, texts: Mapping[str, str]) -> None:
        """Changes settings; an empty text unsets one. Raises InputError for a value that is out of bounds."""
        given = convert(Sampling, {name: text for name, text in texts.items() if text})
        unset = {name: getattr(Sampling, name) for name, text in texts.items() if not text}
        sampling = Sampling(**{**asdict(self.sampling), **given, **unset})
        check(sampling)
        self.sampling = sampling
