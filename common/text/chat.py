r"""The one place that renders a conversation: turns -> token ids, the same for training, evaluation, chat and export.

The text comes from a chat template, through the tokenizer's own `apply_chat_template`. Where an answer begins is read
off the template's own prompt: the text up to an answer is how the text with the answer begins. So the template needs
no markers, and no token ids are searched for.

An example: the conversation user `Hi`, assistant `Hello`, user `Bye`, assistant `Ciao`, by the template `chatml`. Each
line is a piece of the text that is encoded on its own; the pieces in [[ ]], the answers with their end token, are
trained on.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    [[Hello<|im_end|>]]
    \n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n
    [[Ciao<|im_end|>]]

The first three lines are also the prompt that asks for `Ciao` in a chat: the same text in the same pieces, so the same
ids. Imports neither torch nor transformers; a tokenizer comes in.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from common.data import doctor
from common.data.conversations import ChatData, Conversation, Message
from common.disk import read_text
from common.errors import InputError
from common.text.answers import Answers, Exchanges
from common.text.turns import TurnTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).parents[2] / "data" / "chat_templates"
TEMPLATES = {  # for base models, whose tokenizers have none
    name: (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n") for name in ("chatml", "alpaca", "plain")
}
FEW = 16  # turns; up to as many, rendering every answer with all turns before it is the faster way
T = TypeVar("T")
Search = Callable[[Sequence[int], Callable[[int], bool]], int]
FITTED = ("in_several_rows", "without_early_turns", "shortened", "cut_answers")  # counts of the data report


class NoRoom(InputError):
    """What a conversation has besides the texts of user and tools is too long; `least` tokens."""

    def __init__(self, max_length: int, least: int) -> None:
        self.least = least
        super().__init__(
            f"--max_length {max_length} is too short: all but the texts of user and tools (system turn, template, "
            f"calls) takes {least} tokens, which leaves no room. Set it to at least {least + 64}."
        )


@dataclass(frozen=True)
class ChatRow:
    """Token ids, and 1 for each that is trained on; what had to be left out to fit --max_length.

    id: the conversation's. dropped_turns: early turns left out. shortened: a user's (or tool's) text was cut.
    cut: the answer's end was, so that no end token follows.
    """

    ids: list[int]
    mask: list[int]
    id: str = ""
    dropped_turns: int = 0
    shortened: bool = False
    cut: bool = False

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def prompt(self) -> list[int]:
        """The ids before the first one that is trained on."""
        return self.ids[: self.mask.index(1)]


class ChatTemplate(TurnTemplate):
    """Renders conversations with one chat template, as TurnTemplate says, to token ids."""

    def prompt(self, messages: Sequence[Message], max_length: int | None = None) -> ChatRow:
        """Everything before the next answer; to fit, early turns are dropped, then the last texts shortened."""
        limit = sys.maxsize if max_length is None else max_length

        def fit(answers: Answers) -> ChatRow:
            last = len(answers.ends) - 1
            search = _one_by_one if isinstance(answers, Exchanges) else _by_halves  # a trial takes long
            start, pieces, shortened, _ = self._fit(answers, answers.first, last, limit, search)
            ids = list(chain(*pieces))
            return ChatRow(ids, [0] * len(ids), dropped_turns=start - answers.first, shortened=shortened)

        return self._rendered(messages, limit, fit)

    def rows(self, conversation: Conversation, max_length: int, loss_on: str = "assistant") -> list[ChatRow]:
        """The training rows of a conversation: every answer is trained on once, after what a chat would show before it.

        One row, unless the conversation is too long, or the template renders an answer in another way once it is no
        longer the last (Qwen3 removes the thinking). A further row begins with as many of the earlier turns as fit.
        loss_on: `assistant`, the answers with their end token; or `all`.
        Raises InputError where the template refuses the conversation, or --max_length leaves no room for text.
        """

        def fit(answers: Answers) -> list[ChatRow]:
            return list(self._rows(answers, conversation.id, max_length, loss_on == "all"))

        try:
            return self._rendered(conversation.messages, max_length, fit)
        except InputError as error:
            raise InputError(f"the row with id {conversation.id}: {error}") from None

    def _rendered(self, messages: Sequence[Message], max_length: int, use: Callable[[Answers], T]) -> T:
        """What `use` makes of a conversation's answers, rendered in the faster way that is right."""
        if len(messages) > FEW:
            try:
                return use(Exchanges(self, messages, max_length))
            except InputError:  # if it is not about this way of rendering, it comes again
                pass
        return use(Answers(self, messages, max_length))

    def _rows(self, answers: Answers, id: str, max_length: int, train_on_all: bool) -> Iterator[ChatRow]:
        start = answers.first
        number = 0  # of the first answer without a row
        while number < len(answers.ends):
            start, pieces, shortened, cut = self._fit(answers, start, number, max_length, _one_by_one)
            new = len(pieces) - 2  # the pieces before this one were trained on in an earlier row
            number, complete = number + 1, not shortened and not cut
            while complete and number < len(answers.ends) and answers.continues(start, number):
                longer = answers.pieces(start, number)
                if _length(longer) > max_length:
                    answers.check(start, number)  # it is really too long
                    break
                pieces, number = longer, number + 1
            if complete:
                answers.check(start, number - 1)
            # Every second piece is an answer.
            mask = [int(i >= new and (train_on_all or i % 2)) for i, piece in enumerate(pieces) for _ in piece]
            mask[0] = 0  # nothing comes before it
            yield ChatRow(list(chain(*pieces)), mask, id, start - answers.first, shortened, cut)

    def _fit(
        self, answers: Answers, first: int, number: int, max_length: int, search: Search
    ) -> tuple[int, list[list[int]], bool, bool]:
        """As many turns as fit with an answer.

        Early turns are dropped, up to a user turn, `first` or a later one; where even the last exchange is too long, it
        is shortened. Returns the first user turn that is left, and what `_shorten` returns.
        """
        end = answers.ends[number]
        starts = [i for i in range(first, end) if answers.messages[i]["role"] == "user"]

        def fits(start: int) -> bool:
            return _length(answers.pieces(start, number)) <= max_length

        place = search(starts, fits)
        for start in starts[max(0, place - 1) : place + 1]:  # the last that does not fit, and the first that does
            answers.check(start, number)
        if place == len(starts):
            return start, *self._shorten(answers.window(start, end), max_length)
        return start, answers.pieces(start, number), False, False

    def _shorten(self, messages: Sequence[Message], max_length: int) -> tuple[list[list[int]], bool, bool]:
        """The pieces of turns that are too long, cut to fit; whether texts were cut, and whether the last answer was.

        The texts of user and tools are cut to what the answer leaves, but not below half of what it and they have
        together; then the answer's end is cut, without an end token: it must not be learned as an end.
        """

        def encode(turns: Sequence[Message], most: int = max_length) -> list[list[int]]:
            answers = Answers(self, turns, most)
            return answers.pieces(answers.first, len(answers.ends) - 1)

        *context, answer = encode(_capped(messages, 1))
        least = _length(context)
        if max_length - least < (2 if answer else 0):
            least = _length(encode(_capped(messages, 1), sys.maxsize)[:-1])
            raise NoRoom(max_length, least)
        room = least + max(max_length - least - len(answer), (max_length - least) // 2)
        *context, answer = encode(messages)
        if shortened := _length(context) > room:
            *context, answer = encode(_cap_to_fit(messages, lambda turns: _length(encode(turns)[:-1]) <= room))
        left = max_length - _length(context)
        return [*context, answer[:left]], shortened, len(answer) > left


def choose_template(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None = None) -> ChatTemplate:
    """The template of `--chat_template` (a name of TEMPLATES, or a Jinja file), or the tokenizer's own."""
    if chat_template is None:
        try:
            return ChatTemplate(tokenizer, tokenizer.get_chat_template(), "the tokenizer's chat template")
        except ValueError:  # transformers': none, or several without a default
            raise InputError(
                f"The tokenizer has no chat template, as is usual for base models. Give --chat_template, one of "
                f"{', '.join(TEMPLATES)}, or a Jinja file."
            ) from None
    source = f"--chat_template {chat_template}"
    if chat_template not in TEMPLATES:
        text = read_text(Path(chat_template), source, f", or give one of {', '.join(TEMPLATES)}")
        return ChatTemplate(tokenizer, text, source)
    lacking = sorted({"<|im_start|>", "<|im_end|>"} - set(tokenizer.get_vocab()))
    if chat_template == "chatml" and lacking:
        raise InputError(
            f"{source}: the tokenizer has no token {' or '.join(lacking)}, and none is added, as the model has never "
            "seen it. Use alpaca or plain."
        )
    starts_with_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = "{{- bos_token }}" if starts_with_bos else ""  # as the model was pretrained
    return ChatTemplate(tokenizer, bos + TEMPLATES[chat_template], source)


def chat_rows(
    data: ChatData, template: ChatTemplate, max_length: int, loss_on: str = "assistant"
) -> dict[str, list[ChatRow]]:
    """split -> the rows of its conversations, in order; notes in the data report what did not fit.

    Raises InputError that names file and row where one cannot be rendered.
    """
    result = {}
    data.report["max_length"] = max_length
    for split, conversations in data.splits.items():
        try:
            rendered = [template.rows(conversation, max_length, loss_on) for conversation in conversations]
        except InputError as error:
            source = data.sources.get(split) or data.sources["train"]  # cut from there
            raise InputError(f"{source['name']}, {error}") from None
        rows = result[split] = list(chain(*rendered))
        if rows:
            data.report["rows"][split] |= {
                "rendered": len(rows),
                "in_several_rows": sum(len(rows) > 1 and any(map(_made_to_fit, rows)) for rows in rendered),
                "without_early_turns": sum(row.dropped_turns > 0 for row in rows),
                "shortened": sum(row.shortened for row in rows),
                "cut_answers": sum(row.cut for row in rows),
                "tokens": sum(row.length for row in rows),
                "trained_tokens": sum(sum(row.mask) for row in rows),
                "lengths": doctor.quantiles([row.length for row in rows]),
            }
            doctor.add_findings(data.report, _findings(split, rows, template, loss_on))
    seen = {turn["role"] for rows in data.splits.values() for row in rows for turn in row.messages} | {"date"}
    data.report["chat_template"] = {
        "source": template.source,
        "sha256": template.hash,
        "end": template.end,
        "notes": [note for about, note in template.notes.items() if about in seen],
    }
    return result


def _made_to_fit(row: ChatRow) -> bool:
    return row.dropped_turns > 0 or row.shortened or row.cut


def _findings(split: str, rows: Sequence[ChatRow], template: ChatTemplate, loss_on: str) -> list[str]:
    twice = sum(row.ids[:2] == [template.tokenizer.bos_token_id] * 2 for row in rows)
    answers = [sum(1 for _ in run) for row in rows for trained, run in groupby(row.mask) if trained]
    short = sum(length <= 2 for length in answers) if loss_on == "assistant" else 0  # with the end token
    return doctor.double_start(split, twice) + doctor.short_answers(split, short, len(answers))


def conversation_numbers(rows: Sequence[ChatRow]) -> list[int]:
    """The conversation of each row, numbered from 0 in their order: the rows of one are not independent."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(row.id, len(numbers)) for row in rows]


def show_chat_row(row: ChatRow, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The row as the model sees it, with [[ ]] around what is trained on."""
    text = ""
    for trained, pairs in groupby(zip(row.mask, row.ids, strict=True), key=lambda pair: pair[0]):
        piece = tokenizer.decode([token for _, token in pairs])
        text += f"[[{piece}]]" if trained else str(piece)
    return text


def _length(pieces: Sequence[Sequence[int]]) -> int:
    return sum(map(len, pieces))


def _one_by_one(starts: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The place of the first start that fits, len(starts) if none does."""
    return next((i for i, start in enumerate(starts) if fits(start)), len(starts))


def _by_halves(starts: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The same, given that those after one that fits do, too."""
    return 0 if fits(starts[0]) else bisect_left(starts, True, key=fits)


def _capped(messages: Sequence[Message], limit: int) -> list[Message]:
    """The turns with the texts of user and tools cut to `limit` characters."""
    return [
        {**turn, "content": turn["content"][:limit]} if turn["role"] in ("user", "tool") else turn for turn in messages
    ]


def _cap_to_fit(messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool]) -> list[Message]:
    """The turns with the texts of user and tools cut to as many characters as fit, given that one does."""
    low, high = 1, max(len(turn["content"]) for turn in messages if turn["role"] in ("user", "tool"))
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(_capped(messages, middle)) else (low, middle)
    return _capped(messages, low)
