"""Text corpora -> token ids on disk -> blocks of equal length, for causal language modelling.

A corpus is read in pieces and its token ids go to a file in the cache, so memory does not grow with it, and the next
run on it starts at once. Neither torch nor transformers is imported; a tokenizer comes in as an argument.
"""

import array
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.data.files import SPLITS, file_hash, iterate_rows, load_hub, reading
from common.errors import InputError
from common.hub import cache_folder
from common.log import Progress

DEMO = "pydoc_topics"  # the language reference that Python's own help() shows; it ships with every Python


SMALLEST_PIECE, LARGEST_PIECE = 2**10, 2**16  # characters


ROWS_LOOKED_AT = 1000  # for a column that no row has
MIN_DOCUMENTS = 10  # with fewer, splits are cut from the end of the text instead of drawn by document
LEAD = "\n"
AT_ONCE = 2**22  # characters that are tokenised together
# Where no tokenizer joins what stands on both sides: in front of a blank and its word; in a text without blanks, at a
# line's start.
CUTS = (re.compile(r"(?<=\S)(?= \S)"), re.compile(r"(?<=\S\n)(?=\S)"))


@dataclass(frozen=True)
class Block:
    """`tokens` in a row; the first `seen` of them count in the block before this one and are context here."""

    id: str
    tokens: list[int]
    seen: int = 0

    @property
    def length(self) -> int:
        return len(self.tokens)


class Blocks:
    """The blocks of a split: its pieces one after another, cut every `stride` tokens into windows of `size`.

    tokens: ids of the whole corpus. spans: [pieces, 2], start and stop of each piece in it. stride: as size, unless
    windows overlap; then only tokens that no earlier window has seen count. The last block may be short; one of a
    single token has nothing to predict and is left out.
    """

    def __init__(self, tokens: np.ndarray, spans: np.ndarray, size: int, stride: int | None = None) -> None:
        self.tokens, self.spans, self.size, self.stride = tokens, spans, size, stride or size
        self.ends = np.cumsum(spans[:, 1] - spans[:, 0])
        self.total = int(self.ends[-1]) if len(spans) else 0
        rest = max(0, self.total - size)
        count = 1 + -(-rest // self.stride) if self.total > 1 else 0
        if self.stride == size and count > 1 and self.total - (count - 1) * size < 2:
            count -= 1
        self.numbers = np.arange(count)

    def draw(self, count: int | None, seed: int) -> "Blocks":
        """`count` of the blocks, drawn by `seed`, in their order; all if None."""
        if count and count < len(self.numbers):
            drawn = np.random.default_rng(seed).permutation(len(self.numbers))[:count]
            self.numbers = self.numbers[np.sort(drawn)]
        return self

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Block:
        number = int(self.numbers[index])
        start = number * self.stride
        seen = self.size - self.stride if number else 0
        return Block(str(number), self._slice(start, start + self.size), seen)

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each block."""
        return np.minimum(self.size, self.total - self.numbers * self.stride)

    def _slice(self, start: int, stop: int) -> list[int]:
        stop, ids = min(stop, self.total), []
        piece = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            inside = start - (int(self.ends[piece - 1]) if piece else 0)
            first = int(self.spans[piece, 0]) + inside
            taken = self.tokens[first : min(int(self.spans[piece, 1]), first + stop - start)]
            ids += taken.tolist()
            start, piece = start + len(taken), piece + 1
        return ids


@dataclass
class CorpusData:
    """The three splits as blocks (a missing one is empty), and how much text a token of each split stands for."""

    splits: dict[str, Blocks]
    sources: dict[str, dict[str, str]]  # split -> file (or data set) and its hash
    per_token: dict[str, dict[str, float]]  # split -> {bytes, words} of a token on average
    report: dict[str, Any] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)  # split -> numbers of the pieces cut from train


@dataclass
class Source:
    """A text to be read: `texts()` gives it in parts, each with whether a document ends behind it."""

    name: str
    sha256: str
    texts: Callable[[], Iterator[tuple[str, bool]]]
    characters: int  # about, for the size of its pieces
    read_as: tuple[Any, ...] = ()  # what else decides its text: the file type, the columns that were asked for


def open_sources(config: Any) -> dict[str, Source]:
    """split -> Source, of the files or hub data set that the options name; of Python's documentation without any.

    Raises InputError that names file, row and column for what cannot be used; of a file, its beginning is read.
    """
    if config.dataset_name:
        sources = _hub_sources(config)
    elif config.text_fields and not (config.train_file or config.validation_file or config.test_file):
        raise InputError("--text_fields needs a file or data set: the demo text has no columns.")
    else:
        paths = {"train": config.train_file, "validation": config.validation_file, "test": config.test_file}
        paths = {split: Path(path) for split, path in paths.items() if path}
        sources = {split: _file_source(path, config) for split, path in paths.items()} or {"train": _demo_source()}
    for source in sources.values():
        if not any(text.strip() for text, _ in source.texts()):
            raise InputError(f"{source.name}: there is no text in it.")
    return sources


def _demo_source() -> Source:
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())]
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()
    return Source(DEMO, digest, lambda: ((text, True) for text in texts), sum(map(len, texts)))


def _file_source(path: Path, config: Any) -> Source:
    if path.suffix.lower() == ".txt":
        if config.text_fields:
            raise InputError(f"{path}: a text file has no columns: drop --text_fields.")
        texts = _text_file
    else:
        texts = lambda path: _row_texts(iterate_rows(path), str(path), config)  # noqa: E731
    with reading(path):
        read_as = (path.suffix.lower(), config.text_fields)
        return Source(str(path), file_hash(path), lambda: texts(path), path.stat().st_size, read_as)


def _text_file(path: Path) -> Iterator[tuple[str, bool]]:
    """The whole file is one document."""
    with reading(path), open(path, encoding="utf-8-sig", newline="") as file:
        while text := file.read(LARGEST_PIECE):
            yield text, False
    yield "", True


def _hub_sources(config: Any) -> dict[str, Source]:
    sources = {}
    for split, part in load_hub(config).items():
        name = f"{config.dataset_name} [{split}]"
        texts = lambda part=part, name=name: _row_texts(iter(part), name, config)  # noqa: E731
        digest, size = hashlib.sha256(), 0
        for text, ends in texts():
            digest.update(text.encode() + bytes([ends]))
            size += len(text)
        sources[split] = Source(name, digest.hexdigest(), texts, size, ("hub", config.text_fields))
    return sources


def _row_texts(rows: Iterator[dict[str, Any]], source: str, config: Any) -> Iterator[tuple[str, bool]]:
    """Each row is a document; but one that is a line, with its line break, goes on in the next.

    Between such rows, an empty one is a blank line.
    """
    fields, open_text, lacking, row = config.text_fields, False, set(), {}
    for number, row in enumerate(rows, 1):
        if number == 1:
            guesses = (["text"], ["title", "abstract"])
            fields = fields or next((names for names in guesses if set(names) <= set(row)), ["text"])
            lacking = set(fields)
        lacking -= row.keys()
        if lacking and (number == ROWS_LOOKED_AT or len(lacking) == len(fields)):
            raise _no_column(source, lacking, row)
        cells = [row.get(name) for name in fields]
        text = "\n".join(str(cell) for cell in cells if cell is not None and cell == cell)  # NaN is not itself
        text = text.encode("utf-8", "replace").decode()  # JSON can hold halves of a surrogate pair
        if not text:
            text = "\n" * open_text
        open_text = text.endswith("\n") and "\n" not in text[:-1]
        yield text, bool(text) and not open_text
    if lacking:
        raise _no_column(source, lacking, row)
    if open_text:
        yield "", True


def _no_column(source: str, lacking: set[str], row: dict[str, Any]) -> InputError:
    return InputError(
        f"{source}: there is no text column {min(lacking)!r}; it has {', '.join(map(str, row))}. Name the text columns "
        "with --text_fields."
    )


def _pieces(source: Source) -> Iterator[tuple[str, bool]]:
    """The texts in pieces that can be tokenised one by one, each with whether a document ends behind it."""
    size = min(LARGEST_PIECE, max(SMALLEST_PIECE, source.characters // 256))
    rest = ""
    for text, ends in source.texts():
        rest += text
        while len(rest) > 2 * size:
            found = next(filter(None, (cut.search(rest, size, 2 * size) for cut in CUTS)), None)
            end = found.start() if found else 2 * size
            yield rest[:end], False
            rest = rest[end:]
        if ends:
            if rest:
                yield rest, True
            rest = ""


def tokenise(source: Source, tokenizer: Any, progress: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the whole corpus, and [pieces, 5]: tokens, bytes, words, document, whether it ends there.

    Documents end with the end token; names of special tokens in the text are text. Both come from the cache where the
    same text has been tokenised by the same tokenizer before. progress: called with characters done.
    """
    rule = (
        source.sha256,
        source.read_as,
        _fingerprint(tokenizer),
        tokenizer.eos_token_id,
        SMALLEST_PIECE,
        LARGEST_PIECE,
        *(cut.pattern for cut in CUTS),
    )
    folder = cache_folder() / "tokens" / hashlib.sha256(repr(rule).encode()).hexdigest()[:32]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))
        try:
            _write_tokens(scratch, source, tokenizer, progress)
            os.replace(scratch, folder)
        except OSError:
            if not folder.exists():  # another process has not been faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    pieces = np.load(folder / "pieces.npy")
    return np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r"), pieces


def _fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()])
    return hashlib.sha256(content.encode()).hexdigest()


def _write_tokens(folder: Path, source: Source, tokenizer: Any, progress: Callable[[int], None]) -> None:
    table = array.array("q")
    document, waiting, size, inside = 0, [], 0, False

    def encode(texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        return tokenizer(texts, **options)["input_ids"]

    (lead,) = encode([LEAD])

    def flush() -> None:
        nonlocal document, waiting, size
        # What goes on from another piece is encoded behind a line break: alone, some tokenizers put a blank in front.
        encoded = encode([LEAD * inside + text for text, _, inside in waiting])
        for (text, ends, inside), ids in zip(waiting, encoded, strict=True):
            ids = ids[len(lead) :] if inside and ids[: len(lead)] == lead else ids
            ids = [*ids, tokenizer.eos_token_id] if ends else ids
            np.asarray(ids, dtype=np.uint32).tofile(file)
            table.extend((len(ids), len(text.encode()), len(text.split()), document, ends))
            document += ends
        progress(size)
        waiting, size = [], 0

    with open(folder / "tokens.bin", "wb") as file:
        for text, ends in _pieces(source):
            waiting.append((text, ends, inside))
            size, inside = size + len(text), not ends
            if size >= AT_ONCE:
                flush()
        if waiting:
            flush()
    np.save(folder / "pieces.npy", np.frombuffer(table, dtype=np.int64).reshape(-1, 5))


def load_corpus(
    sources: dict[str, Source], config: Any, tokenizer: Any, progress: Callable[[int], None] = lambda n: None
) -> CorpusData:
    """Tokenises and cuts the splits that `config` describes (DataConfig and CausalConfig).

    Splits that no file gives are cut from train: of at least MIN_DOCUMENTS documents some are drawn by --split_seed;
    of fewer, the end of the text is taken, since a piece from its middle would have its context in training.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no end token (eos), so documents could not be told apart.")
    report: dict[str, Any] = {"files": {}, "splits": {}}
    tables: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # split -> tokens, spans, pieces
    for split, source in sources.items():
        tokens, pieces = tokenise(source, tokenizer, progress)
        stops = np.cumsum(pieces[:, 0])
        tables[split] = tokens, np.stack([stops - pieces[:, 0], stops], 1), pieces
        report["files"][split] = {"name": source.name, "sha256": source.sha256}
    cut = _cut(tables["train"][2], set(sources), config) if "train" in sources else {}
    for split, numbers in cut.items():
        tokens, spans, pieces = tables["train"]
        tables[split] = tokens, spans[numbers], pieces[numbers]
    data = CorpusData({}, report["files"], {}, report, {s: n.tolist() for s, n in cut.items() if s != "train"})
    for split in SPLITS:
        tokens, spans, pieces = tables.get(split) or (np.empty(0, np.uint32), np.empty((0, 2), int), np.empty((0, 5)))
        overlap = config.stride if split != "train" else None
        blocks = Blocks(tokens, spans, config.block_size, overlap)
        if split in tables:
            if not len(blocks):
                raise InputError(f"The {split} split has no two tokens of text. Give --{split}_file, or more text.")
            count, size, words = (int(total) for total in pieces[:, :3].sum(0))
            documents = int(pieces[:, 4].sum())
            report["splits"][split] = {"documents": documents, "bytes": size, "words": words, "tokens": count}
            report["splits"][split]["blocks"] = len(blocks)
            data.per_token[split] = {"bytes": size / count, "words": words / count}
            limit = {"train": config.max_train_samples, "validation": config.max_eval_samples}.get(split)
            report["splits"][split]["used"] = len(blocks.draw(limit, config.split_seed))
        data.splits[split] = blocks
    return data


def load_corpus_once(sources: dict[str, Source], config: Any, tokenizer: Any, accelerator: Any) -> CorpusData:
    """`load_corpus`, with its progress shown: on each machine's main process first, as the others find its tokens.

    A text that cannot be used is an error of every process, so that none waits for one that has ended.
    """
    data, failed = None, None
    with accelerator.local_main_process_first():
        progress = Progress(accelerator, "tokens", sum(source.characters for source in sources.values()), "character")
        try:
            data = load_corpus(sources, config, tokenizer, progress)
        except InputError as error:
            failed = error
        progress.close()
    if failed:
        raise failed
    return data


def _cut(pieces: np.ndarray, given: set[str], config: Any) -> dict[str, np.ndarray]:
    """split -> numbers of the training file's pieces, `train` included; only the splits that no file gives."""
    documents = int(pieces[:, 4].sum())
    wanted = {"test": config.test_fraction, "validation": config.validation_fraction}
    wanted = {split: share for split, share in wanted.items() if split not in given and share}
    rest = np.arange(len(pieces))
    result = {}
    if documents >= MIN_DOCUMENTS:
        order = np.random.default_rng(config.split_seed).permutation(documents)
        for split, share in wanted.items():
            count = max(1, round(documents * share))
            drawn, order = order[:count], order[count:]
            result[split] = np.flatnonzero(np.isin(pieces[:, 3], drawn))
        rest = np.flatnonzero(np.isin(pieces[:, 3], order))
    else:
        total = pieces[:, 0].sum()
        for split, share in wanted.items():
            behind = np.cumsum(pieces[rest[::-1], 0])[::-1]  # tokens from each piece on
            first = int(np.sum(behind > total * share))
            first = min(first, len(rest) - 1)
            result[split], rest = rest[first:], rest[:first]
    if not len(rest):
        raise InputError(
            "The text is too short to cut "
            + " and ".join(wanted)
            + " from it: give --validation_file and --test_file, or set --validation_fraction 0 --test_fraction 0."
        )
    return {**result, "train": rest}


def document_starts(tokens: Sequence[int], end_id: int) -> list[int]:
    """Where further documents begin in a block: behind every end token but one at its very end."""
    return [i + 1 for i, token in enumerate(tokens[:-1]) if token == end_id]
