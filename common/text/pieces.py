"""Rendered conversations -> token ids, piece by piece, so that no token straddles the edges of an answer.

What a template writes may contain special tokens; what a person or a model wrote may not: there, the name of a special
token is text like any other. Until it is encoded, such a name is between two markers.
"""

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # the markers; Unicode keeps both free for such use
MARKERS = re.compile(f"[{OPEN}{CLOSE}]")
MARKED = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
TAIL = 32  # characters before an answer that may decide how its first token looks


class PieceEncoder:
    """Encodes the pieces of a text one at a time, each as it would be encoded after the piece before it.

    end: the token that ends an answer, which is special in a turn even where the tokenizer does not say so.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", end: str) -> None:
        self.tokenizer = tokenizer
        self.special = any_of(special_names(tokenizer) | {end})
        strips = {token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip}
        # A token that merges with nothing after it: the context of a piece that would merge with its own.
        self.anchor = next((name for name in (tokenizer.eos_token, end) if name and name not in strips), "")
        self.encode = functools.lru_cache(maxsize=256)(self._encode)  # rows of a conversation begin alike

    def mark(self, content: str) -> str:
        """The content of a turn, with markers around the names of special tokens."""
        return self.special.sub(lambda found: f"{OPEN}{found[0]}{CLOSE}", MARKERS.sub("", content))

    def _encode(self, piece: str, before: str) -> list[int]:
        """The ids of a piece that follows the text `before`."""
        ids: list[int] = []
        for i, part in enumerate(MARKED.split(piece)):
            if i % 2:  # a marked name
                ids += self._spell(part)
                before = self.anchor
            elif part:
                ids += self._continue(before, part)
        return ids

    def tail(self, text: str) -> str:
        """The end of a text that a piece may follow, from its last special token on if that is near."""
        tail = MARKERS.sub("", text[-TAIL:])
        starts = [found.start() for found in self.special.finditer(tail)]
        return tail[starts[-1] :] if starts else tail

    def _continue(self, before: str, text: str) -> list[int]:
        """The ids of `text` as they are after `before`; where a token would straddle the two, as after a special token.

        Encoded without context, some tokenizers would put a space before it.
        """
        for context in (before, self.anchor, ""):
            ids = self._ids(context) if context else []
            both = self._ids(context + text)
            if both[: len(ids)] == ids:
                break
        return both[len(ids) :]

    def _spell(self, name: str) -> list[int]:
        """The ids of a special token's name as ordinary text."""
        ids = self.tokenizer(name, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self.tokenizer.convert_tokens_to_ids(name) in ids:  # an added token that is not special is never split
            return self._ids(name[:1]) + self._ids(name[1:])
        return ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


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
