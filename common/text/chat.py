"""The one place that renders a conversation: turns -> token ids, the same for training, evaluation, chat and export.

The text comes from a chat template, by the tokenizer's own `apply_chat_template`; which of its tokens are an answer is
seen from the template's own prompt: the text up to an answer is how the text with the answer begins. So no marker in
the template is needed, and no token ids are searched. Imports neither torch nor transformers; a tokenizer comes in.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from common.data.conversations import ChatData, Conversation, Message
from common.errors import InputError, why_unreadable

TEMPLATES = {  # for base models, whose tokenizers have none
    "chatml": """\
{%- for turn in messages %}
    {{- '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "alpaca": """\
{%- set titles = {'user': '### Instruction:\\n', 'assistant': '### Response:\\n', 'tool': '### Input:\\n'} %}
{%- if messages[0]['role'] != 'system' %}
    {{- 'Below is an instruction that describes a task. Write a response that completes the request.\\n\\n' }}
{%- endif %}
{%- for turn in messages %}
    {{- titles.get(turn['role'], '') + turn['content'] }}
    {{- eos_token if turn['role'] == 'assistant' }}
    {{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- titles['assistant'] }}
{%- endif %}""",
    "plain": """\
{%- for turn in messages %}
    {{- turn['role'].capitalize() + ': ' + turn['content'] }}
    {{- eos_token if turn['role'] == 'assistant' }}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}""",
}


OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around a special token's name in a turn; Unicode keeps both free for such use


PINNED = "{%- macro strftime_now(form)"
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
    def front(self) -> list[int]:
        """What stands in front of the first token that is trained on."""
        return self.ids[: self.mask.index(1)]


class ChatTemplate:
    """Renders conversations with one chat template.

    A text is encoded in pieces that are cut in front of each answer and behind its end token, so that no token
    straddles them: the ids in front of an answer are the same in training and in chat, whatever answer follows. In a
    turn, a special token's name is text like any other.
    text: the template. source: where it is from, for people.
    notes: what the template does not take, by role, and how that is rendered instead; and a date that was fixed.
    lead: what stands in front of every answer, behind the prompt, blanks aside. end, end_id: the token that ends an
    answer. stop_ids: the ids at which generation ends.
    Raises InputError where the template cannot be trained with.
    """

    def __init__(self, tokenizer: Any, text: str, source: str) -> None:
        self.tokenizer, self.source, self.notes = tokenizer, source, {}
        self.text = self._pin_date(text)
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        special = {name for name, token in added.items() if token.special} | set(tokenizer.all_special_tokens)
        self._names = _any_of(special)
        self.lead, self._answer_end, self._after, self.end = self._find_end(_any_of({*added, *special}))
        self._names = _any_of({*special, self.end})
        self.end_id = tokenizer.convert_tokens_to_ids(self.end)
        eos = tokenizer.eos_token_id
        self.stop_ids = [self.end_id] if eos in (None, self.end_id) else [self.end_id, eos]
        strips = {name for name, token in added.items() if token.rstrip}
        # A token that joins with nothing behind it, for what would join with the text in front of it.
        self._anchor = next((name for name in (tokenizer.eos_token, self.end) if name and name not in strips), "")
        question, call, answer = ({"role": role, "content": f"x{role}x"} for role in ("user", "tool", "assistant"))
        self._system = self._takes([{"role": "system", "content": "xsystemx"}, question])
        self._tool = self._takes([question, {**answer, "content": "xcallx"}, call, answer])
        if not self._system:
            self.notes["system"] = "the chat template takes no system turn: it is put in front of the first user turn"
        if not self._tool:
            self.notes["tool"] = "the chat template takes no tool turn: it is given as a user turn"

    @property
    def hash(self) -> str:
        """SHA-256 of the template's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def text_of(self, messages: Sequence[Message], generation: bool = True) -> str:
        """The conversation as text, for people; generation: up to where the next answer begins."""
        return re.sub(f"[{OPEN}{CLOSE}]", "", self._render(self._prepare(messages), generation))

    def prompt(self, messages: Sequence[Message], max_length: int | None = None) -> ChatRow:
        """Everything in front of the next answer; to fit, early turns are dropped, then the last texts shortened."""
        head, starts = _starts(messages)
        for start in starts:
            kept = [*messages[:head], *messages[start:]]
            ids = self._prompt_ids(kept)
            if max_length is None or len(ids) <= max_length:
                return ChatRow(ids, [0] * len(ids), dropped_turns=start - head)
        least = len(self._prompt_ids(_capped(kept, 1)))
        if least > max_length:
            raise InputError(self._too_short(max_length, least))
        ids = self._prompt_ids(_capped(kept, _largest(kept, lambda turns: len(self._prompt_ids(turns)) <= max_length)))
        return ChatRow(ids, [0] * len(ids), dropped_turns=start - head, shortened=True)

    def rows(self, conversation: Conversation, max_length: int, loss_on: str = "assistant") -> list[ChatRow]:
        """The training rows of a conversation: every answer is trained on once, behind what chat would show it.

        One row, unless the conversation is too long, or the template renders an answer in another way once it is no
        longer the last (Qwen3 takes the thinking out). A further row begins with as many of the earlier turns as fit.
        loss_on: `assistant`, the answers with their end token; or `all`.
        Raises InputError where the template refuses the conversation, or --max_length leaves no room for text.
        """
        try:
            return self._rows(conversation, max_length, loss_on)
        except InputError as error:
            raise InputError(f"the row with id {conversation.id}: {error}") from None

    def _rows(self, conversation: Conversation, max_length: int, loss_on: str) -> list[ChatRow]:
        messages = conversation.messages
        head, starts = _starts(messages)
        ends = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        rows: list[ChatRow] = []
        first, s, pairs = 0, 0, self._pairs(messages)
        while first < len(ends):
            while True:  # drop as few early turns as the answer `first` needs
                skipped = sum(end < starts[s] for end in ends)
                prompt, answered = pairs[first - skipped]
                pieces = self._pieces(prompt, pairs[: first - skipped])
                answer = self._encode(answered[len(prompt) :], self._tail(prompt))
                fits = sum(map(len, pieces)) + len(answer) <= max_length
                if fits or s + 1 == len(starts) or starts[s + 1] > ends[first]:
                    break
                s += 1
                pairs = self._pairs([*messages[:head], *messages[starts[s] :]])
            if not fits:
                kept = [*messages[:head], *messages[starts[s] : ends[first] + 1]]
                pieces, answer, shortened, cut = self._shorten(kept, max_length)
            else:
                shortened = cut = False
            new = pieces if first == 0 else pieces[-1:]  # what no earlier row has been trained on
            context = [token for piece in pieces for token in piece]
            ids, mask = context + answer, [0] * len(context) + [1] * len(answer)
            if loss_on == "all":
                fresh = sum(map(len, new))
                mask = [0] * (len(context) - fresh) + [1] * (fresh + len(answer))
                mask[0] = 0  # nothing stands in front of it
            first += 1
            while fits and first < len(ends):  # the answers that go on from there
                prompt, following = pairs[first - skipped]
                if not prompt.startswith(answered):
                    break
                between = self._encode(prompt[len(answered) :], self.end)
                answer = self._encode(following[len(prompt) :], self._tail(prompt))
                if len(ids) + len(between) + len(answer) > max_length:
                    break
                ids += between + answer
                mask += [int(loss_on == "all")] * len(between) + [1] * len(answer)
                answered, first = following, first + 1
            rows.append(ChatRow(ids, mask, conversation.id, starts[s] - head, shortened, cut))
        return rows

    def _shorten(self, kept: Sequence[Message], max_length: int) -> tuple[list[list[int]], list[int], bool, bool]:
        """The pieces of the last exchange and its answer, cut to fit; whether texts were, and the answer.

        The texts of user and tools are cut to what the answer leaves, but not below half of what it and they have
        together; then the answer's end is cut, without an end token: it must not be learnt as an end.
        """

        def render(turns: Sequence[Message]) -> tuple[list[list[int]], list[int]]:
            *earlier, (prompt, answered) = self._pairs(turns)
            return self._pieces(prompt, earlier), self._encode(answered[len(prompt) :], self._tail(prompt))

        pieces, answer = render(_capped(kept, 1))
        least, whole = sum(map(len, pieces)), sum(map(len, render(kept)[0]))
        if max_length - least < 2:
            raise InputError(self._too_short(max_length, least))
        room = least + max(max_length - least - len(answer), (max_length - least) // 2)
        if whole > room:
            limit = _largest(kept, lambda turns: sum(map(len, render(turns)[0])) <= room)
            kept = _capped(kept, limit)
        pieces, answer = render(kept)
        left = max_length - sum(map(len, pieces))
        return pieces, answer[:left], whole > room, len(answer) > left

    def _too_short(self, max_length: int, least: int) -> str:
        return (
            f"--max_length {max_length} is too short: all but the texts of user and tools (system turn, template, "
            f"calls) takes {least} tokens, which leaves no room. Set it to at least {least + 64}."
        )

    def _pairs(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """For each answer, the text in front of it, and the same with the answer and its end token."""
        turns, pairs = self._prepare(messages), []
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                prompt, text = self._render(turns[:i], True), self._render(turns[: i + 1], False)
                if not text.endswith(self._answer_end + self._after):
                    raise InputError(
                        f"{self.source} ends an answer with {text[-20:]!r}, another one with "
                        f"{self._answer_end + self._after!r}. Give another --chat_template."
                    )
                pairs.append((prompt, _with_prefix(prompt, text, self.source).removesuffix(self._after)))
        return pairs

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        pieces = self._pieces(self._render(self._prepare(messages), True), self._pairs(messages))
        return [token for piece in pieces for token in piece]

    def _pieces(self, text: str, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """The ids of `text`, cut around the earlier answers that stand in it as they did when they were the last."""
        pieces, position, before = [], 0, ""
        for prompt, answered in pairs:
            if text.startswith(answered):
                pieces.append(self._encode(text[position : len(prompt)], before))
                pieces.append(self._encode(answered[len(prompt) :], self._tail(prompt)))
                position, before = len(answered), self.end
        return [*pieces, self._encode(text[position:], before)]

    def _encode(self, text: str, before: str) -> list[int]:
        """The ids of a piece that stands behind `before`; special tokens are only those of the template."""
        ids: list[int] = []
        for i, part in enumerate(re.split(f"{OPEN}(.*?){CLOSE}", text, flags=re.S)):
            if i % 2:  # a name in a turn
                ids += self._spelled(part)
                before = self._anchor
            elif part:
                ids += self._continue(before, part)
        return ids

    def _continue(self, before: str, text: str) -> list[int]:
        """The ids of `text` as they are behind `before`; where tokens would straddle the two, behind a special token.

        Alone it would get a space in front, by some tokenizers.
        """
        for context in (before, self._anchor, ""):
            lead = self._ids(context) if context else []
            both = self._ids(context + text)
            if both[: len(lead)] == lead:
                break
        return both[len(lead) :]

    def _tail(self, prompt: str) -> str:
        """The end of a prompt, from its last special token on if that is near."""
        tail = re.sub(f"[{OPEN}{CLOSE}]", "", prompt[-32:])
        special = [found.start() for found in self._names.finditer(tail)]
        return tail[special[-1] :] if special else tail

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _spelled(self, name: str) -> list[int]:
        ids = self.tokenizer(name, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self.tokenizer.convert_tokens_to_ids(name) not in ids:
            return ids
        halves = (name[:1], name[1:])  # an added token that is not marked as special is never split
        return [token for half in halves for token in self._ids(half)]

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        """The turns as the template takes them, with the names of special tokens in them marked."""
        turns: list[Message] = []
        system = ""
        for turn in messages:
            role, content = turn["role"], re.sub(f"[{OPEN}{CLOSE}]", "", turn["content"])
            content = self._names.sub(lambda found: f"{OPEN}{found[0]}{CLOSE}", content)
            if role == "system" and not self._system:
                system = f"{content}\n\n"
                continue
            role = "user" if role == "tool" and not self._tool else role
            if role == "user":
                content, system = system + content, ""
            if role == "user" and turns and turns[-1]["role"] == "user":  # two tools' results
                turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n\n{content}"}
            else:
                turns.append({"role": role, "content": content})
        return turns

    def _render(self, turns: Sequence[Message], generation: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(turns), chat_template=self.text, tokenize=False, add_generation_prompt=generation
            )
        except (TemplateError, TypeError, ValueError) as error:  # what a template raises itself, and its mistakes
            roles = ", ".join(turn["role"] for turn in turns)
            raise InputError(
                f"{self.source} refuses the turns {roles}: {' '.join(str(error).split())}. Change them, or give "
                "another --chat_template."
            ) from None

    def _takes(self, turns: Sequence[Message]) -> bool:
        """Whether the template renders these turns, each of them whole."""
        try:
            text = self._render(turns, turns[-1]["role"] != "assistant")
        except InputError:
            return False
        return all(turn["content"] in text for turn in turns)

    def _find_end(self, names: re.Pattern) -> tuple[str, str, str, str]:
        """What the template puts in front of an answer, and behind it up to its end token; what follows; the token."""
        turns = [{"role": "user", "content": "xuserx"}, {"role": "assistant", "content": "xanswerx"}]
        prompt = self._render(turns[:1], True)
        text = _with_prefix(prompt, self._render(turns, False), self.source)
        before, found, rest = text.rpartition("xanswerx")
        end = names.search(rest)
        if not found or not end:
            what = "puts no special token behind an answer" if found else "leaves the answer out"
            raise InputError(
                f"{self.source} {what}, so a model could not learn to stop. End the assistant's turns with "
                "{{ eos_token }}, or give another --chat_template."
            )
        return before[len(prompt) :].strip(), rest[: end.end()], rest[end.end() :], end[0]

    def _pin_date(self, text: str) -> str:
        """The template with a fixed day where it would write today's: a prompt must not change over night."""
        if text.startswith(PINNED):  # as saved with an adapter
            return text
        formats = set(re.findall(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", text))
        if not formats:
            return text
        days = {form: DATE.strftime(form) for _, form in sorted(formats)}
        self.notes["date"] = f"the chat template writes the date of today: fixed to {', '.join(days.values())}"
        return f"{PINNED} -%}}{{{{ {days!r}[form] }}}}{{%- endmacro -%}}{text}"


def choose_template(tokenizer: Any, chat_template: str | None = None) -> ChatTemplate:
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
    if chat_template in TEMPLATES:
        text = TEMPLATES[chat_template]
        if lacking := {"<|im_start|>", "<|im_end|>"} - set(tokenizer.get_vocab()) if chat_template == "chatml" else ():
            raise InputError(
                f"{source}: the tokenizer has no token {' or '.join(sorted(lacking))}, and none is added, as the model "
                "has never seen it. Use alpaca or plain."
            )
        starts = tokenizer("")["input_ids"][:1]
        if tokenizer.bos_token_id is not None and starts == [tokenizer.bos_token_id]:
            text = "{{- bos_token }}" + text  # as the model was pretrained
        return ChatTemplate(tokenizer, text, source)
    try:
        text = Path(chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{source}: {why_unreadable(error)}, or give one of {', '.join(TEMPLATES)}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{source}: the file is not UTF-8.") from None
    return ChatTemplate(tokenizer, text, source)


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
        rows = result[split] = [row for rows in rendered for row in rows]
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


def show_chat_row(row: ChatRow, tokenizer: Any) -> str:
    """The row as the model sees it, what is trained on in [[ ]]."""
    text, start = "", 0
    for i in range(1, row.length + 1):
        if i == row.length or row.mask[i] != row.mask[start]:
            piece = tokenizer.decode(row.ids[start:i])
            text += f"[[{piece}]]" if row.mask[start] else piece
            start = i
    return text


def _starts(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """How many turns stand in front (a system turn), and where each user turn is; turns are dropped up to one."""
    starts = [i for i, turn in enumerate(messages) if turn["role"] == "user"]
    if not starts:
        raise InputError("a conversation needs a user turn.")
    return starts[0], starts


def _capped(messages: Sequence[Message], limit: int) -> list[Message]:
    """The turns with the texts of user and tools cut to `limit` characters."""
    return [
        {**turn, "content": turn["content"][:limit]} if turn["role"] in ("user", "tool") else turn for turn in messages
    ]


def _largest(messages: Sequence[Message], fits: Any) -> int:
    """The largest limit of characters at which the turns fit, given that they do at 1."""
    low, high = 1, max(len(turn["content"]) for turn in messages if turn["role"] in ("user", "tool"))
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(_capped(messages, middle)) else (low, middle)
    return low


def _with_prefix(prompt: str, text: str, source: str) -> str:
    """`text`, which must begin with `prompt`: else a model would be trained behind other text than it is asked with."""
    if text.startswith(prompt):
        return text
    at = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    raise InputError(
        f"{source} asks for an answer with {prompt[max(0, at - 20) :][:60]!r}, but writes it behind "
        f"{text[max(0, at - 20) :][:60]!r}. A model cannot be trained with it: give another --chat_template."
    )


def _any_of(names: set[str]) -> re.Pattern:
    """Matches any of the names, the longest first; nothing where there is none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name)))) or "(?!)")
