"""Running text -> blocks of token ids, for causal language modeling.

    source    the rows or the text file        A quick fox jumps. | The end.       2 documents
    pieces    1 to 64 thousand characters      [A quick][ fox jumps.] [The end.]   cut where no tokenizer joins
    tokens    on disk, one file                 5 81  23 44 7 </s>    9 12 </s>    an end token after each document
    splits    pieces of drawn documents        train: pieces 0, 1; test: piece 2   (of one long document, its end)
    blocks    windows of --block_size tokens   [5 81 23] [44 7 </s>]

The tokens are kept in the cache: memory does not grow with the text, and the next run on it starts at once.
Neither torch nor transformers is imported; a tokenizer comes in as an argument.
"""

import array
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.data import doctor
from common.data.files import Row, file_hash, iterate_rows, reading, require_columns, text_columns, text_in
from common.data.splits import SPLITS, Sources, given_files, open_hub, require_training_rows
from common.disk import cached_folder, named
from common.errors import InputError
from common.log import Progress
from common.options import CausalConfig, CorpusDataConfig, TextConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase as Tokenizer

SMALLEST_PIECE, LARGEST_PIECE = 2**10, 2**16  # characters
FORMAT = 4  # of what is kept in the cache: raise it where the pieces of the same text get other fields
AT_ONCE = 2**22  # characters that are tokenized together
# No tokenizer joins what is on both sides: before a space and its word; in a text without spaces, at a line's start.
CUTS = (re.compile(r"(?<=\S)(?= \S)"), re.compile(r"(?<=\S\n)(?=\S)"))
LEAD = "\n"  # precedes a piece that continues a document: alone, some tokenizers would put a space in front
ROWS_LOOKED_AT = 1000  # before a column counts as missing
# With fewer, splits are cut from the end of the text instead of drawn by document, and intervals draw stretches of it.
MIN_DOCUMENTS = 10
STRETCHES = 50
PIECE = np.dtype([(name, np.int64) for name in ("start", "tokens", "bytes", "words", "document", "ends")])


@dataclass(frozen=True)
class Block:
    """Consecutive `tokens`; the first `seen` of them count in the block before this one and are context here.

    document: the number of the one that the first token that counts is from.
    """

    id: str
    tokens: list[int]
    seen: int = 0
    document: int = 0

    @property
    def length(self) -> int:
        return len(self.tokens)


class Blocks(Sequence[Block]):
    """The blocks of a split: its pieces one after another, cut every `stride` tokens into windows of `size`.

    tokens: ids of the whole corpus. pieces: [pieces] of PIECE, those of the split. stride: as size, unless windows
    overlap; then only tokens that no earlier window has seen count. The last block may be short; one of a single token
    has nothing to predict and is left out.
    """

    def __init__(self, tokens: np.ndarray, pieces: np.ndarray, size: int, stride: int | None = None) -> None:
        self.tokens, self.pieces, self.size, self.stride = tokens, pieces, size, stride or size
        self.ends = np.cumsum(pieces["tokens"])  # of the pieces, in tokens of the split
        self.total = int(self.ends[-1]) if len(pieces) else 0
        rest = max(0, self.total - size)
        count = 1 + -(-rest // self.stride) if self.total > 1 else 0
        if self.stride == size and count > 1 and self.total - (count - 1) * size < 2:
            count -= 1
        self.numbers = np.arange(count)

    def draw(self, count: int | None, seed: int) -> None:
        """Keeps `count` of the blocks, drawn by `seed`, in their order; all if None."""
        if count and count < len(self):
            self.numbers = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]
        number = int(self.numbers[index])
        start, seen = number * self.stride, self.size - self.stride if number else 0
        document = self.pieces["document"][np.searchsorted(self.ends, start + seen, side="right")]
        return Block(str(number), self._slice(start, start + self.size), seen, int(document))

    @property
    def lengths(self) -> np.ndarray:
        """[blocks], the tokens of each."""
        return np.minimum(self.size, self.total - self.numbers * self.stride)

    def _slice(self, start: int, stop: int) -> list[int]:
        """The ids from `start` to `stop`, in tokens of the split."""
        ids: list[int] = []
        stop, piece = min(stop, self.total), int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            until = min(stop, int(self.ends[piece]))
            # Where the piece is in the file of tokens, against where it is in the split.
            shift = int(self.pieces["start"][piece] + self.pieces["tokens"][piece] - self.ends[piece])
            ids += self.tokens[start + shift : until + shift].tolist()
            start, piece = until, piece + 1
        return ids


@dataclass
class CorpusData:
    """The three splits as blocks (a missing one is empty), and the data report.

    per_token: split -> {bytes, words} of a token on average. cut: split -> numbers of the pieces cut from train.
    """

    splits: dict[str, Blocks]
    sources: Sources
    per_token: dict[str, dict[str, float]]
    report: dict[str, Any] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)


Parts = Iterator[tuple[str, bool]]  # of a text, each with whether a document ends after it


@dataclass
class Source:
    """A text to be read, as often as `parts` is called."""

    name: str
    sha256: str
    parts: Callable[[], Parts]
    characters: int  # about, for the size of its pieces
    read_as: tuple[Any, ...] = ()  # what else decides its text: the file type, --text_fields

    @property
    def origin(self) -> dict[str, str]:
        return {"name": self.name, "sha256": self.sha256}


def open_sources(config: CorpusDataConfig, training: bool = True) -> dict[str, Source]:
    """split -> Source, of the files or hub data set that the options name, else of Python's documentation.

    Raises InputError that names file, row and column for what cannot be used; of a file, its beginning is read.
    """
    files = given_files(config)
    if config.dataset_name:
        sources = _hub_sources(config.dataset_name, config.dataset_config, config)
    elif files:
        sources = {split: _file_source(Path(path), config) for split, path in files.items()}
    elif config.text_fields:
        raise InputError("--text_fields needs a file or data set: the demo text has no columns.")
    else:
        sources = {"train": _demo_source()}
    if training:
        require_training_rows(sources, config)
    for source in sources.values():
        if not any(text.strip() for text, _ in source.parts()):
            raise InputError(f"{source.name}: there is no text in it. Give a file with text.")
    return sources


def _demo_source() -> Source:
    """The language reference that Python's own help() shows; it comes with every Python."""
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())]
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()
    return Source(CausalConfig.demo, digest, lambda: ((text, True) for text in texts), sum(map(len, texts)))


def _file_source(path: Path, config: TextConfig) -> Source:
    plain = path.suffix.lower() == ".txt"
    if plain and config.text_fields:
        raise InputError(f"{path}: a text file has no columns: drop --text_fields.")

    def rows() -> Parts:
        return _row_parts(iterate_rows(path, others=[".txt"]), str(path), config)

    parts = partial(_file_parts, path) if plain else rows
    with reading(path):
        read_as = (path.suffix.lower(), config.text_fields)
        return Source(str(path), file_hash(path), parts, path.stat().st_size, read_as)


def _hub_sources(name: str, configuration: str | None, config: TextConfig) -> dict[str, Source]:
    sources = {}
    for split, rows in open_hub(name, configuration).items():
        parts = partial(_row_parts, rows, f"{name} [{split}]", config)
        digest, characters = hashlib.sha256(), 0
        for text, ends in parts():
            digest.update(text.encode() + bytes([ends]))
            characters += len(text)
        sources[split] = Source(f"{name} [{split}]", digest.hexdigest(), parts, characters, ("hub", config.text_fields))
    return sources


def _file_parts(path: Path) -> Parts:
    """A text file is one document."""
    with reading(path), open(path, encoding="utf-8-sig", newline="") as file:
        while text := file.read(LARGEST_PIECE):
            yield text, False
    yield "", True


def _row_parts(rows: Iterable[Row], source: str, config: TextConfig) -> Parts:
    """Each row is a document; but one that is a line, with its line break, continues in the next.

    Between such rows, an empty one is a blank line.
    """
    fields: list[str] = []
    seen: dict[str, None] = {}  # the columns so far: JSON rows may each lack some
    is_line = False
    for number, row in enumerate(rows, 1):
        seen.update(dict.fromkeys(row))
        fields = fields or text_columns(list(row), config.text_fields)
        if number == ROWS_LOOKED_AT:
            require_columns(fields, list(seen), source, "--text_fields")
        cells = (text_in(row.get(name), f"{source}, data row {number}, column {name!r}") for name in fields)
        text = "\n".join(filter(None, cells))
        if not text and is_line:
            text = "\n"
        is_line = text.endswith("\n") and "\n" not in text[:-1]
        yield text, bool(text) and not is_line
    require_columns(fields, list(seen), source, "--text_fields")
    if is_line:
        yield "", True


class _Piece(NamedTuple):
    text: str
    continues: bool  # its document began in an earlier piece
    ends: bool  # its document ends here


def _pieces(source: Source) -> Iterator[_Piece]:
    """The text in pieces that can be tokenized one by one: cut at CUTS, or after twice their size at the latest."""
    size = min(LARGEST_PIECE, max(SMALLEST_PIECE, source.characters // 256))
    rest, continues = "", False
    for text, ends in source.parts():
        rest += text
        while len(rest) > 2 * size:
            found = next(filter(None, (cut.search(rest, size, 2 * size) for cut in CUTS)), None)
            end = found.start() if found else 2 * size
            yield _Piece(rest[:end], continues, False)
            rest, continues = rest[end:], True
        if ends:
            if rest:
                yield _Piece(rest, continues, True)
            rest, continues = "", False


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def tokenize(
    source: Source, tokenizer: "Tokenizer", progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The token ids of a corpus, a file mapped into memory; [pieces] of PIECE, where each piece is in it; and
    [documents] of doctor.DOCUMENT.

    Documents end with the end token; names of special tokens in the text are text. All come from the cache if the
    same tokenizer has tokenized the same text before. progress: called with characters done.
    """
    cuts = (SMALLEST_PIECE, LARGEST_PIECE, *(cut.pattern for cut in CUTS))
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    looked_for = (doctor.PLACEHOLDER.pattern, doctor.RENDERED.pattern)
    key = (FORMAT, source.sha256, source.read_as, _tokenizer_hash(tokenizer), special, cuts, looked_for, PIECE.names)
    name = f"tokens/{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}"
    folder = cached_folder(name, lambda new: _write_tokens(new, source, tokenizer, progress))
    tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
    return tokens, np.load(folder / "pieces.npy"), np.load(folder / "documents.npy")


def _tokenizer_hash(tokenizer: "Tokenizer") -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()])
    return hashlib.sha256(content.encode()).hexdigest()


def _write_tokens(folder: Path, source: Source, tokenizer: "Tokenizer", progress: Callable[[int], None]) -> None:
    def encode(texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        return tokenizer(texts, **options)["input_ids"]

    table = array.array("q")  # the fields of one PIECE after another
    (lead,) = encode([LEAD])
    start = document = 0
    last = " "  # character of the piece before
    documents = doctor.Documents(tokenizer.bos_token_id)
    folder.mkdir()
    with named(folder), open(folder / "tokens.bin", "wb") as file:
        for batch in _batches(_pieces(source)):
            encoded = encode([LEAD + piece.text if piece.continues else piece.text for piece in batch])
            for (text, continues, ends), ids in zip(batch, encoded, strict=True):
                if continues and ids[: len(lead)] == lead:
                    ids = ids[len(lead) :]
                documents.add(text, ids, ends)
                if ends:
                    ids = [*ids, tokenizer.eos_token_id]
                file.write(np.asarray(ids, dtype=np.uint32).tobytes())  # `tofile` does not see a full disk
                words = len(text.split()) - (continues and not last.isspace() and not text[0].isspace())
                table.extend((start, len(ids), len(text.encode()), words, document, ends))
                start, document, last = start + len(ids), document + ends, text[-1]
            progress(sum(len(piece.text) for piece in batch))
    with named(folder):
        np.save(folder / "pieces.npy", np.frombuffer(table, dtype=PIECE))
        np.save(folder / "documents.npy", documents.table())


def load_corpus(
    sources: dict[str, Source],
    config: CorpusDataConfig,
    tokenizer: "Tokenizer",
    progress: Callable[[int], None] = lambda n: None,
) -> CorpusData:
    """Tokenizes and cuts the splits that the options describe.

    Splits that no file gives are cut from train: of at least MIN_DOCUMENTS documents some are drawn by --split_seed;
    of fewer, the end of the text is taken, since a piece from its middle would have its context in training.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no end token (eos) to tell documents apart. Use another --model.")
    parts = {split: tokenize(source, tokenizer, progress) for split, source in sources.items()}
    cut: dict[str, np.ndarray] = {}
    if "train" in parts:
        tokens, pieces, table = parts["train"]
        cut = _cut(pieces, set(sources), config)
        parts |= {split: (tokens, pieces[numbers], table) for split, numbers in cut.items()}
    origins = {split: source.origin for split, source in sources.items()}
    report: dict[str, Any] = {"files": origins, "splits": {}, "findings": _examined(parts)}
    data = CorpusData({}, origins, {}, report, {s: numbers.tolist() for s, numbers in cut.items() if s != "train"})
    limits = {"train": config.max_train_samples, "validation": config.max_eval_samples}
    for split in SPLITS:
        tokens, pieces, _ = parts.get(split) or (np.empty(0, np.uint32), np.empty(0, PIECE), None)
        blocks = Blocks(tokens, pieces, config.block_size, config.stride if split != "train" else None)
        data.splits[split] = blocks
        if split in parts:
            if not blocks:
                raise InputError(f"The {split} split has no two tokens of text. Give --{split}_file, or more text.")
            size, words, count = (int(pieces[name].sum()) for name in ("bytes", "words", "tokens"))
            documents = len(np.unique(pieces["document"]))  # one that is cut counts in each of its splits
            entry = {"documents": documents, "bytes": size, "words": words, "tokens": count, "blocks": len(blocks)}
            blocks.draw(limits.get(split), config.split_seed)
            report["splits"][split] = {**entry, "used": len(blocks)}
            data.per_token[split] = {"bytes": size / count, "words": words / count}
    return data


def _examined(parts: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[str]:
    """The doctor's findings. A document that is cut into two splits counts in the first one."""
    own: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for split in (split for split in SPLITS if split in parts):
        _, pieces, documents = parts[split]
        numbers = np.unique(pieces["document"])
        for table, others in own.values():
            numbers = np.setdiff1d(numbers, others) if table is documents else numbers
        own[split] = documents, numbers
    return doctor.examine_documents(own)


def load_corpus_once(
    sources: dict[str, Source], config: CorpusDataConfig, tokenizer: "Tokenizer", accelerator: "Accelerator"
) -> CorpusData:
    """`load_corpus` with a progress bar: on each machine's main process first, so that the others find its tokens.

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
    assert data
    return data


def _cut(pieces: np.ndarray, given: set[str], config: CorpusDataConfig) -> dict[str, np.ndarray]:
    """split -> numbers of the training file's pieces, `train` included; only the splits that no file gives."""
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    fractions = {split: fraction for split, fraction in fractions.items() if split not in given and fraction}
    documents, rest, result = int(pieces["ends"].sum()), np.arange(len(pieces)), {}
    if documents >= MIN_DOCUMENTS:
        order = np.random.default_rng(config.split_seed).permutation(documents)
        for split, fraction in fractions.items():
            count = max(1, round(documents * fraction))
            drawn, order = order[:count], order[count:]
            result[split] = np.flatnonzero(np.isin(pieces["document"], drawn))
        rest = np.flatnonzero(np.isin(pieces["document"], order))
    else:
        total = pieces["tokens"].sum()
        for split, fraction in fractions.items():
            remaining = np.cumsum(pieces["tokens"][rest[::-1]])[::-1]  # tokens from each piece to the end
            first = min(int(np.sum(remaining > total * fraction)), len(rest) - 1)
            result[split], rest = rest[first:], rest[:first]
    if not len(rest):
        raise InputError(
            f"The text is too short to cut {' and '.join(fractions)} from it: give --validation_file and --test_file, "
            "or set --validation_fraction 0 --test_fraction 0."
        )
    return {**result, "train": rest}


def units_of(blocks: Sequence[Block]) -> tuple[list[int], str]:
    """The unit of each block, numbered from 0, and what the units are: what an interval's resamples draw.

    Blocks of one text are alike, so whole documents are drawn. Of fewer than MIN_DOCUMENTS, stretches of consecutive
    blocks are, half of STRETCHES or more, as in the block bootstrap of a series (Kuensch, 1989; without overlap:
    Carlstein, 1986).
    """
    documents, numbers = np.unique([block.document for block in blocks], return_inverse=True)
    if len(documents) >= MIN_DOCUMENTS:
        return numbers.tolist(), "documents"
    length = -(-len(blocks) // STRETCHES)
    name = f"stretches of {length} consecutive blocks" if length > 1 else "blocks"
    return [i // max(length, 1) for i in range(len(blocks))], name


def document_starts(tokens: Sequence[int], end_id: int) -> list[int]:
    """Where further documents begin in a block: after every end token but one at its very end."""
    return [i + 1 for i, token in enumerate(tokens[:-1]) if token == end_id]
