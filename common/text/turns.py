"""Turns -> text, by a chat template: what it writes around a turn, and where an answer begins and ends in its text.

Imports neither torch nor transformers; a tokenizer comes in.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, NamedTuple

from jinja2.exceptions import TemplateError

from common.data.conversations import Message
from common.errors import InputError
from common.text.pieces import CLOSE, OPEN, PieceEncoder, any_of, special_names, unmark

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PINNED = "{%- macro strftime_now(form)"  # how a template begins whose date has been fixed
DATE = date(2024, 7, 26)  # what Llama's templates write where they cannot tell the day


class Answered(NamedTuple):
    """The text of a conversation up to an answer, and the text that ends with this answer and its end token."""

    prompt: str
    text: str


class TurnTemplate:
    """Renders turns with one chat template.

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
        self.encoder.let_answers_have(self._tokens_of_answers())
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
        return unmark(self._render(self.prepare(messages), generation))

    def answer(self, turns: Sequence[Message]) -> Answered:
        """The last of the turns, as `prepare` returns them: an answer, or after a question an empty one."""
        if turns[-1]["role"] != "assistant":
            prompt = self._render(turns, generation=True)
            return Answered(prompt, prompt)
        prompt, text = self._render_answer(turns)
        if not text.endswith(self._answer_end + self._after_end):
            raise InputError(
                f"{self.source} ends an answer with {text[-20:]!r}, another one with "
                f"{self._answer_end + self._after_end!r}. Give another --chat_template."
            )
        return Answered(prompt, text.removesuffix(self._after_end))

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """The turns as the template takes them, with the names of special tokens in them marked."""
        turns: list[Message] = []
        system = ""
        for message in messages:
            role, content = message["role"], self.encoder.mark(message["content"], message["role"])
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
            text: str = self.tokenizer.apply_chat_template(
                list(turns), chat_template=self.text, tokenize=False, add_generation_prompt=generation
            )  # type: ignore[assignment]
        except (TemplateError, TypeError, ValueError) as error:  # what a template raises itself, and its mistakes
            roles = ", ".join(turn["role"] for turn in turns)
            raise InputError(
                f"{self.source} refuses the turns {roles}: {' '.join(str(error).split())}. Change them, or give "
                "another --chat_template."
            ) from None
        if (OPEN in text or CLOSE in text) and (place := self.encoder.taken_apart(text)):
            raise InputError(
                f"{self.source} takes the name of a special token in a turn apart: {place!r}. Take the name out of "
                "the turn, or give another --chat_template."
            )
        return text

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

    def _tokens_of_answers(self) -> set[str]:
        """The names of special tokens that are tokens in an answer, too, such as <think> and </think>.

        Those that the template mentions for another purpose than to tell turns apart, or looks for in an answer.
        """

        def turns(answer: str) -> list[Message]:
            return [{"role": "user", "content": "xuserx"}, {"role": "assistant", "content": answer}]

        def is_looked_for(name: str) -> bool:
            answer = turns(f"x{self.encoder.mark(name)}x")
            try:
                self._render(answer * pairs, generation=False)
            except InputError:  # its markers were taken apart
                return True
            return False

        pairs = 2 if self._takes(turns("xanswerx") * 2) else 1
        between, _, _ = self._render(turns("xanswerx") * pairs, generation=False).rpartition("xuserx")
        mentioned = {name for name in self.encoder.names if name in self.text} - {self.end, self.tokenizer.eos_token}
        return {name for name in mentioned if name not in between or is_looked_for(name)}

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
