"""Files to rows, rows to labeled examples, splits, weights and the counts of the data report."""

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from operator import itemgetter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from helpers import ROOT
from helpers.rows import WORDS, toy_rows, write_csv
from sklearn.utils.class_weight import compute_class_weight

from common.data import splits
from common.data.classification import (
    ClassificationData,
    Example,
    class_weights,
    draw_few_shot,
    join_fields,
    load_classification,
    unlabeled_rows,
)
from common.data.files import file_hash, read_rows
from common.data.report import data_report
from common.data.splits import stratified_sample
from common.errors import InputError
from common.options import ClassificationDataConfig


@dataclass
class Config(ClassificationDataConfig):
    seed: int = 42


def load(training: bool = True, **options):
    return load_classification(Config(**{"validation_fraction": 0.0, "test_fraction": 0.0, **options}), training)


def problem(**options) -> str:
    with pytest.raises(InputError) as caught:
        load(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def save_jsonl(path, rows: list[dict]) -> str:
    return save(path, "".join(json.dumps(row) + "\n" for row in rows))


def save_parquet(path, rows: list[dict]) -> str:
    datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


def named(data, split: str = "train") -> list[tuple[str, ...]]:
    """The labels of a split's rows, by name."""
    return [tuple(data.labels[k] for k in example.labels) for example in data.splits[split]]


# --- texts


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        (("Title", "Body"), "Title. Body."),
        (("Title.", "Body!"), "Title. Body!"),
        (("Really?", "Yes"), "Really? Yes."),
        *[((f"a{mark}", "b"), f"a{mark} b.") for mark in "。！？．｡؟۔।॥…‼⁈։።፧။។"],
        (('He said "yes."', "b"), 'He said "yes." b.'),
        (("(See there.)", "(so)"), "(See there.) (so)."),
        (("„Ja!“", "»Ja?«"), "„Ja!“ »Ja?«"),
        (("「はい。」", "はい、"), "「はい。」 はい、."),
        (("U.S.'", '""'), 'U.S.\' "".'),
        (("", "Body"), "Body."),
        (("  ", "Body"), "Body."),
        ((None, "Body"), "Body."),
        (("Title", float("nan")), "Title."),
        ((" a\n b\t c ", "d"), "a b c. d."),
        ((3, 2.5), "3. 2.5."),
        ((None, ""), ""),
    ],
)
def test_fields_are_joined_as_sentences(cells, text):
    assert join_fields(dict(zip(("title", "body"), cells, strict=True)), ["title", "body"]) == text


def test_fields_are_joined_in_the_order_of_the_option_and_missing_ones_skipped():
    assert join_fields({"a": "one", "b": "two"}, ["b", "none", "a"]) == "two. one."


def test_json_rows_may_lack_a_text_field(tmp_path):
    """The first row decides nothing about the columns."""
    rows = [{"title": "a", "label": "x"}, {"title": "b", "abstract": "c", "label": "y"}]
    assert [e.text for e in load(train_file=save_jsonl(tmp_path / "t.jsonl", rows)).splits["train"]] == ["a.", "b. c."]


@pytest.mark.parametrize("cell", [b"text", {"title": "t"}, ["t"]])
@pytest.mark.parametrize("column", ["text", "label", "key"])
def test_a_cell_that_is_no_text_is_named(tmp_path, cell, column):
    """Bytes and nested values, as Parquet has them, must not become Python's notation of them."""
    if column == "label" and isinstance(cell, list):
        cell = [cell]  # a list of labels is legal, one of lists is not
    rows = [{"text": "t", "label": "a", "key": str(i), column: cell} for i in range(3)]
    rows[0] |= {"text": None}
    path = save_parquet(tmp_path / "t.parquet", rows)
    row = 2 if column == "text" else 1
    message = problem(train_file=path, id_column="key")
    assert f"t.parquet, data row {row}, column '{column}': expected a text, not " in message


@pytest.mark.parametrize("cell", [{"title": "t"}, ["t"]])
def test_rows_to_be_answered_are_checked_alike(cell):
    rows = [{"text": "t"}, {"text": cell}]
    with pytest.raises(InputError, match="in.json, data row 2, column 'text': expected a text, not "):
        unlabeled_rows(rows, ["0", "1"], "in.json", ["text"])


# --- files


def test_csv_cells_stay_as_written(tmp_path):
    """Quotes, separators and newlines in quotes, a BOM, U+2028 outside quotes, text that looks like a number."""
    content = '\ufefftext,label\r\n"a ""b"", c\nd",01\r\nx\u2028y\u0085z,1.0\r\n NA ,nul\x00l\r\n'
    rows = read_rows(save(tmp_path / "t.csv", content))
    assert rows == [
        {"text": 'a "b", c\nd', "label": "01"},
        {"text": "x\u2028y\u0085z", "label": "1.0"},
        {"text": " NA ", "label": "nul\x00l"},
    ]


def test_csv_reads_a_cell_of_100k_characters(tmp_path):
    rows = read_rows(save(tmp_path / "t.csv", f"text,label\n{'x' * 300_000},a\n"))
    assert len(rows[0]["text"]) == 300_000


def test_tsv_separates_by_tabs_only(tmp_path):
    assert read_rows(save(tmp_path / "t.TSV", "text\tlabel\na, b\tc\n")) == [{"text": "a, b", "label": "c"}]


def test_json_jsonl_and_parquet_hold_the_same_rows(tmp_path):
    rows = [{"text": "a\u2028b", "label": "01"}, {"text": "é", "label": "x"}]
    files = [
        save(tmp_path / "t.json", json.dumps(rows, ensure_ascii=False)),
        save(tmp_path / "t.jsonl", "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        save_parquet(tmp_path / "t.parquet", rows),
    ]
    assert [read_rows(file) for file in files] == [rows] * 3


def test_a_blank_line_of_one_column_is_an_empty_cell(tmp_path):
    """Of what is to be answered, so that rows keep their numbers; not of several columns, and never at the end."""
    one = save(tmp_path / "t.csv", "text\nfirst\n\nthird\n\n")
    assert read_rows(one, blank_lines=True) == [{"text": "first"}, {"text": ""}, {"text": "third"}]
    assert read_rows(one) == [{"text": "first"}, {"text": "third"}]
    two = save(tmp_path / "u.csv", "text,label\na,b\n\nc,d\n\n")
    assert read_rows(two, blank_lines=True) == [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "text,label\na,b\n\nc,d,e\n", "t.csv, line 4: the row has more fields than the header's 2"),
        ("t.csv", "text,label\na,b\nc\n", "t.csv, line 3: the row has fewer fields than the header's 2"),
        ("t.tsv", "text\tlabel\na\n", "t.tsv, line 2: the row has fewer fields"),
        ("t.csv", 'text,label\na,b\n"c,d\ne,f\n', "t.csv, line 3: not readable as CSV"),
        ("t.csv", 'label,text\na,b\nc,"d\ne,f\n', "t.csv, line 3: not readable as CSV"),
        ("t.csv", 'text,label\n"a"b,c\n', "t.csv, line 2: not readable as CSV"),
        ("t.csv", "text,label,text\na,b,c\n", "t.csv, line 1: two columns have the same name"),
        ("t.csv", "text,label,,\na,b,,\n", "t.csv, line 1: columns without a name"),
        ("t.csv", "\n\ntext,label\na,b,c\n", "t.csv, line 4: the row has more fields than the header's 2"),
        ("t.csv", "text;label\nHello, you;b\n", "t.csv, line 1: the columns seem to be separated by ';'"),
        ("t.csv", "sep=;\ntext;label\n", "t.csv, line 1: the columns seem to be separated by ';'"),
        ("t.tsv", 'text\tlabel\n"I come.\ta\nThen we go."\tb\n', "t.tsv, line 3: a field in quotes looks like several"),
        ("t.csv", b"\xd0\xcf\x11\xe0", "t.csv: the file is an old workbook (.xls)"),
        ("t.csv", "text,label\n", "t.csv: the file has no rows"),
        ("t.csv", "", "t.csv: the file has no rows"),
        ("t.json", "", "t.json: the file has no rows"),
        ("t.json", "[]", "t.json: the file has no rows"),
        ("t.jsonl", "\n\n", "t.jsonl: the file has no rows"),
        ("t.jsonl", '{"text": "a"}\n{"text": \n', "t.jsonl, line 2: not valid JSON"),
        (
            "t.json",
            '{"text": "a"}\n{"text": "b"}\n',
            "t.json, line 2: not valid JSON: Extra data. Name a file with one",
        ),
        ("t.json", '{"text": "a"}', "t.json: expected a list of objects"),
        ("t.jsonl", "[1]\n", "t.jsonl, line 1: expected an object"),
        ("t.parquet", "text", "t.parquet: not a complete Parquet file"),
        ("t.parquet", "", "t.parquet: not a complete Parquet file"),
        ("t.csv", b"text,label\na,b\ncaf\xe9,b\n", "t.csv, line 3: byte 0xe9 is not UTF-8"),
        ("t.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "t.jsonl, line 2: byte 0xff is not UTF-8"),
        ("t.txt", "a", "t.txt: unknown file type '.txt'; use one of .csv, .tsv, .json, .jsonl, .parquet"),
        ("t.jsonl", '{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}\n', "t.jsonl, line 2: half of a surrogate pair"),
        ("t.json", '[{"a": "\\uD83D\\uDE00"}, {"\\uDE00": 1}]', "t.json, data row 2: half of a surrogate pair"),
        ("t.jsonl", '{"a": 1}\n{"a": ' + "[" * 100_000, "t.jsonl, line 2: nested too deeply"),
        ("t.json", '[{"a": 1},\n{"a": ' + "[" * 100_000, "t.json, data row 2: nested too deeply"),
        ("t.jsonl", '{"a": ' + "1" * 5000 + "}", "t.jsonl, line 1: a number has too many digits"),
        (
            "t.json",
            '[{"a": 1}, {"a": 2}, {"a": -' + "1" * 5000 + "}]",
            "t.json, data row 3: a number has too many digits",
        ),
    ],
)
def test_unreadable_files_name_the_line(tmp_path, name, content, message):
    with pytest.raises(InputError) as caught:
        read_rows(save(tmp_path / name, content))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_columns_that_only_look_like_several(tmp_path):
    """Indented text in quotes in a TSV file, and a single column whose name has a comma."""
    assert read_rows(save(tmp_path / "t.tsv", 'text\tlabel\n"def f():\n\treturn 1"\tcode\n')) == [
        {"text": "def f():\n\treturn 1", "label": "code"}
    ]
    assert read_rows(save(tmp_path / "t.csv", '"text, long"\na\n')) == [{"text, long": "a"}]
    assert read_rows(save(tmp_path / "u.tsv", "Question, short\na\n")) == [{"Question, short": "a"}]


def test_an_escaped_backslash_is_no_surrogate(tmp_path):
    assert read_rows(save(tmp_path / "t.jsonl", r'{"a": "\\ud83d"}')) == [{"a": r"\ud83d"}]


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"], ["c"]], names=["text", "label", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match="t.parquet: two columns have the same name. Rename one: text, label, text."):
        read_rows(tmp_path / "t.parquet")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text,label\na,b\n".encode("utf-16"),
            "the file is UTF-16. Save it as UTF-8, for example with `iconv -f utf-16",
        ),
        (b"\x1f\x8b\x08", "the file is compressed by gzip. Unpack it, for example with `gzip -dc t."),
        (b"PK\x03\x04\x14\x00", "the file is a ZIP archive or a workbook (.xlsx). Unpack it, or save the"),
        (b"PAR1\x15\x04PAR1", "the file is Parquet. Rename it, ending in .parquet"),
    ],
    ids=["utf-16", "gzip", "zip", "parquet"],
)
def test_a_file_under_a_wrong_name_is_told_what_it_is(tmp_path, suffix, content, message):
    with pytest.raises(InputError) as caught:
        read_rows(save(tmp_path / f"t.{suffix}", content))
    assert f"t.{suffix}: {message}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_missing_files_and_folders_are_named(tmp_path, suffix):
    with pytest.raises(InputError, match=f"none.{suffix}: there is no such file"):
        read_rows(tmp_path / f"none.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    with pytest.raises(InputError, match=f"folder.{suffix}: this is a folder"):
        read_rows(tmp_path / f"folder.{suffix}")


def test_hash_is_that_of_the_bytes(tmp_path):
    """A changed file must be noticed: by resuming, and by evaluating."""
    path = save(tmp_path / "t.csv", "text,label\na,x\nb,y\n")
    first = load(train_file=path)
    digest = hashlib.sha256((tmp_path / "t.csv").read_bytes()).hexdigest()
    assert first.sources["train"]["sha256"] == digest == file_hash(path)
    save(tmp_path / "t.csv", "text,label\na,x\nb,y \n")
    assert load(train_file=path).sources != first.sources


# --- labels


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["10", "9", "-1", "9"], ["-1", "9", "10"]),
        (["b", "a", "10"], ["10", "a", "b"]),
        (["é", "z", "Z", "a"], ["Z", "a", "z", "é"]),
        (["01", "1", "001"], ["001", "01", "1"]),
        (["--5", "3", "-"], ["-", "--5", "3"]),
        (["1.5", "0.5"], ["0.5", "1.5"]),
        (["a ", " a", "b"], ["a", "b"]),
    ],
)
def test_label_order_is_sorted_numbers_by_value(tmp_path, values, labels):
    """Whole numbers in the order of their value, whatever zeros they begin with; all else as text."""
    path = write_csv(tmp_path / "t.csv", [{"text": f"t{i}", "label": v} for i, v in enumerate(values)])
    data = load(train_file=str(path))
    assert data.labels == labels
    assert named(data) == [(value.strip(),) for value in values]


def test_labels_may_have_thousands_of_digits(tmp_path):
    long = "9" * 5000
    path = write_csv(tmp_path / "t.csv", [{"text": "t", "label": v} for v in (long, "7")])
    assert load(train_file=str(path)).labels == ["7", long]


def test_label_order_does_not_depend_on_the_hash_seed(tmp_path):
    """`1`, `01` and `001` are equal as numbers; a set's order must not decide among them."""
    path = save_jsonl(tmp_path / "t.jsonl", [{"text": "t", "label": "0" * i + "1"} for i in range(12)])
    code = (
        "import sys; from common.data.classification import *; from common.options import *\n"
        "config = ClassificationDataConfig(train_file=sys.argv[1], validation_fraction=0, test_fraction=0)\n"
        "print(load_classification(config).labels)"
    )
    orders = set()
    for seed in "123":
        command = [sys.executable, "-c", code, path]
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        orders.add(subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60).stdout)
    assert len(orders) == 1


def test_ints_whole_floats_and_texts_are_the_same_labels(tmp_path):
    """Integer labels become floats on the way through many tools."""
    values = {"int": [0, 1, 10], "float": [0.0, 1.0, 10.0], "text": ["0", "1", "10"]}
    found = []
    for kind, column in values.items():
        path = save_parquet(tmp_path / f"{kind}.parquet", [{"text": "t", "label": value} for value in column])
        found.append(load(train_file=path))
    assert [data.labels for data in found] == [["0", "1", "10"]] * 3
    assert [named(data) for data in found] == [[("0",), ("1",), ("10",)]] * 3


def test_given_labels_set_the_order(tmp_path):
    path = write_csv(tmp_path / "t.csv", [{"text": "t", "label": value} for value in "abc"])
    data = load(train_file=str(path), labels=["c", "unused", "a", "b"])
    assert data.labels == ["c", "unused", "a", "b"]
    assert [example.labels for example in data.splits["train"]] == [(2,), (3,), (0,)]


def test_unseen_label_of_another_split_is_named(tmp_path):
    """By file, row and label, beside the labels there are; it does not become one of them."""
    train = str(write_csv(tmp_path / "train.csv", [{"text": "t", "label": value} for value in "ab"]))
    test = str(write_csv(tmp_path / "test.csv", [{"text": "t", "label": value} for value in "abz"]))
    assert "test.csv, data row 3: the label 'z' is not among the labels (a, b)" in problem(
        train_file=train, test_file=test
    )
    assert "train.csv, data row 2: the label 'b' is not among the labels (a, x)" in problem(
        train_file=train, labels=["a", "x"]
    )


MULTI = [("x", "y"), ("y",), (), ("x",)]


@pytest.mark.parametrize(
    "kind", ["delimited", "lists", "parquet lists", "ints", "columns", "float columns", "booleans"]
)
def test_multi_label_forms_give_the_same_rows(tmp_path, kind):
    """Whatever the form, float one-hot targets; a row without labels is legal."""
    rows, options = [{"text": f"t{i}"} for i in range(len(MULTI))], {}
    for row, names in zip(rows, MULTI, strict=True):
        if kind == "delimited":
            row["label"], options = " ; ".join(names), {"label_delimiter": ";"}
        elif kind in ("lists", "parquet lists"):
            row["label"] = list(names)
        elif kind == "ints":
            row["label"] = [{"x": 9, "y": 10}[name] for name in names]
        else:
            cell = {"columns": lambda on: str(int(on)), "float columns": float, "booleans": bool}[kind]
            row |= {name: cell(name in names) for name in ("x", "y")}
            options = {"label_columns": ["x", "y"]}
    if kind in ("delimited", "columns"):
        path = str(write_csv(tmp_path / "t.csv", rows))
    elif kind == "lists":
        path = save_jsonl(tmp_path / "t.jsonl", rows)
    else:
        path = save_parquet(tmp_path / "t.parquet", rows)
    data = load(train_file=path, **options)
    assert data.multi_label
    assert data.labels == (["9", "10"] if kind == "ints" else ["x", "y"])
    assert [example.labels for example in data.splits["train"]] == [(0, 1), (1,), (), (0,)]


def test_one_label_is_single_label_even_with_two_classes(tmp_path):
    """A binary task has two labels, never one regression output."""
    data = load(train_file=str(write_csv(tmp_path / "t.csv", [{"text": "t", "label": v} for v in "01"])))
    assert (data.multi_label, data.labels) == (False, ["0", "1"])


@pytest.mark.parametrize("value", ["", " ", "nan", "NaN", None, float("nan")])
def test_missing_label_names_row_and_column(tmp_path, value):
    rows = [{"text": "t", "label": label} for label in ("a", "b", value)]
    path = save_jsonl(tmp_path / "t.jsonl", rows)
    assert "t.jsonl, data row 3, column 'label': the label is missing" in problem(train_file=path)


@pytest.mark.parametrize("value", ["a;nan", None, float("nan"), [None], ["a", ""]])
def test_missing_label_among_several_names_row_and_column(tmp_path, value):
    rows = [{"text": "t", "label": label} for label in ("a;b", "", value)]
    path = save_jsonl(tmp_path / "t.jsonl", rows)
    assert "row 3, column 'label': the label is missing" in problem(train_file=path, label_delimiter=";")


@pytest.mark.parametrize(
    ("train", "test", "place", "form"),
    [
        (["a", "b", ["a"], ["b"]], ["a"], "train.jsonl, data row 3, column 'label'", "a list of labels"),
        ([["a"], ["b"], "a", "b"], [["a"]], "train.jsonl, data row 3, column 'label'", "a single label"),
        (["a", "b"], ["a", ["b"]], "test.jsonl, data row 2, column 'label'", "a list of labels"),
    ],
)
def test_a_label_of_the_other_form_is_named(tmp_path, train, test, place, form):
    """One list among texts must not turn the task into one of several labels."""
    files = {}
    for name, values in (("train", train), ("test", test)):
        files[f"{name}_file"] = save_jsonl(tmp_path / f"{name}.jsonl", [{"text": "t", "label": v} for v in values])
    message = problem(**files)
    assert f"{place}: {form}, where " in message


def test_bad_multi_label_cells_are_named(tmp_path):
    path = str(write_csv(tmp_path / "t.csv", [{"text": "t", "x": "1", "y": "2"}]))
    assert "row 1, column 'y': '2' is not 0 or 1" in problem(train_file=path, label_columns=["x", "y"])
    path = save_jsonl(tmp_path / "t.jsonl", [{"text": "t", "label": ["a", "a"]}])
    assert "row 1, column 'label': a label occurs twice" in problem(train_file=path)
    path = save_jsonl(tmp_path / "u.jsonl", [{"text": "t", "label": ["a", "b, c"]}])
    assert "'b, c' contains a comma" in problem(train_file=path)
    path = save_jsonl(tmp_path / "v.jsonl", [{"text": "t", "label": []}])
    assert "no row has a label" in problem(train_file=path)
    path = str(write_csv(tmp_path / "w.csv", [{"text": "t", "x": "0", "y": "0"}]))
    assert "all 1 training rows are without a label" in problem(train_file=path, label_columns=["x", "y"])


def test_labels_that_cannot_be_told_apart_are_refused(tmp_path):
    path = str(write_csv(tmp_path / "t.csv", [{"text": "t", "label": v} for v in "aaa"]))
    assert "t.csv: all 3 training rows have the label 'a'" in problem(train_file=path)
    path = str(write_csv(tmp_path / "u.csv", [{"text": "t", "label": v} for v in "ab"]))
    assert "--labels names 'a' twice" in problem(train_file=path, labels=["a", "b", "a"])
    assert "--labels: a label is blank" in problem(train_file=path, labels=["\u3000", "a"])
    assert "--labels names 'a' twice" in problem(train_file=path, labels=["a", "a\xa0", "b"])


NFD, NFC = "cafe\u0301", "caf\u00e9"


def test_labels_are_trimmed_and_composed_wherever_they_are_given(tmp_path):
    """In rows of every split, in --labels, in a file of weights, and where they are columns."""
    files = {
        f"{name}_file": str(write_csv(tmp_path / f"{name}.csv", [{"text": "t", "label": v} for v in values]))
        for name, values in (("train", [NFD, f"{NFC}\xa0", " tea"]), ("test", [NFC, "tea\u2003"]))
    }
    weights = save(tmp_path / "w.json", json.dumps({f" {NFD}": 1, "tea ": 2}))
    for options in ({}, {"labels": [f"{NFD} ", " tea"]}):
        data = load(**files, **options, class_weights=weights)
        assert (data.labels, named(data), named(data, "test")) == (
            [NFC, "tea"], [(NFC,), (NFC,), ("tea",)], [(NFC,), ("tea",)]
        )  # fmt: skip
        assert class_weights(weights, [], data.labels, False) == [1, 2]
    path = str(write_csv(tmp_path / "columns.csv", [{"text": "t", NFD: "1", "tea ": "0"}] * 2))
    data = load(train_file=path, label_columns=[NFC, " tea"])
    assert (data.labels, named(data)) == ([NFC, "tea"], [(NFC,)] * 2)
    path = str(write_csv(tmp_path / "tags.csv", [{"text": "t", "label": f" {NFD};tea\u2003"}]))
    assert load(train_file=path, label_delimiter=";").labels == [NFC, "tea"]
    path = str(write_csv(tmp_path / "twice.csv", [{"text": "t", "label": f"{NFD};{NFC}"}]))
    assert "a label occurs twice" in problem(train_file=path, label_delimiter=";")


@pytest.mark.parametrize(
    "variants",
    [
        ("Sports", "sports"),
        ("01", "1", "1.0"),
        ("New York", "New\xa0York"),
        ("ab", "a\u200bb", "\ufeffab"),
        ("❤", "❤\ufe0f"),
    ],
)
def test_spellings_of_one_label_are_reported(tmp_path, variants):
    """With their rows and what to do; they stay classes of their own."""
    rows = [{"text": "t", "label": v} for i, v in enumerate(variants) for _ in range(i + 1)]
    rows += [{"text": "t", "label": v} for v in ("other", "another", "100")]
    data = load(train_file=str(write_csv(tmp_path / "t.csv", rows)))
    assert set(variants) <= set(data.labels)
    (note,) = data.report["notes"]
    shown = ", ".join(f"{v!r} in {i + 1} row{'s' if i else ''}" for i, v in enumerate(variants))
    assert f"{shown}. If they mean the same, write them alike." in note
    assert note in data_report(data.report, "")


def test_labels_that_stand_for_missing_values_are_reported(tmp_path):
    names = ["null", "NA", "None", "n/a", "real", "nationality"]
    path = str(write_csv(tmp_path / "t.csv", [{"text": "t", "label": v} for v in [*names, "null"]]))
    (note,) = load(train_file=path).report["notes"]
    assert "'NA' in 1 row, 'None' in 1 row, 'n/a' in 1 row, 'null' in 2 rows" in note and "real" not in note
    assert "notes" not in load(train_file=path, labels=names).report, "who lists the labels has seen them"


def test_many_spellings_are_a_short_note(tmp_path):
    rows = [{"text": "t", "label": f"{word}{i}"} for word in ("a", "A") for i in range(100)]
    (note,) = load(train_file=str(write_csv(tmp_path / "t.csv", rows))).report["notes"]
    assert len(note) < 700 and "90 more" in note


def test_missing_columns_are_named_with_those_there_are(tmp_path):
    path = str(write_csv(tmp_path / "t.csv", [{"body": "t", "topic": v} for v in "ab"]))
    message = problem(train_file=path)
    assert "t.csv: there is no column 'label'; it has body, topic. Name the right one with --label_column." in message
    message = problem(train_file=path, label_column="topic")
    assert "t.csv: there is no column 'text'; it has body, topic. Name the right one with --text_fields." in message
    assert "no column 'x'; it has body" in problem(train_file=path, label_column="topic", text_fields=["body", "x"])
    message = problem(train_file=path, label_columns=["topic", "z"], text_fields=["body"])
    assert "no column 'z'; it has body, topic. Name the right one with --label_columns." in message
    for name in ("body", "topic"):
        assert "would be a part" in problem(train_file=path, text_fields=[name], label_column=name)
    options = {"train_file": path, "label_column": "topic", "text_fields": ["body"]}
    assert "no column 'n'; it has body, topic. Name the right one with --id_column." in problem(
        **options, id_column="n"
    )
    message = problem(**options, id_column="body")
    assert "t.csv, data row 2, column 'body': the id is missing or occurs in an earlier row. Give every" in message


def test_problem_type_must_fit_the_data(tmp_path):
    path = str(write_csv(tmp_path / "t.csv", [{"text": "t", "label": v} for v in "ab"]))
    assert not load(train_file=path, problem_type="single_label_classification").multi_label
    message = problem(train_file=path, problem_type="multi_label_classification")
    assert "--problem_type multi_label_classification does not fit" in message


def test_ids_are_row_numbers_or_a_column(tmp_path):
    rows = [{"text": "t", "label": v, "key": f"k{v}"} for v in "ab"]
    path = str(write_csv(tmp_path / "t.csv", rows))
    assert [e.id for e in load(train_file=path).splits["train"]] == ["0", "1"]
    assert [e.id for e in load(train_file=path, id_column="key").splits["train"]] == ["ka", "kb"]


# --- the report


def test_report_counts_drops_duplicates_and_overlap(tmp_path):
    train = [("a one", "x"), ("a one", "y"), ("", "x"), ("b two", "y"), ("  ", "y")]
    test = [("a one", "x"), ("", "y"), ("c", "y"), ("c", "y")]
    files = {
        name: str(write_csv(tmp_path / f"{name}.csv", [dict(zip(("text", "label"), row, strict=True)) for row in rows]))
        for name, rows in (("train", train), ("test", test))
    }
    data = load(train_file=files["train"], test_file=files["test"])
    assert data.report["rows"] == {
        "train": {
            "read": 5,
            "dropped_empty_text": 2,
            "used": 3,
            "duplicates": 1,
            "label_counts": {"x": 1, "y": 2},
        },
        "test": {
            "read": 4,
            "dropped_empty_text": 0,  # a row to be evaluated always gets its answer
            "used": 4,
            "duplicates": 1,
            "also_in_train": 1,
            "label_counts": {"x": 1, "y": 3},
        },
    }
    assert [example.id for example in data.splits["train"]] == ["0", "1", "3"]


def test_the_text_is_in_the_same_columns_of_every_file(tmp_path):
    """A test file with a `text` beside title and abstract would be read otherwise than its training file."""
    rows = [{"title": f"t{i}", "abstract": f"a{i}", "label": "xy"[i % 2]} for i in range(6)]
    train = str(write_csv(tmp_path / "train.csv", rows))
    test = str(write_csv(tmp_path / "test.csv", [{**row, "text": "whole"} for row in rows]))
    message = problem(train_file=train, test_file=test)
    assert f"({train}: title, abstract; {test}: text). Name them with --text_fields." in message
    config = {"train_file": train, "test_file": test, "text_fields": ["title", "abstract"]}
    assert load(**config).splits["test"][0].text == "t0. a0."
    label = {"train_file": train, "label_column": "title"}
    assert "'title' would be a part of the text" in problem(**label)
    assert load(**label, text_fields=["abstract"]).splits["train"][0].text == "a0."
    several = [{"a": i % 2, "b": 1 - i % 2, "label": f"words {i}"} for i in range(6)]
    options = {"label_columns": ["a", "b"], "text_fields": ["label"]}
    assert load(train_file=str(write_csv(tmp_path / "m.csv", several)), **options).splits["train"][2].text == "words 2."


def test_rows_without_any_text_are_refused(tmp_path):
    path = str(write_csv(tmp_path / "t.csv", [{"text": " ", "label": v} for v in "ab"]))
    assert "t.csv: no row has any text. Is --text_fields right?" in problem(train_file=path)


# --- splits


@pytest.fixture(scope="module")
def hundred(tmp_path_factory) -> str:
    """60 rows of a, 30 of b, 10 of c, mixed."""
    rows = [{"text": f"text {i}", "label": "a" * (i % 10 < 6) or "b" * (i % 10 < 9) or "c"} for i in range(100)]
    return str(write_csv(tmp_path_factory.mktemp("hundred") / "t.csv", rows))


def ids(data) -> dict[str, list[str]]:
    return {split: [example.id for example in rows] for split, rows in data.splits.items()}


def test_missing_splits_are_cut_stratified_and_disjoint(hundred):
    data = load(train_file=hundred, validation_fraction=0.1, test_fraction=0.2)
    assert [Counter(named(data, split)) for split in ("train", "validation", "test")] == [
        {("a",): 42, ("b",): 21, ("c",): 7},
        {("a",): 6, ("b",): 3, ("c",): 1},
        {("a",): 12, ("b",): 6, ("c",): 2},
    ]
    found = ids(data)
    assert sorted(int(i) for rows in found.values() for i in rows) == list(range(100))
    assert all(rows == sorted(rows, key=int) for rows in found.values())
    assert data.report["cut_from_train"] == {"test": 20, "validation": 10}


def test_split_depends_on_split_seed_alone(hundred):
    """Several --seeds compare on the same test rows."""
    options = {"train_file": hundred, "validation_fraction": 0.1, "test_fraction": 0.2}
    first = ids(load(**options))
    np.random.seed(1)
    assert ids(load(**options, seed=7)) == first
    assert ids(load(**options, split_seed=7)) != first


def test_a_split_with_a_file_is_not_cut(hundred, tmp_path):
    test = str(write_csv(tmp_path / "test.csv", [{"text": "t", "label": "a"}]))
    data = load(train_file=hundred, test_file=test, validation_fraction=0.1, test_fraction=0.2)
    assert [len(rows) for rows in data.splits.values()] == [90, 10, 1]
    assert data.report["cut_from_train"] == {"validation": 10}


def test_too_few_rows_to_cut_says_what_to_do(tmp_path):
    path = str(write_csv(tmp_path / "t.csv", [{"text": "t", "label": v} for v in "ab"]))
    message = problem(train_file=path, test_fraction=0.1)
    assert "2 rows are too few to cut 10% for test" in message and "--test_file" in message
    path = str(write_csv(tmp_path / "t.csv", [{"text": "t", "label": f"id {i}"} for i in range(50)]))
    message = problem(train_file=path, test_fraction=0.1)
    assert "no label has rows to spare among the 50, to cut 10% for test" in message and "--label_column" in message


def test_multi_label_cut_is_stratified_by_frequent_combinations(tmp_path):
    """Combinations of 10 rows and more keep their share; rarer ones share one stratum."""
    names = ["x y"] * 40 + ["x"] * 20 + [""] * 20 + ["x z"] * 9 + ["y z"] * 7 + ["x y z"] * 4
    path = str(write_csv(tmp_path / "t.csv", [{"text": f"t{i}", "label": n} for i, n in enumerate(names)]))
    data = load(train_file=path, label_delimiter=" ", test_fraction=0.2)
    counts = Counter(named(data, "test"))
    assert [counts[combination] for combination in (("x", "y"), ("x",), ())] == [8, 4, 4]
    assert sum(counts.values()) == 20


def test_limits_draw_stratified_and_leave_the_test_split_whole(hundred):
    options = {"train_file": hundred, "validation_fraction": 0.2, "test_fraction": 0.2}
    data = load(**options, max_train_samples=20, max_eval_samples=10)
    assert Counter(named(data)) == {("a",): 12, ("b",): 6, ("c",): 2}
    assert Counter(named(data, "validation")) == {("a",): 6, ("b",): 3, ("c",): 1}
    assert len(data.splits["test"]) == 20
    whole = load(**options)
    assert set(data.splits["train"]) < set(whole.splits["train"]) and data.splits["test"] == whole.splits["test"]
    assert load(**options, max_train_samples=20, max_eval_samples=10).splits == data.splits
    assert load(**options, max_train_samples=1000).splits == whole.splits


def test_even_splits_are_those_of_earlier_versions(hundred):
    """Figures that were published on them stay comparable."""
    found = ids(load(train_file=hundred, validation_fraction=0.1, test_fraction=0.2))
    assert found["validation"] == list(map(str, [10, 17, 29, 37, 61, 70, 74, 78, 92, 94]))
    assert found["test"] == list(
        map(str, [5, 8, 9, 11, 19, 25, 26, 28, 30, 36, 40, 43, 44, 56, 63, 72, 77, 82, 91, 95])
    )


def cut(path, sizes: dict[str, int], seed: int, **options):
    """The three splits of a file with so many rows of each label."""
    rows = [{"text": f"text {i}", "label": name} for name, size in sizes.items() for i in range(size)]
    file = str(write_csv(path / "t.csv", rows))
    return load(train_file=file, **{"validation_fraction": 0.1, "test_fraction": 0.1, **options}, split_seed=seed)


def labels_of(data) -> list[set[str]]:
    """The labels of train, validation and test."""
    return [{name for row in named(data, split) for name in row} for split in ("train", "validation", "test")]


def test_the_seed_draws_the_labels_of_a_split_too_small_for_all(tmp_path):
    """40 labels, 20 rows in each split: neither always the same labels, nor always those that the other split lacks."""
    found = [labels_of(cut(tmp_path, {f"l{i:02}": 5 for i in range(40)}, seed)) for seed in range(8)]
    for train, validation, test in found:
        assert (len(train), len(validation), len(test)) == (40, 20, 20)
    for split in (1, 2):
        assert len({frozenset(labels[split]) for labels in found}) == 8
        assert len(set.union(*(labels[split] for labels in found))) > 35
    assert any(validation & test for _, validation, test in found)


@pytest.mark.parametrize("seed", range(4))
def test_every_label_with_three_rows_is_in_every_split(tmp_path, seed):
    sizes = {"common": 200, **{f"rare{i}": 3 for i in range(10)}}
    data = cut(tmp_path, sizes, seed)
    assert labels_of(data) == [set(sizes)] * 3
    assert [len(rows) for rows in data.splits.values()] == [184, 23, 23]
    assert "without a row" not in data_report(data.report, "")


@pytest.mark.parametrize("seed", range(4))
def test_no_cut_takes_a_label_out_of_training(tmp_path, seed):
    """Singletons stay; of two rows one does; the data report says in a line what the splits lack."""
    sizes = {**{f"l{i}": 10 for i in range(5)}, **{f"single{i:02}": 1 for i in range(30)}}
    data = cut(tmp_path, sizes, seed)
    train, validation, test = labels_of(data)
    assert (train, validation, test) == (set(sizes), *[{f"l{i}" for i in range(5)}] * 2)
    assert [len(rows) for rows in data.splits.values()] == [64, 8, 8]
    (line,) = [line for line in data_report(data.report, "").splitlines() if "without a row" in line]
    assert "validation 30 (single00, single01, " in line and "test 30 (single00, " in line and "train" not in line
    train, validation, test = labels_of(cut(tmp_path, {"a": 20, "b": 2, "c": 2}, seed, test_fraction=0.4))
    assert train == {"a", "b", "c"}
    singles = str(write_csv(tmp_path / "u.csv", [{"text": "t", "label": f"{i}"} for i in range(50)]))
    message = problem(train_file=singles, test_fraction=0.1)
    assert "u.csv: no label has rows to spare among the 50, to cut 10% for test" in message


@pytest.mark.parametrize("seed", range(4))
def test_no_cut_takes_a_label_of_several_out_of_training(tmp_path, seed):
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 31) ** 2  # most labels are rare
    rows = [
        {"text": f"t{i}", "label": [f"l{k:02}" for k in np.flatnonzero(rng.random(30) < weights)]} for i in range(300)
    ]
    data = load(train_file=save_jsonl(tmp_path / "t.jsonl", rows), validation_fraction=0.2, test_fraction=0.2,
                split_seed=seed)  # fmt: skip
    train, validation, test = labels_of(data)
    counts = Counter(name for row in rows for name in row["label"])
    assert train == set(counts) and min(counts.values()) < 3
    assert {name for name, n in counts.items() if n >= 6} <= validation & test
    assert [len(rows) for rows in data.splits.values()] == [180, 60, 60]


def test_a_sample_has_every_label_if_it_is_large_enough(tmp_path):
    sizes = {"common": 200, **{f"rare{i}": 1 + i % 2 for i in range(9)}}
    data = cut(tmp_path, sizes, 1, max_train_samples=10)
    assert labels_of(data)[0] == set(sizes)


def test_sample_sizes_add_up_whatever_the_shares():
    rows = [(i % 7,) for i in range(53)]
    for count in range(54):
        chosen = stratified_sample(rows, count, seed=count)
        assert len(set(chosen)) == count and chosen == sorted(chosen)
        sizes = Counter(rows[i] for i in chosen)
        assert all(abs(sizes[labels] - count * n / 53) < 1 for labels, n in Counter(rows).items())


def with_rows(train: list[Example], **others: list[Example]) -> ClassificationData:
    report = {"rows": {split: {"used": len(rows)} for split, rows in {"train": train, **others}.items()}}
    return ClassificationData({"train": train, **others}, ["a", "b", "c"], False, {}, report)


def draw_shots(data: ClassificationData, count: int, seed: int = 1):
    return draw_few_shot(data, SimpleNamespace(few_shot=count, split_seed=seed))


def test_few_shot_examples_are_stratified_and_leave_the_training_rows():
    rows = [Example(str(i), f"text {i}", (i % 3,)) for i in range(30)]
    data = with_rows(rows)
    shots, rest = draw_shots(data, 6)
    assert data.report["rows"]["train"] == {
        "used": 24, "few_shot": 6, "also_few_shot": 0, "label_counts": dict.fromkeys("abc", 8)
    }  # fmt: skip
    assert Counter(labels for _, labels in shots) == {(0,): 2, (1,): 2, (2,): 2}
    assert sorted([*(text for text, _ in shots), *(row.text for row in rest)]) == sorted(row.text for row in rows)
    assert draw_shots(data, 6) == (shots, rest) != draw_shots(data, 6, seed=2)
    assert draw_shots(data, 0) == ([], rows)
    with pytest.raises(InputError, match="no training rows to draw from"):
        draw_shots(with_rows([], test=rows), 1)
    for count in (28, 30, 40):
        with pytest.raises(InputError, match=f"--few_shot {count}: only 27 of the 30 training rows can be spared"):
            draw_shots(data, count)


def test_copies_of_few_shot_examples_leave_the_training_rows_too():
    """A prompt must not hold the answer of its own row; rows to be measured stay, and are counted."""
    rows = [Example(str(i), f"text {i // 3}", (i // 3 % 2,)) for i in range(30)]
    data = with_rows(rows, validation=rows[:4], test=[Example("0", "other", (0,))])
    for _ in range(2):  # check_prompt draws them as well
        shots, rest = draw_shots(data, 2)
        texts = {text for text, _ in shots}
        assert len(texts) == 2 and [row.text for row in rest] == [row.text for row in rows if row.text not in texts]
        counts = dict(data.report["rows"]["train"])
        assert sum(counts.pop("label_counts").values()) == 24
        assert counts == {"used": 24, "few_shot": 2, "also_few_shot": 4}
        in_prompt = sum(row.text in texts for row in rows[:4])
        assert data.report["rows"]["validation"] == {"used": 4, "also_few_shot": in_prompt}
        assert data.report["rows"]["test"] == {"used": 1, "also_few_shot": 0}
    with pytest.raises(InputError, match="--few_shot 1: only 0 of the 6 training rows can be spared"):
        draw_shots(with_rows([replace(row, text="same") for row in rows[:6]]), 1)


def test_a_text_with_two_labels_is_no_few_shot_example():
    """Its copies leave the training rows, and their labels would lose a row more than was counted."""
    rows = [Example(str(i), f"{i}", (0,)) for i in range(3)]
    rows += [Example("3", "same", (0,)), Example("4", "same", (1,))]
    for seed in range(10):
        shots, rest = draw_shots(with_rows(rows), 1, seed)
        assert shots[0][0] != "same" and {row.labels for row in rest} == {(0,), (1,)}


# --- class weights


def test_balanced_weights_are_those_of_scikit_learn():
    """scikit-learn's `balanced`; and none where none are wanted."""
    gold = [0] * 90 + [1] * 9 + [2]
    rows = [Example(str(i), "t", (k,)) for i, k in enumerate(gold)]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=np.array(gold))
    assert class_weights("balanced", rows, ["a", "b", "c"], False) == pytest.approx(expected)
    assert class_weights("none", rows, ["a", "b", "c"], False) is None


def test_balanced_weights_of_several_labels_are_negatives_by_positives():
    """`pos_weight` of BCEWithLogitsLoss; a label without a row counts as with one."""
    rows = [Example(str(i), "t", (0,) if i < 2 else (0, 1) if i < 3 else ()) for i in range(10)]
    assert class_weights("balanced", rows, ["a", "b", "c"], True) == pytest.approx([7 / 3, 9, 9])


def test_balanced_weights_of_several_labels_are_bounded(tmp_path):
    """A label in every row would get the factor 0 and never be learned; the data report names those at a bound."""
    names = [["all", "half"] if i % 2 else ["all"] for i in range(200)]
    names[7] = ["all", "once", "half"]
    path = save_jsonl(tmp_path / "t.jsonl", [{"text": f"t{i}", "label": row} for i, row in enumerate(names)])
    options = {"train_file": path, "labels": ["all", "half", "once", "never"], "approach": "head"}
    data = load(**options, class_weights="balanced")
    weights = class_weights("balanced", data.splits["train"], data.labels, True)
    assert weights == pytest.approx([0.01, 1, 100, 100])
    (note,) = data.report["notes"]
    assert note.endswith("of 200 training rows: 'all' in 200, 'once' in 1, 'never' in 0") and "0.01 to 100" in note
    assert "notes" not in load(**options).report


def test_weights_of_a_file_follow_the_label_order(tmp_path, hundred):
    path = save(tmp_path / "w.json", '{"c": 3, "a": 1, "b": 2.5}')
    data = load(train_file=hundred, class_weights=path)
    assert class_weights(path, data.splits["train"], data.labels, False) == [1.0, 2.5, 3.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": 2}', "no weight for the label 'c'"),
        ('{"a": 1, "b": 2, "c": NaN}', "the weight of 'c' is nan"),
        ('{"a": 1, "b": -2, "c": 1}', "the weight of 'b' is -2.0"),
        ('{"a": 1, "b": 0, "c": 1}', "the weight of 'b' is 0.0"),  # an update of such rows would have no target
        ("[1, 2, 3]", "not a JSON object"),
        ("balanced", "not a JSON object"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000, "too many digits"),
        ('{"a": ' + "1" * 400 + "}", "int too large"),
        (None, "there is no such file"),
    ],
)
def test_bad_weight_files_are_refused_while_the_data_is_read(tmp_path, hundred, content, message):
    path = str(tmp_path / "w.json")
    if content is not None:
        save(tmp_path / "w.json", content)
    found = problem(train_file=hundred, class_weights=path)
    assert message in found and "w.json" in found


def test_weights_that_nothing_would_honor_are_refused(tmp_path):
    """Also where only the data shows that rows have several labels."""
    path = save_jsonl(tmp_path / "t.jsonl", [{"text": "t", "label": ["a", "b"]}])
    assert "needs --approach head" in problem(train_file=path, class_weights="balanced")
    assert "one label per row only" in problem(train_file=path, class_weights="w.json", approach="head")
    assert load(train_file=path, class_weights="balanced", approach="head").multi_label


# --- data sets


def test_local_data_set_folder_gives_class_names(tmp_path, monkeypatch):
    """A hub data set stores class numbers; the labels are their names, of one class and of lists of them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = datasets.ClassLabel(names=["World", "Sci/Tech"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names, "tags": datasets.List(names)})
    for split in ("train", "test"):
        columns = {"text": ["t", "u"], "label": [0, 1], "tags": [[0, 1], []]}
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / f"set/{split}-00000-of-00001.parquet")
    data = load(dataset_name=str(tmp_path / "set"))
    assert (data.labels, named(data, "test")) == (["Sci/Tech", "World"], [("World",), ("Sci/Tech",)])
    several = load(dataset_name=str(tmp_path / "set"), label_column="tags")
    assert (several.multi_label, [len(row) for row in named(several)]) == (True, [2, 0])


def test_local_data_set_folder_of_csv_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for split, size in (("train", 4), ("validation", 2)):
        write_csv(tmp_path / f"set/{split}.csv", toy_rows(size))
    data = load(dataset_name=str(tmp_path / "set"))
    assert data.labels == sorted(WORDS)
    assert [len(rows) for rows in data.splits.values()] == [12, 6, 0]
    assert data.sources["train"]["name"].endswith("set [train]") and len(data.sources["train"]["sha256"]) == 64


def test_splits_of_a_data_set_that_are_not_used_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_dict({"text": ["t", "u"], "label": ["a", "b"]})
    found = {"train": rows, "validation_matched": rows}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, configuration: found)
    load(dataset_name=str(tmp_path))
    assert "its splits validation_matched are not used." in capsys.readouterr().err
    found["train_sft"] = found.pop("train")
    assert "none of its splits (train_sft, validation_matched) is called train" in problem(dataset_name=str(tmp_path))
    found["test"] = rows
    assert "there is no split `train`" in problem(dataset_name=str(tmp_path))


def test_a_split_of_a_data_set_without_labels_is_left_out(tmp_path, monkeypatch):
    """As the test split of a competition, whose classes are all -1."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = datasets.ClassLabel(names=["x", "y"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    for split, labels in (("train", [0, 1] * 10), ("test", [-1] * 4)):
        columns = {"text": [f"{split} {i}" for i in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / f"set/{split}-00000-of-00001.parquet")
    data = load(dataset_name=str(tmp_path / "set"), test_fraction=0.2)
    assert [len(rows) for rows in data.splits.values()] == [16, 0, 4] and "test" not in data.sources
    assert any("set [test] has no label in any row" in note for note in data.report["notes"])
    (tmp_path / "set/train-00000-of-00001.parquet").unlink()
    message = problem(training=False, dataset_name=str(tmp_path / "set"))
    assert message.endswith("set: no row has a label. Is --label_column right?")


def test_files_without_training_rows_serve_evaluation_only(tmp_path):
    path = str(write_csv(tmp_path / "t.csv", [{"text": "t", "label": v} for v in "ba"]))
    data = load(training=False, test_file=path)
    assert (data.labels, len(data.splits["test"])) == (["a", "b"], 2)
    assert "there are no training rows; give --train_file" in problem(test_file=path)


def test_demo_data_loads_without_any_option():
    data = load_classification(Config())
    assert data.labels == ["cs.CL", "cs.CV", "cs.LG", "hep-ph", "quant-ph"]
    assert all(min(Counter(named(data, split)).values()) >= 8 for split in data.splits)
    assert all(entry.get("also_in_train", 0) == 0 == entry["duplicates"] for entry in data.report["rows"].values())
    several = load_classification(replace(Config(), label_column="categories", label_delimiter=";"))
    assert several.multi_label and several.labels == data.labels


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_folds_test_every_row_once_with_the_labels_in_proportion(kind):
    """Equal sizes; other rows by another seed; the same ones for the same seed."""
    rng = random.Random(kind)
    rows = [(i, tuple(sorted(rng.sample(range(4), 1 if kind == "single" else rng.randint(0, 3))))) for i in range(203)]
    parts = [splits.hold_out(rows, fold, 5, 42, itemgetter(1)) for fold in range(1, 6)]
    assert sorted(row for part in parts for row in part["test"]) == rows
    assert all(sorted(part["test"] + part["train"]) == rows for part in parts)
    sizes = [len(part["test"]) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for labels in {labels for _, labels in rows}:
        counts = [sum(row[1] == labels for row in part["test"]) for part in parts]
        assert max(counts) - min(counts) <= 1
    assert splits.hold_out(rows, 2, 5, 42, itemgetter(1)) == parts[1]
    assert splits.hold_out(rows, 2, 5, 43, itemgetter(1)) != parts[1]
    with pytest.raises(InputError, match="--folds 5: there are only 3 rows"):
        splits.hold_out(rows[:3], 5, 5, 42, itemgetter(1))


def test_folds_of_the_demo_are_of_its_training_rows():
    data = load_classification(Config(folds=5, fold=1))
    assert data.sources.keys() == {"train", "validation"} and len(data.splits["test"]) == 40
    assert data.report["rows"]["test"]["used"] == 40 and "read" not in data.report["rows"]["test"]


def test_what_would_be_lost_or_misread_is_said(tmp_path):
    """A name twice in an object, a date outside of Python's years, labels that are lists in text."""
    import pyarrow.parquet

    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "a", "text": "b", "label": "y"}\n')
    with pytest.raises(InputError, match="t.jsonl, line 2: .*twice the name 'text'"):
        load(train_file=str(tmp_path / "t.jsonl"))
    when = pyarrow.array([2**62, 2**62], pyarrow.timestamp("us"))
    columns = pyarrow.table({"text": ["a", "b"], "label": ["x", "y"], "when": when})
    pyarrow.parquet.write_table(columns, tmp_path / "t.parquet")
    with pytest.raises(InputError, match="t.parquet: a column cannot be read"):
        load(train_file=str(tmp_path / "t.parquet"))
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": "x"}\n\nnull\n')
    with pytest.raises(InputError, match="t.jsonl, line 3: expected an object, such as"):
        load(train_file=str(tmp_path / "t.jsonl"))
    when = pyarrow.array([0, 0], pyarrow.timestamp("us", "Nowhere/Land"))
    pyarrow.parquet.write_table(columns.set_column(2, "when", when), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="t.parquet: a column cannot be read"):
        load(train_file=str(tmp_path / "t.parquet"))
    rows = [{"text": f"t{i}", "label": ("['x', 'z']", "['y']")[i % 2]} for i in range(6)]
    data = load(train_file=str(write_csv(tmp_path / "t.csv", rows)))
    (note,) = data.report["notes"]
    assert "written as a list" in note and "\"['x', 'z']\" in 3 rows" in note and "--label_delimiter" in note
