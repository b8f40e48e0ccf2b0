"""Text -> tokens on disk -> blocks: nothing lost, nothing twice, and memory that does not grow with the text."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from helpers import ROOT, SHARED
from helpers.texts import WORDS, Config, load, prose

from common.data import corpus
from common.data.corpus import PIECE, Blocks, open_sources, tokenize, units_of
from common.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(models):
    return transformers.AutoTokenizer.from_pretrained(models["llama"])


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8", newline="")
    return str(path)


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def joined(blocks: Blocks) -> list[int]:
    return [token for block in blocks for token in block.tokens]


def test_pieces_give_the_tokens_of_the_whole_text(tokenizer, tmp_path):
    text = prose(3000)
    data = load(tokenizer, train_file=write(tmp_path / "t.txt", text), validation_fraction=0, test_fraction=0)
    _, pieces, _ = tokenize(open_sources(Config(train_file=str(tmp_path / "t.txt")))["train"], tokenizer, print)
    assert len(pieces) > 20
    assert joined(data.splits["train"]) == [*plain(tokenizer, text), tokenizer.eos_token_id]
    entry = data.report["splits"]["train"]
    assert (entry["bytes"], entry["words"], entry["documents"]) == (len(text.encode()), len(text.split()), 1)


def metaspace(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of Llama 2's kind: blanks are part of words, and a text gets one in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Replace("▁", " ")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    words = [f"{mark}{word}" for word in [*WORDS, *"abcdefghijklmnopqrstuvwxyz.="] for mark in ("", "▁")]
    made.train_from_iterator(words, trainer)  # one by one: no token spans two words, as in the real ones
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("layout", ["lines", "paragraphs", "crlf", "one line"])
def test_no_layout_is_cut_inside_a_word(tokenizer, tmp_path, kind, layout):
    """Paragraphs with blank lines, Windows' line ends, a text without any: as if all were tokenized at once."""
    tokenizer = tokenizer if kind == "bytes" else metaspace(tmp_path)
    rng = random.Random(3)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(4, 30))) + "." for _ in range(900)]
    text = {"lines": "\n", "paragraphs": "\n\n", "crlf": "\r\n", "one line": " "}[layout].join(sentences)
    data = load(tokenizer, train_file=write(tmp_path / "t.txt", text), validation_fraction=0, test_fraction=0)
    assert joined(data.splits["train"]) == [*plain(tokenizer, text), tokenizer.eos_token_id]
    assert data.report["splits"]["train"]["words"] == len(text.split())


@pytest.mark.parametrize("blank", ["", " ", "\n", "\u3000"])
def test_a_word_cut_in_two_counts_once(tokenizer, tmp_path, blank):
    """Text without blanks is cut inside a word; perplexity per word needs the words of the whole."""
    text = ("字" * 3001 + blank) * 6 + "end"
    whole = {"validation_fraction": 0, "test_fraction": 0}
    entry = load(tokenizer, train_file=write(tmp_path / "t.txt", text), **whole).report["splits"]["train"]
    assert (entry["words"], entry["bytes"]) == (len(text.split()), len(text.encode()))


def test_a_file_read_in_another_way_has_other_tokens(tokenizer, tmp_path):
    rows = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(12))
    whole = {"validation_fraction": 0, "test_fraction": 0}
    counts = [
        load(tokenizer, train_file=write(tmp_path / name, rows), **whole).report["splits"]["train"]["documents"]
        for name in ("t.jsonl", "t.txt", "t.jsonl")
    ]
    assert counts == [12, 1, 12]


def test_documents_of_several_lines_stay_apart(tokenizer, tmp_path):
    """A line break at its end does not join a document to the next, unless it is a single line."""
    rows = "".join(json.dumps({"text": f"def f{i}():\n    return {i}\n"}) + "\n" for i in range(12))
    data = load(tokenizer, train_file=write(tmp_path / "t.jsonl", rows))
    assert [entry["documents"] for entry in data.report["splits"].values()] == [10, 1, 1]


def test_odd_rows(tokenizer, tmp_path):
    rows = [{"body": "no title"}, {"title": "a title", "body": "text"}]
    file = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    whole = {"validation_fraction": 0, "test_fraction": 0}
    data = load(tokenizer, train_file=file, text_fields=["title", "body"], **whole)
    assert tokenizer.decode(joined(data.splits["train"])) == "no title</s>a title\ntext</s>"
    with pytest.raises(InputError, match="no column 'gone'; it has body, title.*--text_fields"):
        load(tokenizer, train_file=file, text_fields=["gone", "body"], **whole)
    with pytest.raises(InputError, match="the demo text has no columns"):
        load(tokenizer, text_fields=["body"])
    endless = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    endless.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        load(endless, train_file=file, text_fields=["body"])


def test_a_text_file_that_is_something_else_is_told_what_it_is(tmp_path):
    (tmp_path / "t.txt").write_bytes("some text".encode("utf-16"))
    with pytest.raises(InputError, match="t.txt: the file is UTF-16. Save it as UTF-8"):
        open_sources(Config(train_file=str(tmp_path / "t.txt")))


@pytest.mark.parametrize("cell", [{"title": "t"}, ["t"]])
def test_a_cell_that_is_no_text_is_named(tmp_path, cell):
    file = write(tmp_path / "t.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ("a", None, cell)))
    with pytest.raises(InputError, match="t.jsonl, data row 3, column 'text': expected a text, not "):
        list(open_sources(Config(train_file=file))["train"].parts())


def test_rows_are_documents_and_lines_are_not(tokenizer, tmp_path):
    """A row that ends with a line break continues in the next, as in hub data sets made of a text's lines."""
    rows = [" = A = \n", "", " first line \n", "second", "a document </s> of its own", None, "third"]
    file = write(tmp_path / "t.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in rows))
    data = load(tokenizer, train_file=file, validation_fraction=0, test_fraction=0)
    end = [tokenizer.eos_token_id]
    expected = plain(tokenizer, " = A = \n\n first line \nsecond") + end
    expected += plain(tokenizer, "a document </s> of its own") + end + plain(tokenizer, "third") + end
    assert joined(data.splits["train"]) == expected
    assert expected.count(tokenizer.eos_token_id) == 3  # the name of the end token in a text is text


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "hub"])
def test_formats_give_the_same_tokens(tokenizer, tmp_path, kind):
    import datasets

    rows = [{"title": f"title {i}", "abstract": prose(2, i)[:-1].rstrip()} for i in range(12)]
    table = datasets.Dataset.from_list(rows)
    options = {"validation_fraction": 0, "test_fraction": 0}
    if kind == "hub":
        (tmp_path / "hub").mkdir()
        table.to_json(tmp_path / "hub" / "train.jsonl")
        data = load(tokenizer, dataset_name=str(tmp_path / "hub"), **options)
    else:
        file = tmp_path / f"t.{kind}"
        getattr(table, {"csv": "to_csv", "parquet": "to_parquet", "jsonl": "to_json"}[kind])(file)
        data = load(tokenizer, train_file=str(file), **options)
    expected = [t for r in rows for t in [*plain(tokenizer, f"{r['title']}\n{r['abstract']}"), tokenizer.eos_token_id]]
    assert joined(data.splits["train"]) == expected


@pytest.mark.parametrize("total", [2, 7, 8, 9, 16, 17, 18, 41])
@pytest.mark.parametrize("stride", [None, 1, 3, 8])
def test_every_token_counts_once(total, stride):
    tokens = np.arange(100, 100 + total, dtype=np.uint32)
    pieces = np.zeros(3, PIECE)
    pieces["start"] = [0, 1, min(4, total)]
    pieces["tokens"] = np.diff([*pieces["start"], total])
    blocks = Blocks(tokens, pieces, 8, stride)
    counted = [t for block in blocks for t in block.tokens[block.seen :]]
    lost = stride in (None, 8) and total % 8 == 1  # a last block of one token has nothing to predict
    assert counted == tokens.tolist()[: total - lost]
    assert [len(block.tokens) for block in blocks] == blocks.lengths.tolist()
    assert all(block.tokens == list(range(block.tokens[0], block.tokens[0] + block.length)) for block in blocks)


def test_splits_are_whole_documents_drawn_by_their_own_seed(tokenizer, tmp_path):
    rows = [f"document {i} " + " ".join(WORDS[i % 7 :]) for i in range(40)]
    file = write(tmp_path / "t.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in rows))
    data = load(tokenizer, train_file=file)
    texts = {split: tokenizer.decode(joined(blocks)).split("</s>")[:-1] for split, blocks in data.splits.items()}
    assert {split: len(found) for split, found in texts.items()} == {"train": 32, "validation": 4, "test": 4}
    assert sorted(sum(texts.values(), [])) == sorted(rows)
    again = load(tokenizer, train_file=file)
    other = load(tokenizer, train_file=file, split_seed=7)
    assert joined(again.splits["test"]) == joined(data.splits["test"]) != joined(other.splits["test"])


def test_blocks_know_the_document_that_they_begin_in():
    """By the first token that counts: in an overlapping window, the one after those of the window before."""
    pieces = np.zeros(4, PIECE)
    pieces["tokens"], pieces["start"], pieces["document"] = [3, 2, 6, 5], [10, 30, 40, 60], [7, 7, 8, 11]
    blocks = Blocks(np.arange(100), pieces, 4)
    assert [block.document for block in blocks] == [7, 7, 8, 11]  # from tokens 0, 4, 8 and 12 of 5, 6 and 5
    assert [block.document for block in Blocks(np.arange(100), pieces, 4, 2)] == [7, 7, 8, 8, 8, 11, 11]
    blocks.draw(2, seed=0)
    assert [block.document for block in blocks] == [[7, 7, 8, 11][number] for number in blocks.numbers]


@pytest.mark.parametrize(
    ("documents", "size", "units", "name"),
    [(12, 20, 12, "documents"), (12, 2000, 0, "blocks"), (3, 20, 0, "blocks"), (3, 2, 50, "stretches of 3 ")],
)
def test_what_an_interval_draws(documents, size, units, name):
    """Documents where there are enough of them; else at most 50 stretches of blocks of one length, but the last."""
    pieces = np.zeros(documents, PIECE)
    pieces["tokens"], pieces["document"] = 100, np.arange(documents)
    pieces["start"] = 100 * np.arange(documents)
    blocks = Blocks(np.arange(100 * documents), pieces, size)
    numbers, found = units_of(blocks)
    assert found.startswith(name) and len(numbers) == len(blocks) and numbers == sorted(numbers)
    assert set(numbers) == set(range(units or len(blocks))) and len(set(numbers)) == max(numbers) + 1


def test_one_document_is_cut_at_its_end(tokenizer, tmp_path):
    text = prose(4000)
    data = load(tokenizer, train_file=write(tmp_path / "t.txt", text))
    parts = [joined(data.splits[split]) for split in ("train", "validation", "test")]
    assert sum(parts, []) == [*plain(tokenizer, text), tokenizer.eos_token_id]
    share = [len(part) / sum(map(len, parts)) for part in parts]
    assert share == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert [entry["documents"] for entry in data.report["splits"].values()] == [1, 1, 1]


def test_blocks_are_drawn_by_the_split_seed(tokenizer, tmp_path):
    file = write(tmp_path / "t.txt", prose(2000))
    drawn = load(tokenizer, train_file=file, max_train_samples=9, max_eval_samples=3)
    assert [len(drawn.splits[split]) for split in ("train", "validation")] == [9, 3]
    assert drawn.report["splits"]["train"]["used"] == 9
    every = {block.id: block.tokens for block in load(tokenizer, train_file=file).splits["train"]}
    assert all(every[block.id] == block.tokens for block in drawn.splits["train"])


def test_tokens_are_made_once(tokenizer, tmp_path, monkeypatch):
    file = write(tmp_path / "t.txt", prose(500))
    first = load(tokenizer, train_file=file)
    monkeypatch.setattr(corpus, "_write_tokens", None)
    assert joined(load(tokenizer, train_file=file).splits["train"]) == joined(first.splits["train"])
    assert not list((tmp_path / "cache" / "tokens").glob(".*"))  # nothing half-written
    other = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.add_tokens(["wizards"])
    with pytest.raises(TypeError):  # another tokenizer, other tokens
        load(other, train_file=file)
    write(tmp_path / "t.txt", prose(501))
    with pytest.raises(TypeError):
        load(tokenizer, train_file=file)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.txt", b"", {}, "there is no text in it"),
        ("t.txt", b" \n \n", {}, "there is no text in it"),
        ("t.txt", b"good\nbad \xff line\n", {}, "line 2: byte 0xff is not UTF-8"),
        ("t.txt", b"word " * 20, {"text_fields": ["text"]}, "a text file has no columns"),
        ("t.jsonl", b'{"body": "a"}\n', {}, "no column 'text'; it has body"),
        ("t.jsonl", b'{"text": "a"}\n', {"text_fields": ["body"]}, "no column 'body'; it has text"),
        ("t.jsonl", b'{"text": ""}\n', {}, "there is no text in it"),
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', {}, "line 2: not valid JSON"),
        ("t.doc", b"word", {}, "unknown file type '.doc'; use one of .csv, .tsv, .json, .jsonl, .parquet, .txt"),
        ("t.txt", b"word", {}, "too short to cut"),
        ("t.txt", b"o", {"validation_fraction": 0, "test_fraction": 0, "block_size": 2}, None),
    ],
)
def test_bad_texts(tokenizer, tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    if message is None:
        assert len(load(tokenizer, train_file=str(tmp_path / name), **options).splits["train"]) == 1
        return
    with pytest.raises(InputError, match=message):
        load(tokenizer, train_file=str(tmp_path / name), **options)


MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import transformers
from helpers.texts import load
from common.data import corpus
corpus.AT_ONCE = 2**18
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = load(tokenizer, train_file=sys.argv[3])
print(len(data.splits["train"]), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_the_text(models, tmp_path):
    """12 times the text in about the same memory."""
    used = {}
    for size in (1, 12):
        write(tmp_path / f"{size}.txt", prose(3000) * (size * 4))
        command = [
            sys.executable,
            "-c",
            MEMORY,
            str(ROOT / "tests"),
            str(models["llama"]),
            str(tmp_path / f"{size}.txt"),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        used[size] = list(map(int, done.stdout.split()))
    assert used[12][0] > 10 * used[1][0]
    assert used[12][1] < 1.2 * used[1][1] + 20, used


def test_wikitext_is_one_document(tokenizer):
    file = SHARED / "wikitext2" / "test.txt"
    if not file.exists():
        pytest.skip(f"needs {file}")
    data = load(tokenizer, train_file=str(file), validation_fraction=0, test_fraction=0)
    text = file.read_text(encoding="utf-8")
    assert joined(data.splits["train"]) == [*plain(tokenizer, text), tokenizer.eos_token_id]
