"""Rendered conversations -> token ids, piece by piece, so that no token straddles the edges of an answer.

What a template writes may contain special tokens; what a person or a model wrote may not: there, the name of a special
token is text like any other. Until it is encoded, such a name is between two markers. In an answer, tokens with which a
model structures its own answers, such as <think> and </think>, are the exception.
"""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # the markers; Unicode keeps both free for such use
MARKERS = re.compile(f"[{OPEN}{CLOSE}]")
MARKED = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
KEPT = 2**22  # characters whose ids are kept
TAIL = 32  # characters before an answer that may decide how its first token looks
CHARACTERS = 8  # for each token that is wanted of a long text, at first
MARGIN = 64  # tokens; where a text is cut, so many at most may become others
Encode = Callable[[Sequence[str], bool], list[list[int]]]  # as of ClassificationPrompt


class PieceEncoder:
    """Encodes the pieces of a text one at a time, each as it would be encoded after the piece before it.

    end: the token that ends an answer, which is special in a turn even where the tokenizer does not say so.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", end: str) -> None:
        self.tokenizer = tokenizer
        self.names = special_names(tokenizer) | {end}
        self.special = any_of(self.names)
        self.let_answers_have(set())
        strips = {token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip}
        # A token that merges with nothing after it: the context of a piece that would merge with its own.
        self.anchor = next((name for name in (tokenizer.eos_token, end) if name and name not in strips), "")
        self._lead = functools.lru_cache(maxsize=1024)(lambda text: self._ids([text])[0])
        self._known: dict[tuple[str, str, int], list[int]] = {}  # rows of a conversation begin alike
        self._characters = 0  # in it

    def let_answers_have(self, names: set[str]) -> None:
        """From now on, these names in an answer are tokens."""
        self._text_in_answers = any_of(self.names - names)

    def mark(self, content: str, role: str = "") -> str:
        """The content of a turn, with markers around the names of special tokens."""
        names = self._text_in_answers if role == "assistant" else self.special
        return names.sub(lambda found: f"{OPEN}{found[0]}{CLOSE}", MARKERS.sub("", content))

    def taken_apart(self, text: str) -> str:
        """What is around the first marker in a rendered text that has lost its pair, for people; usually nothing."""
        rest = re.sub(f"{OPEN}({self.special.pattern}){CLOSE}", r"\1", text)
        half = MARKERS.search(rest)
        return unmark(rest[max(0, half.start() - 20) : half.start() + 20]) if half else ""

    def encode(self, pairs: Sequence[tuple[str, str]], most: int = sys.maxsize) -> list[list[int]]:
        """The ids of pieces, given as (piece, the text before it).

        most: of a piece with more ids than this, there may be fewer than all, but more than this.
        """
        wanted = [(*pair, most) for pair in pairs]
        new = [key for key in dict.fromkeys(wanted) if key not in self._known]
        self._characters += sum(len(piece) for piece, _, _ in new)
        if self._characters > KEPT:
            self._known, new = {}, list(dict.fromkeys(wanted))
            self._characters = sum(len(piece) for piece, _, _ in new)
        self._known |= zip(new, self._encode([(piece, before) for piece, before, _ in new], most), strict=True)
        return [self._known[key] for key in wanted]

    def _encode(self, pairs: Sequence[tuple[str, str]], most: int) -> list[list[int]]:
        split = [MARKED.split(piece) for piece, _ in pairs]  # every second part is a marked name
        texts = [
            (self.anchor if i else before, text)
            for (_, before), parts in zip(pairs, split, strict=True)
            for i, text in enumerate(parts[::2])
            if text
        ]
        found = iter(self._continue(texts, most))
        return [
            [token for i, part in enumerate(parts) if part for token in (self._spell(part) if i % 2 else next(found))]
            for parts in split
        ]

    def tail(self, text: str) -> str:
        """The end of a text that a piece may follow, from its last special token on if that is near."""
        tail = MARKERS.sub("", text[-TAIL:])
        starts = [found.start() for found in self.special.finditer(tail)]
        return tail[starts[-1] :] if starts else tail

    def _continue(self, pairs: Sequence[tuple[str, str]], most: int) -> list[list[int]]:
        """The ids of each text as it is after `before`; as after a special token, where a token would straddle the two.

        Encoded without context, some tokenizers would put a space before it. pairs: (before, text).
        """
        found: dict[tuple[str, str], list[int]] = {}
        for choose in (lambda before: before, lambda _: self.anchor, lambda _: ""):
            waiting = [pair for pair in pairs if pair not in found]
            contexts = [choose(before) for before, _ in waiting]
            leads = list(map(self._lead, contexts))
            joined = [context + text for context, (_, text) in zip(contexts, waiting, strict=True)]
            both = first_ids(self._ids, joined, most + 1 + max(map(len, leads), default=0))
            for pair, lead, ids in zip(waiting, leads, both, strict=True):
                if ids[: len(lead)] == lead:
                    found[pair] = ids[len(lead) :]
        return [found[pair] for pair in pairs]

    def _spell(self, name: str) -> list[int]:
        """The ids of a special token's name as ordinary text."""
        ids = self.tokenizer(name, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self.tokenizer.convert_tokens_to_ids(name) in ids:  # an added token that is not special is never split
            return [token for part in self._ids([name[:1], name[1:]]) for token in part]
        return ids

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        different = list(dict.fromkeys(filter(None, texts)))
        ids = self.tokenizer(different, add_special_tokens=False)["input_ids"] if different else []
        known = {"": [], **dict(zip(different, ids, strict=True))}
        return [known[text] for text in texts]


def after_other_text(encode: Encode) -> Encode:
    """`encode`, for texts that come after others: in front of a text, the tokenizers of some families put a space."""
    line, letter, both = encode(["\n", "a", "\na"], True)
    if both == line + letter:
        return encode

    def encode_after(texts: Sequence[str], plain: bool) -> list[list[int]]:
        leads = [("a", letter) if text[:1].isspace() else ("\n", line) for text in texts]  # a token of its own
        both = encode([before + text for (before, _), text in zip(leads, texts, strict=True)], plain)
        return [
            ids[len(lead) :] if ids[: len(lead)] == lead else encode([text], plain)[0]
            for (_, lead), text, ids in zip(leads, texts, both, strict=True)
        ]

    return encode_after


def first_ids(encode: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str], count: int) -> list[list[int]]:
    """The ids of each text: all, or of a long one at least the first `count`.

    Of a long text only the beginning is encoded. The last ids of that depend on where it ends: MARGIN are left out.
    """
    size, waiting = CHARACTERS * (count + MARGIN), list(range(len(texts)))
    result: list[list[int]] = [[]] * len(texts)
    while waiting:
        for i, ids in zip(waiting, encode([texts[i][:size] for i in waiting]), strict=True):
            result[i] = ids if len(texts[i]) <= size else ids[:-MARGIN]
        waiting = [i for i in waiting if len(texts[i]) > size and len(result[i]) < count]
        size *= 4
    return result


def special_names(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The names of the tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special and token.content.strip()} | set(
        tokenizer.all_special_tokens
    )


def unmark(text: str) -> str:
    """The text without markers, for people."""
    return MARKERS.sub("", text)


def any_of(names: set[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest first; nothing where there is none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name)))) or "(?!)")
