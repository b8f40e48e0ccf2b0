"""The one renderer of classification rows: text -> token ids, the same for training, evaluation and inference.

Imports neither torch nor transformers; a tokenizer comes in as the function that encodes a piece of text.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from common.data import doctor
from common.data.classification import SEPARATOR, ClassificationData, Example, draw_few_shot
from common.disk import read_text
from common.errors import InputError
from common.hub import tokenizer_file
from common.options import ClassificationDataConfig
from common.text.pieces import Encode, after_other_text, first_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATIVE_TEMPLATE = """\
Classify the text into {labels} and return the answer as the exact text label.
text: {text}
label: {label}"""
HEAD_TEMPLATE = "{text}"
AT_ONCE = 2**12  # texts that are tokenized together


@dataclass(frozen=True)
class AnswerRow:
    """A generative row: ids of the prompt, ids of the answer with its end token, and the row's weight in the loss."""

    prompt: list[int]
    answer: list[int]
    weight: float = 1.0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class HeadRow:
    """A row for a classification head: ids, target, and weight.

    target: the label's index; one 0.0 or 1.0 per label if there may be several; any float for a regression.
    """

    prompt: list[int]
    target: int | float | list[float]
    weight: float = 1.0

    @property
    def length(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class Rendered:
    """One row's prompt: token ids, and whether the text had to be shortened."""

    ids: list[int]
    truncated: bool


class ClassificationPrompt:
    r"""Renders `[instruction][text][cue]`, and the answers that follow. The pieces, by the default template:

        instruction  Classify the text into music, sport and return the answer as the exact text label.\ntext:
        text          The match ended in a draw.
        cue          \nlabel:
        answer        sport</s>

    The pieces are encoded one by one and then joined, so that no token straddles two of them: the ids before an answer
    are the same in training and in inference, whatever answer follows, and all rows share the instruction's. A space
    between two pieces belongs to the second one, as tokenizers expect.

    encode: (texts, plain) -> the ids of each, without special tokens around them; plain: a special token's name in a
    text is text like any other, as in rows and labels.
    start, end: ids before the prompt and after an answer.
    few_shot: (text, label indices) pairs, rendered before every row.
    max_length: tokens of a row, `answer_tokens` for the answer and its end included; the TEXT is cut to fit.
    Raises InputError where the instruction leaves no room for text, or the template is malformed.
    """

    def __init__(
        self,
        encode: Encode,
        *,
        labels: Sequence[str],
        multi_label: bool,
        template: str,
        start: Sequence[int],
        end: Sequence[int],
        max_length: int,
        answer_tokens: int | None = None,
        few_shot: Sequence[tuple[str, Sequence[int]]] = (),
    ) -> None:
        self.encode, self._encode_after = encode, after_other_text(encode)
        self.labels, self.multi_label = list(labels), multi_label
        self.template, self.max_length = template, max_length
        self.few_shot = [(text, tuple(gold)) for text, gold in few_shot]
        instruction, cue, answered = split_template(template)
        opening, cue = (part.replace("{labels}", SEPARATOR.join(labels)) for part in (instruction, cue))
        repeated = "\n" + opening[opening.rfind("\n") + 1 :]  # the start of the line that holds the text
        shots = [f"{text}{cue}{SEPARATOR.join(labels[k] for k in gold)}{repeated}" for text, gold in few_shot]
        self._opening, self._cue = opening + "".join(shots), cue
        (instruction_ids,) = encode([opening.rstrip(" ")], False)
        cue_ids, repeated_ids = self._encode_after([cue.rstrip(" "), repeated.rstrip(" ")], False)
        self.cue_ids = cue_ids + ([] if answered else list(end))
        self.end_ids = list(end)
        # " label" begins an answer, ", label" continues one; each is encoded alone, so that an answer's ids are those
        # of its parts.
        space = " " if cue.endswith(" ") else ""
        first, later = [space + label for label in labels], [SEPARATOR + label for label in labels]
        self.first_ids = self._encode_after(first, True) if answered else []
        self.next_ids = self._encode_after(later, True) if answered and multi_label else []
        self._check_labels()
        self._start, self.instruction_ids = list(start), list(start) + instruction_ids
        for text, gold in self.few_shot:  # the same pieces as those of the row itself
            (ids,) = self._encode_texts([text])
            self.instruction_ids += ids + self.cue_ids + self.label_ids(gold) + repeated_ids
        longest = max((len(ids) + len(end) for ids in self.first_ids), default=0)
        self.answer_tokens = answer_tokens or longest
        self._check_room()

    @property
    def text_budget(self) -> int:
        """Tokens that the text of a row may take."""
        return self.max_length - len(self.instruction_ids) - len(self.cue_ids) - self.answer_tokens

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides how a row is rendered."""
        content = repr((self.template, self.labels, self.multi_label, self.few_shot, self.max_length))
        return hashlib.sha256(content.encode()).hexdigest()

    def reserve(self, examples: Sequence[Example]) -> None:
        """Makes room for the longest answer among `examples` (multi-label; a single label's is known)."""
        if self.first_ids:
            longest = max((len(self.answer(example.labels)) for example in examples), default=0)
            self.answer_tokens = max(self.answer_tokens, longest)
            self._check_room()

    def count_shortened(self, data: ClassificationData, train: Sequence[Example]) -> None:
        """Notes in the data report how long the rows of each split are, and how many texts had to be cut.

        train: the training rows that are not in the prompt.
        """
        data.report["max_length"] = self.max_length
        for split, examples in {**data.splits, "train": train}.items():
            if examples:
                rows = list(self.prompts([example.text for example in examples]))
                answers = [len(self.answer(example.labels)) if self.first_ids else 0 for example in examples]
                lengths = [len(row.ids) + answer for row, answer in zip(rows, answers, strict=True)]
                data.report["rows"][split] |= {
                    "shortened": sum(row.truncated for row in rows), "lengths": doctor.quantiles(lengths)
                }  # fmt: skip
                twice = sum(row.ids[: 2 * len(self._start)] == self._start * 2 for row in rows) if self._start else 0
                doctor.add_findings(data.report, doctor.double_start(split, twice))

    def prompt(self, text: str) -> Rendered:
        """The ids of everything before the answer."""
        (rendered,) = self.prompts([text])
        return rendered

    def prompts(self, texts: Sequence[str]) -> Iterator[Rendered]:
        """As `prompt`, for each of the texts; together they are tokenized faster."""
        for start in range(0, len(texts), AT_ONCE):
            for ids in first_ids(self._encode_texts, texts[start : start + AT_ONCE], self.text_budget + 1):
                kept = ids[: self.text_budget]
                yield Rendered(self.instruction_ids + kept + self.cue_ids, len(kept) < len(ids))

    def answer(self, labels: Sequence[int]) -> list[int]:
        """The ids of the answer and its end; no label at all is the end alone."""
        return self.label_ids(labels) + self.end_ids

    def label_ids(self, labels: Sequence[int]) -> list[int]:
        """The ids of an answer without its end."""
        pieces = [self.next_ids[k] if i else self.first_ids[k] for i, k in enumerate(labels)]
        return [token for piece in pieces for token in piece]

    def target(self, labels: Sequence[int]) -> int | list[float]:
        """A classification head's target: the label's index, or 0 / 1 for each label."""
        return [float(k in labels) for k in range(len(self.labels))] if self.multi_label else labels[0]

    def text_of(self, text: str) -> str:
        """The prompt as text, for people."""
        return self._opening + text + self._cue.rstrip(" ")

    def parse(self, answer: str) -> tuple[int, ...] | None:
        """The labels of a generated answer, or None if no such answer exists."""
        names = [name.strip() for name in answer.split(SEPARATOR.strip())] if self.multi_label else [answer.strip()]
        if self.multi_label and names == [""]:
            return ()
        if not set(names) <= set(self.labels) or len(set(names)) != len(names):
            return None
        return tuple(sorted(self.labels.index(name) for name in names))

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        space = " " if self._opening.endswith(" ") else ""
        encode = self.encode if self.instruction_ids == self._start else self._encode_after
        return encode([space + text for text in texts], True)

    def _check_labels(self) -> None:
        """Raises InputError for two labels of the same tokens, whose probabilities would always be equal."""
        seen: dict[tuple[int, ...], str] = {}
        for label, ids in zip(self.labels, self.first_ids, strict=False):  # a head has no ids
            if tuple(ids) in seen:
                raise InputError(
                    f"The labels {seen[tuple(ids)]!r} and {label!r} become the same tokens, so the model cannot tell "
                    "them apart. Rename one, use another --model, or --approach head."
                )
            seen[tuple(ids)] = label

    def _check_room(self) -> None:
        if self.text_budget < 1:
            raise InputError(
                f"--max_length {self.max_length} is too short: the instruction takes {len(self.instruction_ids)} "
                f"tokens, the cue {len(self.cue_ids)} and the longest answer {self.answer_tokens}, which leaves no "
                f"room for text. Set it to at least {self.max_length - self.text_budget + 32}"
                + (", or use fewer --few_shot examples." if self.few_shot else ".")
            )


def classification_rows(
    examples: Sequence[Example], prompt: ClassificationPrompt, weights: Sequence[float] | None
) -> list[AnswerRow] | list[HeadRow]:
    """Training rows. With one label per row, a row has the weight of its label (`weights`)."""
    rows: list[Any] = []
    for example, rendered in zip(examples, prompt.prompts([example.text for example in examples]), strict=True):
        weight = weights[example.labels[0]] if weights and not prompt.multi_label else 1.0
        if prompt.first_ids:
            rows.append(AnswerRow(rendered.ids, prompt.answer(example.labels), weight))
        else:
            rows.append(HeadRow(rendered.ids, prompt.target(example.labels), weight))
    return rows


def show_row(row: AnswerRow | HeadRow, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The row as the model sees it, what is trained on in [[ ]]."""
    if isinstance(row, AnswerRow):
        return f"{tokenizer.decode(row.prompt)}[[{tokenizer.decode(row.answer)}]]"
    return f"{tokenizer.decode(row.prompt)} [[target {row.target}]]"


def read_template(path: str | None, approach: str) -> str:
    """The template of `--prompt_template`, or the approach's default. Raises InputError where it does not fit."""
    if path is None:
        return GENERATIVE_TEMPLATE if approach == "generative" else HEAD_TEMPLATE
    name = f"--prompt_template {path}"
    template = read_text(Path(path), name).rstrip("\n")
    try:
        answered = split_template(template)[2]
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if answered and approach == "head":
        raise InputError(f"{name}: a head gives no answer in text, so take {{label}} out.")
    if not answered and approach == "generative":
        raise InputError(f"{name}: end it with {{label}}, the place of the answer.")
    return template


def split_template(template: str) -> tuple[str, str, bool]:
    """What comes before the text, what comes between text and answer, and whether there is an answer."""
    instruction, separator, cue = template.partition("{text}")
    cue, answered, rest = cue.partition("{label}")
    if not separator or rest.strip() or "{label}" in instruction or "{text}" in cue:
        raise InputError("A prompt template has {text} once, and one that asks for an answer {label} once, at its end.")
    return instruction, cue, bool(answered)


def check_prompt(
    config: ClassificationDataConfig, data: ClassificationData, path: str, revision: str | None = None
) -> None:
    """Refuses a --max_length below the instruction's, or a malformed template, before the model in `path` is loaded.

    Uses the bare tokenizer file; a model without one is checked when its tokenizer is loaded.
    """
    template = read_template(config.prompt_template, config.approach)
    shots, examples = draw_few_shot(data, config)
    file = tokenizer_file(path, revision)
    if file is None:
        return
    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"--model {path}: {file} is damaged ({error}).") from None
    tokenizer.no_truncation()  # as transformers does, whatever the file says
    tokenizer.no_padding()

    def encode(texts: Sequence[str], plain: bool) -> list[list[int]]:
        tokenizer.encode_special_tokens = plain
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    start = tokenizer.encode("").ids[:1]  # BOS or [CLS]; the file does not tell which, but the number is right
    ClassificationPrompt(
        encode, labels=data.labels, multi_label=data.multi_label, template=template, start=start, end=[0],
        max_length=config.max_length, few_shot=shots,
    ).reserve(examples)  # fmt: skip
