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

import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jinja2.exceptions import TemplateError

from common.data.conversations import ChatData, Conversation, Message
from common.disk import read_text
from common.errors import InputError
from common.text.pieces import PieceEncoder, any_of, special_names, unmark

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).parents[2] / "data" / "chat_templates"
TEMPLATES = {  # for base models, whose tokenizers have none
    name: (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n") for name in ("chatml", "alpaca", "plain")
}
FITTED = ("in_several_rows", "without_early_turns", "shortened", "cut_answers")  # counts of the data report
PINNED = "{%- macro strftime_now(form)"  # how a template begins whose date has been fixed
DATE = date(2024, 7, 26)  # what Llama's templates write where they cannot tell the day


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


class Answered(NamedTuple):
    """The text of a conversation up to an answer, and the text that ends with this answer and its end token."""

    prompt: str
    text: str


class ChatTemplate:
    """Renders conversations with one chat template.

    text: the template. source: where it comes from, for people.
    notes: what the template does not take, by role, and how that is rendered instead; and a date that was fixed.
    answer_prefix: what the template writes before every answer without asking for it, blanks aside (Qwen3's empty
    thinking). end, end_id: the token that ends an answer. stop_ids: the ids at which generation stops.
    Raises InputError where the template cannot be trained with.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", text: str, source: str) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.notes: dict[str, str] = {}
        self.text = self._pin_date(text)
        self.answer_prefix, self._answer_end, self._after_end, self.end = self._find_end()
        self.end_id = tokenizer.convert_tokens_to_ids(self.end)
        eos = tokenizer.eos_token_id
        self.stop_ids = [self.end_id] if eos in (None, self.end_id) else [self.end_id, eos]
        self.encoder = PieceEncoder(tokenizer, self.end)
        roles = ("system", "user", "tool", "assistant")
        system, user, tool, answer = ({"role": role, "content": f"x{role}x"} for role in roles)
        self._takes_system = self._takes([system, user])
        self._takes_tool = self._takes([user, {**answer, "content": "xcallx"}, tool, answer])
        if not self._takes_system:
            self.notes["system"] = "the chat template takes no system turn: it is put before the first user turn"
        if not self._takes_tool:
            self.notes["tool"] = "the chat template takes no tool turn: it is given as a user turn"

    @property
    def hash(self) -> str:
        """SHA-256 of the template's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def text_of(self, messages: Sequence[Message], generation: bool = True) -> str:
        """The conversation as text, for people; generation: up to where the next answer begins."""
        return unmark(self._render(self._prepare(messages), generation))

    def prompt(self, messages: Sequence[Message], max_length: int | None = None) -> ChatRow:
        """Everything before the next answer; to fit, early turns are dropped, then the last texts shortened."""
        first = _first_question(messages)
        limit = sys.maxsize if max_length is None else max_length
        start, pieces, shortened, _ = self._fit(messages, first, len(messages), limit, self._answers_from(messages))
        ids = list(chain(*pieces))
        return ChatRow(ids, [0] * len(ids), dropped_turns=start - first, shortened=shortened)

    def rows(self, conversation: Conversation, max_length: int, loss_on: str = "assistant") -> list[ChatRow]:
        """The training rows of a conversation: every answer is trained on once, after what a chat would show before it.

        One row, unless the conversation is too long, or the template renders an answer in another way once it is no
        longer the last (Qwen3 removes the thinking). A further row begins with as many of the earlier turns as fit.
        loss_on: `assistant`, the answers with their end token; or `all`.
        Raises InputError where the template refuses the conversation, or --max_length leaves no room for text.
        """
        try:
            return list(self._rows(conversation, max_length, loss_on == "all"))
        except InputError as error:
            raise InputError(f"the row with id {conversation.id}: {error}") from None

    def _rows(self, conversation: Conversation, max_length: int, train_on_all: bool) -> Iterator[ChatRow]:
        messages = conversation.messages
        start = first = _first_question(messages)
        ends = [i + 1 for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        answers_from = self._answers_from(messages)
        number = -len(ends)  # of the first answer without a row, counted from the end
        while number < 0:
            start, pieces, shortened, cut = self._fit(messages, start, ends[number], max_length, answers_from)
            new = len(pieces) - 2  # the pieces before this one were trained on in an earlier row
            number, answers = number + 1, answers_from(start)
            complete = not shortened and not cut
            while number < 0 and complete and answers[number].prompt.startswith(answers[number - 1].text):
                longer = self._encode(answers, number)
                if _length(longer) > max_length:
                    break
                pieces, number = longer, number + 1
            # Every second piece is an answer.
            mask = [int(i >= new and (train_on_all or i % 2)) for i, piece in enumerate(pieces) for _ in piece]
            mask[0] = 0  # nothing comes before it
            yield ChatRow(list(chain(*pieces)), mask, conversation.id, start - first, shortened, cut)

    def _fit(
        self,
        messages: Sequence[Message],
        first: int,
        end: int,
        max_length: int,
        answers_from: Callable[[int], list[Answered]],
    ) -> tuple[int, list[list[int]], bool, bool]:
        """As many turns as fit with the answer messages[end - 1], or before the answer that messages[end] would be.

        Early turns are dropped, up to a user turn, messages[first] or a later one; where even the last exchange is too
        long, it is shortened. Returns the first user turn that is left, and what `_shorten` returns.
        """
        number = -1 - sum(turn["role"] == "assistant" for turn in messages[end:])
        for start in (i for i in range(first, end) if messages[i]["role"] == "user"):
            pieces = self._encode(answers_from(start), number)
            if _length(pieces) <= max_length:
                return start, pieces, False, False
        return start, *self._shorten(_window(messages, start, end), max_length)

    def _shorten(self, messages: Sequence[Message], max_length: int) -> tuple[list[list[int]], bool, bool]:
        """The pieces of turns that are too long, cut to fit; whether texts were cut, and whether the last answer was.

        The texts of user and tools are cut to what the answer leaves, but not below half of what it and they have
        together; then the answer's end is cut, without an end token: it must not be learned as an end.
        """

        def encode(turns: Sequence[Message]) -> list[list[int]]:
            return self._encode(self._answers(turns), -1)

        *context, answer = encode(_capped(messages, 1))
        least = _length(context)
        if max_length - least < (2 if answer else 0):
            raise InputError(
                f"--max_length {max_length} is too short: all but the texts of user and tools (system turn, template, "
                f"calls) takes {least} tokens, which leaves no room. Set it to at least {least + 64}."
            )
        room = least + max(max_length - least - len(answer), (max_length - least) // 2)
        *context, answer = encode(messages)
        if shortened := _length(context) > room:
            *context, answer = encode(_cap_to_fit(messages, lambda turns: _length(encode(turns)[:-1]) <= room))
        left = max_length - _length(context)
        return [*context, answer[:left]], shortened, len(answer) > left

    def _answers_from(self, messages: Sequence[Message]) -> Callable[[int], list[Answered]]:
        """A function that renders the answers from a user turn on, without the turns before it, each time once."""
        return functools.cache(lambda start: self._answers(_window(messages, start)))

    def _answers(self, messages: Sequence[Message]) -> list[Answered]:
        """Every answer, each rendered as the last turn; and an empty one after a question at the end."""
        turns = self._prepare(messages)
        answers = []
        for end in [i + 1 for i, turn in enumerate(turns) if turn["role"] == "assistant"]:
            prompt, text = self._render_answer(turns[:end])
            if not text.endswith(self._answer_end + self._after_end):
                raise InputError(
                    f"{self.source} ends an answer with {text[-20:]!r}, another one with "
                    f"{self._answer_end + self._after_end!r}. Give another --chat_template."
                )
            answers.append(Answered(prompt, text.removesuffix(self._after_end)))
        if turns[-1]["role"] != "assistant":
            prompt = self._render(turns, generation=True)
            answers.append(Answered(prompt, prompt))
        return answers

    def _encode(self, answers: Sequence[Answered], number: int) -> list[list[int]]:
        """The ids of the text that ends with an answer, in pieces: what comes before an answer, the answer, and so on.

        number: of the answer, negative, counted from the last one. An earlier answer is a piece of its own if the text
        still has it as it was when it was the last.
        """
        last, pieces, position, before = answers[number], [], 0, ""
        earlier = [answered for answered in answers[:number] if last.prompt.startswith(answered.text)]
        for prompt, text in [*earlier, last]:
            pieces.append(self.encoder.encode(prompt[position:], before))
            pieces.append(self.encoder.encode(text[len(prompt) :], self.encoder.tail(prompt)))
            position, before = len(text), self.end
        return pieces

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        """The turns as the template takes them, with the names of special tokens in them marked."""
        turns: list[Message] = []
        system = ""
        for message in messages:
            role, content = message["role"], self.encoder.mark(message["content"])
            if role == "system" and not self._takes_system:
                system = f"{content}\n\n"
                continue
            role = "user" if role == "tool" and not self._takes_tool else role
            if role == "user":
                content, system = system + content, ""
            if role == "user" and turns and turns[-1]["role"] == "user":  # two tools' results
                turns[-1]["content"] += f"\n\n{content}"
            else:
                turns.append({"role": role, "content": content})
        return turns

    def _render(self, turns: Sequence[Message], generation: bool) -> str:
        """The text of the turns; generation: up to where the next answer begins."""
        try:
            return self.tokenizer.apply_chat_template(
                list(turns), chat_template=self.text, tokenize=False, add_generation_prompt=generation
            )  # type: ignore[return-value]
        except (TemplateError, TypeError, ValueError) as error:  # what a template raises itself, and its mistakes
            roles = ", ".join(turn["role"] for turn in turns)
            raise InputError(
                f"{self.source} refuses the turns {roles}: {' '.join(str(error).split())}. Change them, or give "
                "another --chat_template."
            ) from None

    def _render_answer(self, turns: Sequence[Message]) -> Answered:
        """The text up to the last turn, an answer, and the complete text.

        Raises InputError where the one is not how the other begins: a model would be trained on answers to other
        prompts than it gets later.
        """
        prompt, text = self._render(turns[:-1], generation=True), self._render(turns, generation=False)
        if not text.startswith(prompt):
            begin = max(0, len(os.path.commonprefix([prompt, text])) - 20)
            raise InputError(
                f"{self.source} asks for an answer with {prompt[begin:][:60]!r}, but writes it after "
                f"{text[begin:][:60]!r}. A model cannot be trained with it: give another --chat_template."
            )
        return Answered(prompt, text)

    def _takes(self, turns: Sequence[Message]) -> bool:
        """Whether the template renders these turns, each of them completely."""
        try:
            text = self._render(turns, generation=turns[-1]["role"] != "assistant")
        except InputError:
            return False
        return all(turn["content"] in text for turn in turns)

    def _find_end(self) -> tuple[str, str, str, str]:
        """What the template writes before an answer unasked, from an answer to its end token, and after it; the token.

        Found in a conversation of two words.
        """
        turns = [{"role": "user", "content": "xuserx"}, {"role": "assistant", "content": "xanswerx"}]
        prompt, text = self._render_answer(turns)
        before, found, rest = text.rpartition("xanswerx")
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content.strip()}
        end = any_of(added | special_names(self.tokenizer)).search(rest)
        if not found or not end:
            what = "puts no special token after an answer" if found else "leaves the answer out"
            raise InputError(
                f"{self.source} {what}, so a model could not learn to stop. End the assistant's turns with "
                "{{ eos_token }}, or give another --chat_template."
            )
        return before.removeprefix(prompt).strip(), rest[: end.end()], rest[end.end() :], end[0]

    def _pin_date(self, text: str) -> str:
        """The template with a fixed day where it would write today's: a prompt must not change overnight."""
        if text.startswith(PINNED):  # as saved with an adapter
            return text
        formats = set(re.findall(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", text))
        if not formats:
            return text
        days = {form: DATE.strftime(form) for _, form in sorted(formats)}
        self.notes["date"] = f"the chat template writes today's date: fixed to {', '.join(days.values())}"
        return f"{PINNED} -%}}{{{{ {days!r}[form] }}}}{{%- endmacro -%}}{text}"


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
                "in_several_rows": sum(len(rows) > 1 for rows in rendered),
                "without_early_turns": sum(row.dropped_turns > 0 for row in rows),
                "shortened": sum(row.shortened for row in rows),
                "cut_answers": sum(row.cut for row in rows),
                "tokens": sum(row.length for row in rows),
                "trained_tokens": sum(sum(row.mask) for row in rows),
            }
    seen = {turn["role"] for rows in data.splits.values() for row in rows for turn in row.messages} | {"date"}
    data.report["chat_template"] = {
        "source": template.source,
        "sha256": template.hash,
        "end": template.end,
        "notes": [note for about, note in template.notes.items() if about in seen],
    }
    return result


def show_chat_row(row: ChatRow, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The row as the model sees it, with [[ ]] around what is trained on."""
    text = ""
    for trained, pairs in groupby(zip(row.mask, row.ids, strict=True), key=lambda pair: pair[0]):
        piece = tokenizer.decode([token for _, token in pairs])
        text += f"[[{piece}]]" if trained else str(piece)
    return text


def _first_question(messages: Sequence[Message]) -> int:
    """Where the first user turn is: how many turns come before it, which are never dropped (a system turn)."""
    for i, turn in enumerate(messages):
        if turn["role"] == "user":
            return i
    raise InputError("a conversation needs a user turn.")


def _window(messages: Sequence[Message], start: int, end: int | None = None) -> list[Message]:
    """The turns from `start` to `end`, after the system turn, if there is one."""
    return [*messages[: _first_question(messages)], *messages[start:end]]


def _length(pieces: Sequence[Sequence[int]]) -> int:
    return sum(map(len, pieces))


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
