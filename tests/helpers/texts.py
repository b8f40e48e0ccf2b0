"""Running text, and what load_corpus makes of it."""

import random
from dataclasses import dataclass

from common.data.corpus import CorpusData, load_corpus, open_sources
from common.options import CausalConfig, DataConfig

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "bake"]


@dataclass
class Config(DataConfig, CausalConfig):
    pass


def prose(lines: int, seed: int = 0) -> str:
    """Paragraphs with headings, blank lines and indented ones."""
    rng = random.Random(seed)
    text = []
    for _i in range(lines):
        line = " ".join(rng.choices(WORDS, k=rng.randint(3, 15))) + rng.choice([".", " .", ""])
        text.append(rng.choice(["", " ", " = "]) + line + rng.choice(["\n", "\n\n", " \n \n"]))
    return "".join(text)


def load(tokenizer, **options) -> CorpusData:
    config = Config(**options)
    return load_corpus(open_sources(config), config, tokenizer)
