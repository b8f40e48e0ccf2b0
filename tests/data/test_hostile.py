"""Whatever is in a file, it becomes rows, or one InputError: no other error, and no row that is not accounted for."""

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.models import build_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.data.classification import ClassificationData, load_classification
from common.data.conversations import ChatData, load_conversations
from common.data.files import read_rows
from common.data.report import data_report
from common.errors import InputError
from common.model.classifier import classification_prompt
from common.options import ChatDataConfig, ClassificationDataConfig, parse_config
from common.text.chat import ChatTemplate, chat_rows, choose_template
from common.text.prompts import GENERATIVE_TEMPLATE, classification_rows

QUICK = settings(max_examples=30, deadline=None, derandomize=True, database=None)
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "[[", "]]", "{{x}}", "{text}", "\x00", "\x1b[2J", "\u202e",
           "\ufdd0x\ufdd1", "\ufeff", "\r\n", "\u2028", "NaN", "null", "", " ", "a" * 50,
           "😀", "é", "e\u0301", '"', ",", ";", "\\", "|"]  # fmt: skip
PIECES = st.lists(st.sampled_from(SPECIAL), max_size=5).map("".join)
TEXT = st.one_of(st.text(max_size=30), PIECES, st.just("x" * 10**5))
SHORT = TEXT.map(lambda text: text[:20]).filter(str.strip)
LABEL = st.one_of(st.sampled_from(["a", "b", "c"]), st.text(max_size=8), st.sampled_from(SPECIAL))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(SPECIAL)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
SUFFIXES = [".csv", ".tsv", ".json", ".jsonl", ".parquet"]
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "", "x"])
TURN = st.one_of(
    st.fixed_dictionaries({"role": ROLE, "content": st.one_of(TEXT, JSON)}),
    st.fixed_dictionaries({"from": ROLE, "value": TEXT}),
    JSON,
)
SAID = st.lists(st.one_of(TEXT.filter(str.strip), st.just("word")), min_size=1, max_size=3)
EXCHANGES = st.builds(
    lambda questions, answers: [
        {"role": role, "content": text}
        for pair in zip(questions, answers, strict=False)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ], SAID, SAID,
)  # fmt: skip
TURNS = st.one_of(st.lists(TURN, max_size=4), EXCHANGES)
CHAT_ROW = st.one_of(
    st.fixed_dictionaries({"messages": TURNS}),
    st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}, optional={"system": JSON, "tools": JSON}),
    st.fixed_dictionaries({"prompt": st.one_of(TEXT, TURNS), "completion": TEXT}),
    st.dictionaries(st.sampled_from(["messages", "instruction", "response", "x"]), JSON, max_size=3),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@contextmanager
def file_of(content: str | bytes, suffix: str) -> Iterator[str]:
    """The path of a file with this content; a fixture would be the same one for all examples."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        yield str(path)


def as_csv(rows: list[dict[str, str]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def classified(path: str, tokenizer) -> ClassificationData | None:
    """The rows as training renders them, or None for an InputError."""
    given = ["--train_file", path, "--validation_fraction", "0", "--test_fraction", "0", "--max_length", "600"]
    config = parse_config(ClassificationDataConfig, given)
    try:
        data = load_classification(config)
        prompt = classification_prompt(tokenizer, False, labels=data.labels, multi_label=data.multi_label,
                                       template=GENERATIVE_TEMPLATE, max_length=config.max_length)  # fmt: skip
        prompt.reserve(data.splits["train"])
        rows = classification_rows(data.splits["train"], prompt, None)
        prompt.count_shortened(data, data.splits["train"])
    except InputError as error:
        assert str(error)
        return None
    assert len(rows) == len(data.splits["train"]) and all(0 < row.length <= 600 for row in rows)
    assert "# Data report" in data_report(data.report, "shown")
    return data


@QUICK
@given(rows=st.lists(st.fixed_dictionaries({"text": TEXT, "label": LABEL}), max_size=12), kind=st.booleans())
def test_rows_of_a_table_are_kept_or_reported(tokenizer, rows, kind):
    rows = [*rows, {"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    with file_of(as_csv(rows) if kind else as_jsonl(rows), ".csv" if kind else ".jsonl") as path:
        data = classified(path, tokenizer)
        if data:
            entry = data.report["rows"]["train"]
            assert entry["read"] == len(read_rows(path)) == entry["used"] + entry["dropped_empty_text"]
            assert kind or entry["read"] == len(rows)


@QUICK
@given(labels=st.lists(st.lists(LABEL, max_size=3), min_size=2, max_size=6))
def test_lists_of_labels_are_kept_or_refused(tokenizer, labels):
    with file_of(as_jsonl([{"text": "some text", "label": names} for names in labels]), ".jsonl") as path:
        data = classified(path, tokenizer)
        assert data is None or len(data.splits["train"]) == len(labels)


@QUICK
@given(content=st.one_of(st.binary(max_size=200), TEXT), suffix=st.sampled_from(SUFFIXES))
@example(content=b"PAR1" + b"\0" * 40 + b"PAR1", suffix=".parquet")
@example(content="[" * 10**5, suffix=".json")
@example(content='{"a": ' * 10**5, suffix=".jsonl")
@example(content='{"text": "\\ud800", "label": "a"}', suffix=".jsonl")
@example(content='text,label\n"never closed', suffix=".csv")
@example(content='[{"text": 1e999, "label": NaN}]', suffix=".json")
@example(content="text,label\n" + "\x00" * 9, suffix=".csv")
@example(content='{"text": ' + "9" * 5000 + "}", suffix=".jsonl")
def test_any_content_is_rows_or_an_input_error(tokenizer, content, suffix):
    with file_of(content, suffix) as path:
        classified(path, tokenizer)
        conversations(path, None)


@QUICK
@given(rows=st.lists(st.dictionaries(st.sampled_from(["text", "label", "title"]), JSON), min_size=1, max_size=4))
def test_any_cells_are_rows_or_an_input_error(tokenizer, rows):
    with file_of(as_jsonl(rows), ".jsonl") as path:
        classified(path, tokenizer)


def test_a_thousand_labels(tokenizer):
    """All are read, and in every split; as an instruction they are too long, which is an InputError."""
    rows = [{"text": f"row {n}", "label": f"{chr(0x4E00 + n % 1000)} label"} for n in range(3000)]
    with file_of(as_jsonl(rows), ".jsonl") as path:
        data = load_classification(parse_config(ClassificationDataConfig, ["--train_file", path]))
        assert len(data.labels) == 1000 and sum(map(len, data.splits.values())) == 3000
        assert classified(path, tokenizer) is None


def conversations(path: str, template: ChatTemplate | None) -> ChatData | None:
    """Conversations as training renders them, or None for an InputError."""
    given = ["--train_file", path, "--validation_fraction", "0", "--test_fraction", "0"]
    try:
        data = load_conversations(parse_config(ChatDataConfig, given))
        rows = chat_rows(data, template, 200)["train"] if template else []
    except InputError as error:
        assert str(error)
        return None
    assert all(0 < row.length <= 200 and sum(row.mask) for row in rows)
    assert not template or {row.id for row in rows} == {row.id for row in data.splits["train"]}
    assert "# Data report" in data_report(data.report, "shown")
    return data


@QUICK
@given(rows=st.one_of(st.lists(st.fixed_dictionaries({"messages": EXCHANGES}), min_size=1, max_size=3),
                      st.lists(CHAT_ROW, min_size=1, max_size=3)))
@example(rows=[{"instruction": "x" * 10**5, "output": "y" * 10**5}])
@example(rows=[{"instruction": "<s></s>", "output": "\ufdd0</s>\ufdd1"}])
def test_any_conversation_is_kept_or_refused(tokenizer, rows):
    template = choose_template(tokenizer, "plain")
    with file_of(as_jsonl(rows), ".jsonl") as path:
        data = conversations(path, template)
        assert data is None or data.report["rows"]["train"]["read"] == len(data.splits["train"]) == len(rows)


@QUICK
@given(pairs=st.lists(st.tuples(SHORT, SHORT), min_size=1, max_size=4))
def test_an_answer_is_learned_as_written(tokenizer, pairs):
    """What is trained on, decoded, is the answer: no special token in a text is one."""
    template = choose_template(tokenizer, "plain")
    rows = [{"instruction": question, "output": answer} for question, answer in pairs]
    with file_of(as_jsonl(rows), ".jsonl") as path:
        data = conversations(path, template)
        assert data
        for row in chat_rows(data, template, 10**4)["train"]:
            special = [token for token, trained in zip(row.ids, row.mask, strict=True) if trained and token < 4]
            assert special == [tokenizer.eos_token_id]
