"""What is wrong with rows is found, and nothing is where nothing is wrong."""

import random
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED
from helpers.models import build_tokenizer
from helpers.rows import toy_rows, write_csv, write_jsonl
from helpers.texts import load

from common.data import corpus, doctor
from common.data.classification import load_classification
from common.data.conversations import load_conversations
from common.data.report import corpus_report, data_report
from common.options import ChatDataConfig, ClassificationDataConfig, TextConfig, parse_config
from common.text.chat import ChatTemplate, chat_rows, choose_template
from common.text.prompts import GENERATIVE_TEMPLATE, ClassificationPrompt

CONVERSATIONS = [
    {"instruction": f"What is the {n}th thing on the list of {topic}?", "output": f"It is {topic} number {n}, I think."}
    for topic in ("rivers", "birds", "tools")
    for n in range(20)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def tables(tmp_path: Path, train: list[dict], test: list[dict], max_length: int = 64, template: str = "") -> str:
    """The report of a classification of these rows, rendered with a word per token."""
    files = [f"--{s}_file={write_csv(tmp_path / f'{s}.csv', rows)}" for s, rows in (("train", train), ("test", test))]
    data = load_classification(parse_config(ClassificationDataConfig, [*files, "--validation_fraction", "0"]))
    words: dict[str, int] = {"<s>": 1}

    def encode(texts, plain):
        return [[words.setdefault(word, len(words) + 5) for word in re.findall(r"<s>|\S+", text)] for text in texts]

    prompt = ClassificationPrompt(
        encode, labels=data.labels, multi_label=False, template=template or GENERATIVE_TEMPLATE, start=[1], end=[2],
        max_length=max_length,
    )  # fmt: skip
    prompt.count_shortened(data, data.splits["train"])
    return data_report(data.report, "shown")


def conversations(tmp_path: Path, rows: list[dict], tokenizer, template: str = "") -> str:
    """The report of conversations, all of them training rows but the last ten."""
    files = {"train": rows[:-10], "test": rows[-10:]}
    options = [f"--{split}_file={write_jsonl(tmp_path / f'{split}.jsonl', part)}" for split, part in files.items()]
    data = load_conversations(parse_config(ChatDataConfig, [*options, "--validation_fraction", "0"]))
    chosen = ChatTemplate(tokenizer, template, "a template") if template else choose_template(tokenizer, "plain")
    chat_rows(data, chosen, 400)
    return data_report(data.report, "shown")


def findings(report: str) -> list[str]:
    """The lines of a report that tell what to look at."""
    part = report.partition("What to look at before training:\n\n")[2].partition("\n\n")[0]
    return [line.removeprefix("- ") for line in part.splitlines()]


TRAIN, TEST = toy_rows(14), toy_rows(5, start=30)
ROW = TRAIN[4]
OTHER = {"sport": "music", "music": "science", "science": "sport"}[ROW["label"]]
LOUD = "  " + ROW["text"].upper().replace(" ", " - ", 1) + "!"
TABLE_DEFECTS = {
    "an exact copy": ([*TRAIN, ROW], TEST, "train: 1 row repeats an earlier one, but for case, .* (ids 42)"),
    "a copy in other letters": ([*TRAIN, {**ROW, "text": LOUD}], TEST, "train: 1 row repeats an earlier one, .*42"),
    "a contradiction": ([*TRAIN, {**ROW, "text": LOUD, "label": OTHER}], TEST, "train: 1 row .* answer is another"),
    "a test row that was trained on": (TRAIN, [*TEST, {**ROW, "text": LOUD}], "test: 1 row repeats one of train, but"),
    "a test row with another label": (TRAIN, [*TEST, {**ROW, "label": OTHER}], "test: 1 row .* train, and the answer"),
    "a placeholder": ([*TRAIN, {"text": "Dear {{First Name}}", "label": "sport"}], TEST, r"such as {{First Name}} "),
    "a small class": ([*TRAIN, {"text": "a tax", "label": "law"}], TEST, r"fewer than 10 rows: law \(1\)"),
}  # fmt: skip


@pytest.mark.parametrize("defect", TABLE_DEFECTS)
def test_defects_of_a_table_are_found(tmp_path, defect):
    train, test, expected = TABLE_DEFECTS[defect]
    (line,) = findings(tables(tmp_path, train, test))
    pattern = expected.replace("(ids 42)", r"\(ids 42\)")
    assert re.search(pattern, line), line


def test_rows_beyond_the_limit_and_two_starts_are_found(tmp_path):
    report = tables(tmp_path, [*TRAIN, {"text": "goal " * 90, "label": "sport"}], TEST)
    assert "tokens of a row, of at most 64: train median 2" in report and "longest 64" in report
    (line,) = findings(tables(tmp_path, TRAIN, TEST, template="<s> " + GENERATIVE_TEMPLATE))[1:] or [""]
    assert line == "test: 15 rows with two BOS tokens at the start: take one out of the template"


def test_defects_of_conversations_are_found(tmp_path, tokenizer):
    changed = {
        "a placeholder in an answer": ({"output": "Write to [Your Name] about it."}, r"such as \[Your Name\]"),
        "a rendered template": ({"instruction": "<|im_start|>user Hi<|im_end|>"}, r"special tokens of a rendered"),
        "curt answers": ({"output": "!"}, "1 of 50 answers are a single token"),
        "a question with two answers": ({"instruction": CONVERSATIONS[0]["instruction"]}, "the answer is another"),
    }
    lines = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}</s>{% endfor %}"
    lines += "{% if add_generation_prompt %}assistant:\n{% endif %}"
    for place, (name, (change, expected)) in enumerate(changed.items(), 7):
        rows = [{**row, **change} if i == place else row for i, row in enumerate(CONVERSATIONS)]
        (line,) = findings(conversations(tmp_path, rows, tokenizer, lines))
        assert re.search(expected, line) and line.startswith("train: "), (name, line)
    start = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    start += "{% if add_generation_prompt %}assistant: {% endif %}"
    lines = findings(conversations(tmp_path, CONVERSATIONS, tokenizer, start))
    assert [line.partition(" with")[0] for line in lines] == ["train: 50 rows", "test: 10 rows"]


def test_nothing_is_found_in_clean_sets(tmp_path, tokenizer):
    """The two demo sets as they are, and rows made here."""
    config = parse_config(ClassificationDataConfig, [])
    assert load_classification(config).report["findings"] == []
    data = load_conversations(parse_config(ChatDataConfig, []))
    chat_rows(data, choose_template(tokenizer, "plain"), 512)
    assert data.report["findings"] == []
    assert findings(tables(tmp_path, TRAIN, TEST)) == []
    assert findings(conversations(tmp_path, CONVERSATIONS, tokenizer)) == []


def test_texts_of_other_scripts_are_told_apart():
    """Without letters of any script, the text as it is counts."""
    assert doctor.normalized("Größe: 3,5  m") == doctor.normalized("größe 3 5 M")
    assert doctor.normalized("ｆｕｌｌ") == "full"
    assert len({doctor.normalized(text) for text in ("今日は", "今日も", "!!", "??", "", "👍", "👎")}) == 7
    for one, other in (("की", "का"), ("ไม่", "ไม้"), ("C++", "C"), ("good 👍", "good 👎")):
        assert doctor.normalized(one) != doctor.normalized(other)


DOCUMENTS = [f"The {n}th letter is about {topic}, and it is long." for topic in ("rivers", "birds") for n in range(20)]
COPY = "  " + DOCUMENTS[4].upper().replace(" ", " - ", 1) + "!"
TEXT_DEFECTS = {
    "a copy": ([*DOCUMENTS, COPY], [], "train: 1 document repeats an earlier one, but for case, .* (ids 40)"),
    "copies": ([*DOCUMENTS, *DOCUMENTS[:7]], [], "train: 7 documents repeat an .* (ids 40, 41, 42, 43, 44, ...)"),
    "a test document that was trained on": (DOCUMENTS, ["Another one.", COPY], "test: 1 document repeats one of train"),
    "a placeholder": ([*DOCUMENTS, "Dear {{First Name}}, hello"], [], "train: 1 document with placeholders of a .*40"),
    "a rendered template": ([*DOCUMENTS, "<|im_start|>user Hi"], [], "train: 1 document with special tokens of a rend"),
    "a start": ([*DOCUMENTS, "<s> Hello again"], [], "train: 1 document with special tokens of a rendered template"),
    "white space": ([*DOCUMENTS, " ", "\t"], [], "train: 2 documents with nothing but white space (ids 40, 41)"),
    "one token": ([*DOCUMENTS, "a"], [], "train: 1 document of a single token (ids 40)"),
}


@pytest.mark.parametrize("defect", TEXT_DEFECTS)
def test_defects_of_running_text_are_found(tmp_path, tokenizer, defect):
    train, test, expected = TEXT_DEFECTS[defect]
    test = test or ["A text.", "And one more."]
    files = {f"{split}_file": write_jsonl(tmp_path / f"{split}.jsonl", [{"text": text} for text in texts])
             for split, texts in (("train", train), ("test", test))}  # fmt: skip
    data = load(tokenizer, **files, validation_fraction=0, block_size=16)
    (line,) = findings(corpus_report(data.report, "", True, "shown"))
    assert re.search(expected.replace("(", r"\(").replace(")", r"\)"), line), line


def test_two_starts_of_a_document_are_found():
    """From a tokenizer that puts BOS in front although it is told not to."""
    documents = doctor.Documents(bos=1)
    for ids in ([1, 7, 8], [7, 1, 8]):
        documents.add(f"text {ids}", ids, True)
    (line,) = doctor.examine_documents({"train": (documents.table(), np.arange(2))})
    assert line.startswith("train: 1 document with a BOS token at the start") and line.endswith("(ids 0)")


def test_a_document_that_is_cut_into_splits_is_no_copy(tmp_path, tokenizer):
    """Nor are the drawn documents of a file with several."""
    (tmp_path / "text.txt").write_text(" ".join(DOCUMENTS * 10), encoding="utf-8")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in DOCUMENTS])
    for file in (str(tmp_path / "text.txt"), rows):
        data = load(tokenizer, train_file=file, block_size=16, test_fraction=0.2)
        assert data.report["findings"] == [] and list(data.report["splits"]) == ["train", "validation", "test"]


def examined(files: dict[str, Path]) -> list[str]:
    """The findings about text files, each of which is one document; words are tokens."""
    own = {}
    for split, path in files.items():
        documents = doctor.Documents(None)
        for piece in corpus._pieces(corpus._file_source(path, TextConfig())):
            documents.add(piece.text, range(len(piece.text.split())), piece.ends)
        own[split] = documents.table(), np.arange(len(documents.table()))
    return doctor.examine_documents(own)


def test_documents_are_not_kept():
    """A megabyte of text leaves nine bytes a document."""
    documents = doctor.Documents(None)
    tracemalloc.start()
    for i in range(500):
        documents.add(f"number {i} " * 200, range(400), True)
    assert tracemalloc.get_traced_memory()[0] < 50_000 and documents.table().nbytes == 500 * 9
    tracemalloc.stop()


WIKITEXT = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}


@pytest.mark.skipif(not (SHARED / "wikitext2").is_dir(), reason="wikitext-2 is not on this machine")
def test_nothing_is_found_in_wikitext():
    assert examined({split: SHARED / "wikitext2" / name for split, name in WIKITEXT.items()}) == []


def test_fifty_thousand_rows_take_seconds():
    """Without reading the file or tokenizing: what the examination adds to a start."""
    draw = random.Random(0)
    words = [f"word{n}" for n in range(4000)]
    rows = [doctor.Item(str(i), " ".join(draw.choices(words, k=60)), (i % 5,)) for i in range(49_000)]
    rows += [doctor.Item(f"copy {i}", row.question.title(), row.answer) for i, row in enumerate(rows[:1000])]
    started = time.process_time()
    (line,) = doctor.examine({"train": rows})
    assert line.startswith("train: 1000 rows repeat an earlier one")
    assert time.process_time() - started < 10


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not on this machine")
def test_real_sets_are_examined():
    """Bitext has placeholders in nearly every answer; Banking77 asks some things twice."""
    file = next((SHARED / "bitext_customer_support").glob("train.*"), None)
    if file is None:
        pytest.skip("no training file of Bitext")
    lines = load_conversations(parse_config(ChatDataConfig, ["--train_file", str(file)])).report["findings"]
    assert any("placeholders" in line and "{{" in line for line in lines)
