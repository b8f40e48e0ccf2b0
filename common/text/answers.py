r"""The answers of a conversation, and what comes before each, as pieces of token ids.

An answer is rendered as the last turn, the way a chat asks for it. So `Answers` renders every answer with all turns
before it: for n exchanges, n texts of up to n exchanges. With most templates an exchange looks the same whatever comes
before it. `Exchanges` renders each one apart, after an exchange of two words, and joins the pieces:

    apart              [User: x\nAssistant: x</s>] [\nUser: Bye\nAssistant:] [ Ciao</s>]
    conversation       [User: Hi\nAssistant:] [ Hello</s>] [\nUser: Bye\nAssistant:] [ Ciao</s>]

The joined pieces must be what the template makes of the turns; where they are not, it takes `Answers`.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache

from common.data.conversations import Message
from common.errors import InputError
from common.text.turns import Answered, TurnTemplate

WORDS = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]


class Answers:
    """The answers of a conversation, by number; one that ends with a question has an empty answer to it.

    first: the first user turn. ends: where each answer ends, in turns. most: as of PieceEncoder.encode.
    """

    def __init__(self, template: TurnTemplate, messages: Sequence[Message], most: int) -> None:
        self.template, self.messages, self.most, self.first = template, messages, most, first_question(messages)
        last = len(messages) - 1
        self.ends = [i + 1 for i, turn in enumerate(messages) if turn["role"] == "assistant" or i == last]
        self._rendered_from = lru_cache(maxsize=2)(self._render_from)

    def window(self, start: int, end: int | None = None) -> list[Message]:
        """The turns from `start` to `end`, after the system turn, if there is one."""
        return [*self.messages[: self.first], *self.messages[start:end]]

    def pieces(self, start: int, number: int) -> list[list[int]]:
        """The ids of the text from the user turn `start` to the answer `number`, after the system turn.

        What comes before an answer, the answer, and so on. An earlier answer is a piece of its own if the text still
        has it as it was when it was the last.
        """
        rendered, count, encoder = self._rendered_from(start), len(self.ends), self.template.encoder
        *earlier, last = [rendered(i - count) for i in range(self.first_after(start), number + 1)]
        pairs, position, before = [], 0, ""
        for prompt, text in [*(answer for answer in earlier if last.prompt.startswith(answer.text)), last]:
            pairs += [(prompt[position:], before), (text[len(prompt) :], encoder.tail(prompt))]
            position, before = len(text), self.template.end
        return encoder.encode(pairs, self.most)

    def continues(self, start: int, number: int) -> bool:
        """Whether the text up to the answer before this one is how the text with this one begins."""
        rendered, number = self._rendered_from(start), number - len(self.ends)
        return rendered(number).prompt.startswith(rendered(number - 1).text)

    def check(self, start: int, number: int) -> None:
        """Raises InputError where the pieces are not the template's own text."""

    def first_after(self, start: int) -> int:
        """The first answer after a turn."""
        return bisect_right(self.ends, start)

    def _render_from(self, start: int) -> Callable[[int], Answered]:
        """Renders an answer, by its number from the end, with the turns from `start` on before it; each once."""
        turns = self.template.prepare(self.window(start))
        ends = [i + 1 for i, turn in enumerate(turns) if turn["role"] == "assistant" or i == len(turns) - 1]
        return cache(lambda number: self.template.answer(turns[: ends[number]]))


class Exchanges(Answers):
    """The same, for conversations whose exchanges can be rendered apart; raises InputError where they cannot.

    texts, ids: of each answer the text before it since the last answer, and the answer.
    """

    def __init__(self, template: TurnTemplate, messages: Sequence[Message], most: int) -> None:
        super().__init__(template, messages, most)
        self._opening, self._compared = cache(self._render_opening), cache(self._compare)
        self.texts = list(self._render_apart())
        self.check(self.first, len(self.ends) - 1)
        encoder, end = template.encoder, template.end
        pairs = [
            pair
            for before, answer in zip(self.texts[::2], self.texts[1::2], strict=True)
            for pair in ((before, end), (answer, encoder.tail(end + before)))
        ]
        self.ids = encoder.encode(pairs, most)

    def pieces(self, start: int, number: int) -> list[list[int]]:
        """As of Answers."""
        prompt, answer = self._opening(start)
        encoder = self.template.encoder
        opening = encoder.encode([(prompt, ""), (answer, encoder.tail(prompt))], self.most)
        return [*opening, *self.ids[2 * self.first_after(start) + 2 : 2 * number + 2]]

    def continues(self, start: int, number: int) -> bool:
        """As of Answers."""
        return True

    def check(self, start: int, number: int) -> None:
        """As of Answers."""
        self._compared(start, number)

    def _compare(self, start: int, number: int) -> None:
        texts = [*self._opening(start), *self.texts[2 * self.first_after(start) + 2 : 2 * number + 2]]
        prompt, answer = "".join(texts[:-1]), texts[-1]
        if self._answer(self.window(start, self.ends[number])) != (prompt, prompt + answer):
            raise InputError("the template renders an exchange in another way after other turns.")

    def _render_opening(self, start: int) -> tuple[str, str]:
        """What comes before the first answer after `start`, and this answer."""
        prompt, text = self._answer(self.window(start, self.ends[self.first_after(start)]))
        return prompt, text[len(prompt) :]

    def _render_apart(self) -> Iterator[str]:
        """The texts: an exchange is the turns from a user turn that follows an answer up to the next one."""
        words, done = self._answer(WORDS).text, self.first
        for end in self.ends:
            if self.messages[done]["role"] == "user":
                begin, before = done, words
            prompt, text = self._answer([*WORDS, *self.messages[begin:end]])
            if not prompt.startswith(before):
                raise InputError("the template renders an answer in another way before other turns.")
            yield prompt[len(before) :]
            yield text[len(prompt) :]
            done, before = end, text

    def _answer(self, messages: Sequence[Message]) -> Answered:
        return self.template.answer(self.template.prepare(messages))


def first_question(messages: Sequence[Message]) -> int:
    """Where the first user turn is: how many turns come before it, which are never dropped (a system turn)."""
    for i, turn in enumerate(messages):
        if turn["role"] == "user":
            return i
    raise InputError("a conversation needs a user turn.")
