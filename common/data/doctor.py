"""What is likely wrong with rows: copies, contradictions, leftovers of templates, answers that teach little.

A finding is a line of the data report; there is none where nothing was found. Imports neither torch nor transformers.
Running text can be larger than memory, so of its documents only hashes and flags are kept.
"""

import array
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHOWN = 5  # rows named in a finding
FEW_ROWS = 10  # of a class; with fewer, a model learns it by chance
SHORT_ANSWERS = 0.01  # share of one-token answers from which on they are a finding
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
# Of a template that was never filled in, and of one that was: its special tokens, which are text like any other here.
PLACEHOLDER = re.compile(
    r"\{\{ *[^\W\d_][\w .-]{0,40}\}\}|[\[<](?:insert|your|enter|customer|company)[ _][\w .-]{1,40}[\]>]", re.IGNORECASE
)
RENDERED = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|begin_of_text|start_header_id|end_header_id|user|assistant|system)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|^\s*(?:<s>|<bos>|\[CLS\])"
)
# What may be wrong with a document of running text, as bits.
UNFILLED, MARKED, TWO_STARTS, NO_TEXT, ONE_TOKEN = (1 << bit for bit in range(5))
UNFILLED_TEXT, MARKED_TEXT = (
    "placeholders of a template that nobody filled in",
    "special tokens of a rendered template, which are text here",
)
FLAWS = {
    UNFILLED: f"with {UNFILLED_TEXT}",
    MARKED: f"with {MARKED_TEXT}",
    TWO_STARTS: "with a BOS token at the start, where every block has one already",
    NO_TEXT: "with nothing but white space",
    ONE_TOKEN: "of a single token",
}
DOCUMENT = np.dtype([("hash", np.uint64), ("flaws", np.uint8)])


@dataclass(frozen=True)
class Item:
    """What a row asks and answers. question: its text, for people; answer: anything that can be compared."""

    id: str
    question: str
    answer: Any
    written: str = ""  # the answer's text, where it is one of its own


class _Spaced(dict[int, str]):
    """For `str.translate`: a blank for punctuation, spaces and control characters; else the character."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = " " if unicodedata.category(character)[0] in "PZC" else character
        return self[code]


SPACED = _Spaced()


def normalized(text: str) -> str:
    """The same for texts that differ in case, spaces, punctuation and the form of characters (NFKC) alone."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().translate(SPACED).split()) or " ".join(text.split())


def examine(splits: Mapping[str, Sequence[Item]]) -> list[str]:
    """The findings about the rows of all splits, `train` the first."""
    found = []
    first: dict[str, tuple[str, Item]] = {}  # normalized question -> where it came first
    for split, items in splits.items():
        copies: dict[str, list[Item]] = {}
        conflicts: dict[str, list[Item]] = {}
        for item in items:
            where, earlier = first.setdefault(normalized(item.question), (split, item))
            if earlier is not item:
                group = copies if earlier.answer == item.answer else conflicts
                group.setdefault(where, []).append(item)
        alike, other = "but for case, spaces and punctuation", "and the answer is another"
        for groups, what in ((copies, alike), (conflicts, other)):
            for where, rows in groups.items():
                there = "an earlier one" if where == split else f"one of {where}"
                found.append(f"{split}: {_count(rows)} {there}, {what} {_named(rows)}")
        for pattern, what in (
            (PLACEHOLDER, UNFILLED_TEXT),
            (RENDERED, MARKED_TEXT),
        ):
            hits = [(item, match[0].strip()) for item in items if (match := _search(pattern, item))]
            if hits:
                example, named = hits[0][1], _named(item for item, _ in hits)
                found.append(f"{split}: {_rows(len(hits))} with {what}, such as {example} {named}")
    return found


def add_findings(report: dict[str, Any], found: Sequence[str]) -> None:
    """Adds them to the data report, unless an earlier run, as of several seeds, has done it."""
    known = report.setdefault("findings", [])
    known += [line for line in found if line not in known]


class Documents:
    """Collects what is known of the documents of a running text, which come in pieces.

    bos: the id of the tokenizer's BOS token, if it has one. A placeholder that two pieces share is not seen.
    """

    def __init__(self, bos: int | None) -> None:
        self.bos, self._hashes, self._flaws = bos, array.array("Q"), bytearray()
        self._begin()

    def _begin(self) -> None:
        self._digest, self._tokens, self._current, self._blank = hashlib.blake2b(digest_size=8), 0, 0, True

    def add(self, text: str, ids: Sequence[int], ends: bool) -> None:
        """The next piece, its tokens, without an end token, and whether its document ends with it."""
        if not self._tokens:
            self._current |= TWO_STARTS * (bool(ids) and ids[0] == self.bos)
        if any(sign in text for sign in ("{{", "[", "<")):  # all that the patterns match begins with one of these
            self._current |= UNFILLED * bool(PLACEHOLDER.search(text)) | MARKED * bool(RENDERED.search(text))
        self._digest.update(f"{normalized(text)} ".encode())
        self._blank &= not text or text.isspace()
        self._tokens += len(ids)
        if ends:
            few = NO_TEXT if self._blank else ONE_TOKEN if self._tokens < 2 else 0
            self._hashes.append(int.from_bytes(self._digest.digest(), "little"))
            self._flaws.append(self._current | few)
            self._begin()

    def table(self) -> np.ndarray:
        """[documents] of DOCUMENT."""
        table = np.empty(len(self._hashes), DOCUMENT)
        table["hash"], table["flaws"] = np.frombuffer(self._hashes, np.uint64), np.frombuffer(self._flaws, np.uint8)
        return table


def examine_documents(splits: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """The findings about running text. splits, `train` the first: name -> DOCUMENT of its source, numbers of its own.

    Two documents with one hash of 64 bits count as copies.
    """
    found: list[str] = []
    known: dict[str, np.ndarray] = {}  # split -> hashes

    def note(split: str, numbers: np.ndarray, what: str, verb: str = "") -> None:
        if count := len(numbers):
            first = ", ".join(map(str, numbers[:SHOWN])) + ", ..." * (count > SHOWN)
            name = f"document{'s' * (count > 1)} {verb + 's' * (verb != '' and count == 1)}".strip()
            found.append(f"{split}: {count} {name} {what} (ids {first})")

    for split, (table, numbers) in splits.items():
        documents = table[numbers]
        new = documents["flaws"] & NO_TEXT == 0
        for earlier, hashes in known.items():
            copies = new & np.isin(documents["hash"], hashes)
            note(split, numbers[copies], f"one of {earlier}, but for case, spaces and punctuation", "repeat")
            new &= ~copies
        known[split], first = np.unique(documents["hash"][new], return_index=True)
        copies = np.flatnonzero(new)
        copies = np.delete(copies, first)
        note(split, numbers[copies], "an earlier one, but for case, spaces and punctuation", "repeat")
        for flaw, what in FLAWS.items():
            note(split, numbers[documents["flaws"] & flaw != 0], what)
    return found


def few_rows(counts: Mapping[str, int]) -> list[str]:
    """A finding about the labels with fewer than FEW_ROWS training rows. counts: label -> rows; 0 is told elsewhere."""
    rare = [f"{label} ({count})" for label, count in counts.items() if 0 < count < FEW_ROWS]
    more = ", ..." if len(rare) > SHOWN else ""
    return [f"train: labels with fewer than {FEW_ROWS} rows: {', '.join(rare[:SHOWN])}{more}"] if rare else []


def short_answers(split: str, short: int, answers: int) -> list[str]:
    """A finding about answers of a single token, if they are more than a few. short: their number."""
    if short < SHORT_ANSWERS * answers or not short:
        return []
    return [f"{split}: {short} of {answers} answers are a single token, which teaches to be curt"]


def double_start(split: str, rows: int) -> list[str]:
    """A finding about rows that begin with two BOS tokens."""
    return [f"{split}: {_rows(rows)} with two BOS tokens at the start: take one out of the template"] if rows else []


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """name -> length that this share of the rows does not exceed."""
    return {name: int(np.quantile(lengths, share, method="inverted_cdf")) for name, share in QUANTILES.items()}


def _search(pattern: re.Pattern, item: Item) -> re.Match | None:
    return pattern.search(item.question) or (pattern.search(item.written) if item.written else None)


def _count(group: Sequence[Item]) -> str:
    return f"{len(group)} row{' repeats' if len(group) == 1 else 's repeat'}"


def _rows(number: int) -> str:
    return f"{number} row{'s' * (number > 1)}"


def _named(items: Iterable[Item]) -> str:
    ids = [item.id for item in items]
    return f"(ids {', '.join(ids[:SHOWN])}{', ...' if len(ids) > SHOWN else ''})"
