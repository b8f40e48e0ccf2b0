"""Builders of common/data/builders.py on small stand-ins of each source, without a network."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from helpers import ROOT

import train_clm
from common import prepare
from common.data import builders
from common.data.classification import load_classification
from common.data.conversations import load_conversations
from common.data.corpus import open_sources
from common.data.splits import SPLITS
from common.errors import InputError
from common.options import ChatDataConfig, ClassificationDataConfig, parse_config

ARXIV_SIZES = {"cs.LG": 60, "cs.CV": 50, "cs.CL": 40, "math.CO": 30, "hep-th": 20, "cs.RO": 6, "q-bio.NC": 1}
AMAZON_NAMES = ["new", "books", "Clothing, Shoes & Jewelry", "music", "title"]
AMAZON_README = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: labels
  data_files:
  - {split: train, path: labels/train-*}
---
"""


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No network, no retries, and a cache of each test's own."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def write_jsonl(folder: Path, rows: list[dict], split: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_parquet(folder: Path, split: str, columns: dict, features: dict | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def arxiv_source(folder: Path, category) -> Path:
    """Rows with the columns that `category(name)` gives; the categories take turns, so that no split is a block."""
    names = [name for name, size in ARXIV_SIZES.items() for _ in range(size)]
    names = [names[i * 97 % len(names)] for i in range(len(names))]
    rows = []
    for i, name in enumerate(names):
        texts = {"title": f"A\r{i}", "abstract": f'On {name}, "{i}",\r\nin\rlines.', "markdown": "# long"}
        rows.append({"id": f"2401.{i:05}"} | texts | category(name))
    return write_jsonl(folder, rows)


def amazon_source(folder: Path, train: list[list[int]], test: list[list[int]]) -> Path:
    """As on the hub: label numbers in the default configuration, their names in the configuration `labels`."""
    for split, cells in (("train", train), ("test", test)):
        texts = [f"Product {i} of {split}" for i in range(len(cells))]
        columns = {"uid_original": texts, "title": texts, "content": [None, *texts[1:]], "target_ind": cells}
        write_parquet(folder / "data", split, {**columns, "text": texts, "uid": list(range(len(cells)))})
    write_parquet(folder / "labels", "train", {"labels": AMAZON_NAMES})
    (folder / "README.md").write_text(AMAZON_README)
    return folder


@pytest.fixture
def amazon(tmp_path):
    train = [[1], [1, 2], [1, 3], [2], [0], [1, 2, 4], [], [1, 4]] * 20
    return amazon_source(tmp_path / "amazon", train, [[1], [0], [2, 3], [4], []] * 4)


def news_source(folder: Path) -> Path:
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["World", "Sci/Tech, more"])}
    for split, size in (("train", 100), ("test", 30)):
        columns = {"text": [f"{split} {i}" for i in range(size)], "label": [int(i % 4 == 0) for i in range(size)]}
        write_parquet(folder, split, columns, features)
    return folder


def build(name: str, source: Path, folder: Path, *options: str) -> SimpleNamespace:
    prepare.main([name, "--source", str(source), "--output_dir", str(folder), *options])
    result = SimpleNamespace(source=json.loads((folder / "SOURCE.json").read_text()))
    for split in SPLITS:
        with open(folder / f"{split}.csv", encoding="utf-8", newline="") as file:
            setattr(result, split, list(csv.DictReader(file)))
    return result


def load_with(command: str):
    """What train_cls.py reads, given the options that were printed."""
    words = shlex.split(command)
    assert words[:3] == ["accelerate", "launch", "train_cls.py"]
    return load_classification(parse_config(ClassificationDataConfig, words[3:]))


def last_line(capsys) -> str:
    return capsys.readouterr().out.strip().split("\n")[-1]


def test_arxiver_keeps_the_top_categories_and_splits_them_in_proportion(tmp_path, capsys):
    source = arxiv_source(tmp_path / "arxiv", lambda name: {"primary_category": name, "categories": f"cs.AI {name}"})
    out = build("arxiver", source, tmp_path / "out dir")
    assert Counter(row["label"] for row in out.train) == {
        "cs.LG": 48, "cs.CV": 40, "cs.CL": 32, "math.CO": 24, "hep-th": 16
    }  # fmt: skip
    for split in (out.validation, out.test):
        assert Counter(row["label"] for row in split) == {"cs.LG": 6, "cs.CV": 5, "cs.CL": 4, "math.CO": 3, "hep-th": 2}
    assert list(out.train[0]) == ["id", "title", "abstract", "label"]
    rows = out.train + out.validation + out.test
    assert len({row["id"] for row in rows}) == 200
    for row in rows:  # text and label of a row stay together, line ends and quotes too
        assert row["title"] == f"A\r{int(row['id'][5:])}"
        assert row["abstract"] == f'On {row["label"]}, "{int(row["id"][5:])}",\r\nin\rlines.'

    assert out.source["rows"] == {"train": 160, "validation": 20, "test": 20}
    assert out.source["label_counts"]["test"] == {"cs.LG": 6, "cs.CV": 5, "cs.CL": 4, "math.CO": 3, "hep-th": 2}
    assert out.source["source"] == str(source) and out.source["revision"] is None
    assert out.source["options"] == {
        "source": str(source), "top": 5, "max_rows": None, "seed": 42, "category_column": None
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "train: read 207 rows, dropped 7 that have none of the 5 labels" in printed
    data = load_with(printed.strip().split("\n")[-1])
    assert data.labels == sorted(["cs.LG", "cs.CV", "cs.CL", "math.CO", "hep-th"])
    assert {split: len(rows) for split, rows in data.splits.items()} == out.source["rows"]


@pytest.mark.parametrize(
    "category",
    [
        lambda name: {"categories": [name, "cs.AI"]},
        lambda name: {"categories": f"{name} cs.AI", "published": "2024"},
        lambda name: {"category": name, "categories": "cs.AI"},
    ],
    ids=["list", "text", "category"],
)
def test_arxiver_finds_the_category(tmp_path, category):
    out = build("arxiver", arxiv_source(tmp_path / "arxiv", category), tmp_path / "out", "--top", "2")
    assert {row["label"] for row in out.test} == {"cs.LG", "cs.CV"}


def test_arxiver_takes_the_named_column(tmp_path):
    source = arxiv_source(tmp_path / "arxiv", lambda name: {"primary_category": "x", "field": name})
    out = build("arxiver", source, tmp_path / "out", "--category_column", "field", "--top", "2")
    assert {row["label"] for row in out.train} == {"cs.LG", "cs.CV"}


def test_every_evaluated_label_is_trained_on(tmp_path, capsys):
    source = write_jsonl(
        tmp_path / "arxiv",
        [{"title": f"t{i}", "abstract": "a", "primary_category": f"c{max(i - 20, 0)}"} for i in range(40)],
    )  # 21 rows of c0, then 19 categories with one row each
    out = build("arxiver", source, tmp_path / "out", "--top", "0")
    trained = {row["label"] for row in out.train}
    assert {row["label"] for row in out.validation + out.test} <= trained
    assert "id" not in out.train[0]
    printed = capsys.readouterr().out
    assert len(out.train + out.validation + out.test) == 40 and "no training row has" not in printed
    assert len(load_with(printed.strip().split("\n")[-1]).labels) == len(trained) == 20
    write_jsonl(source, [{"title": "t", "abstract": "a", "primary_category": f"c{i}"} for i in range(20)], "test")
    out = build("arxiver", source, tmp_path / "sample", "--top", "0", "--max_rows", "20")
    assert {row["label"] for row in out.validation + out.test} <= {row["label"] for row in out.train}
    assert "with a label that no training row has" in capsys.readouterr().out


def test_amazoncat_makes_a_column_of_each_top_label(tmp_path, amazon, capsys):
    out = build("amazoncat13k", amazon, tmp_path / "out", "--top", "3")
    columns = ["books", "Clothing Shoes & Jewelry", "title_"]  # 100, 60 and 40 training rows
    assert list(out.train[0]) == ["id", "title", "content", *columns]
    assert len(out.train) == 108 and len(out.validation) == 12  # of 8 x 20 rows, 2 in 8 have no top label
    assert [[int(row[name]) for name in columns] for row in out.test] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]] * 4
    assert [row["id"] for row in out.test][:4] == ["0", "2", "3", "5"]
    combinations = Counter(tuple(row[name] for name in columns) for row in out.validation)
    assert ["".join(flags) for flags in sorted(combinations.elements())] == ["010"] * 2 + ["100"] * 4 + [
        "101", "101", "110", "110", "111", "111"
    ]  # fmt: skip
    assert out.source["label_counts"]["test"] == dict.fromkeys(columns, 4)
    printed = capsys.readouterr().out
    assert "train: read 160 rows, dropped 40" in printed and "test: read 20 rows, dropped 8" in printed
    assert "'Clothing, Shoes & Jewelry' becomes the column 'Clothing Shoes & Jewelry'" in printed
    command = printed.strip().split("\n")[-1]
    assert command.endswith("--text_fields title content --label_columns books 'Clothing Shoes & Jewelry' title_")
    data = load_with(command)
    assert data.multi_label and data.labels == columns
    assert [row.labels for row in data.splits["test"]] == [(0,), (1,), (2,)] * 4


def test_amazoncat_reads_label_names_and_cuts_a_missing_test_split(tmp_path):
    rows = [{"title": "t", "text": str(i), "labels": [["a", "b"], ["b"], ["c"]][i % 3]} for i in range(60)]
    out = build("amazoncat13k", write_jsonl(tmp_path / "source", rows), tmp_path / "out", "--top", "2")
    assert list(out.test[0]) == ["title", "text", "b", "a"]
    assert [len(rows) for rows in (out.train, out.validation, out.test)] == [32, 4, 4]
    assert [(row["b"], row["a"]) for row in out.test].count(("1", "1")) == 2


def test_ag_news_names_its_classes_and_keeps_its_test_split(tmp_path, capsys):
    out = build("ag_news", news_source(tmp_path / "news"), tmp_path / "out")
    assert [row["text"] for row in out.test] == [f"test {i}" for i in range(30)]
    assert Counter(row["label"] for row in out.train) == {"World": 67, "Sci/Tech, more": 23}  # of 75 and 25
    assert len(out.validation) == 10
    assert all((row["label"] == "World") == (int(row["text"].split()[1]) % 4 > 0) for row in out.train)
    command = last_line(capsys)
    assert command.endswith("--text_fields text --label_column label")
    assert load_with(command).labels == ["Sci/Tech, more", "World"]


def chat_source(folder: Path, count: int = 100) -> Path:
    rows = []
    for i in range(count):
        turns = [{"from": "human", "value": f"Frage {i}\u2028é"}, {"from": "gpt", "value": f"Answer {i}\n<b>"}]
        rows.append({"conversations": turns * (1 + i % 2), "source": "s", "score": None if i == 7 else i / 20})
    rows[50]["conversations"] = rows[50]["conversations"][1:]  # begins with an answer
    rows[60]["conversations"][1]["value"] = " "
    return write_jsonl(folder, rows)


def instruction_command(printed: str, folder: Path) -> None:
    files = [word for split in SPLITS for word in (f"--{split}_file", str(folder / f"{split}.jsonl"))]
    assert shlex.split(printed.strip().split("\n")[-1]) == ["accelerate", "launch", "train_sft.py", *files]


def load_chat(folder: Path):
    return load_conversations(ChatDataConfig(**{f"{split}_file": str(folder / f"{split}.jsonl") for split in SPLITS}))


def test_wikitext_is_its_text_again(tmp_path, capsys):
    """Lines as rows, blank ones emptied, become the text they were; the command that trains on it names the files."""
    lines = ["", " = A = \n", "", " One line , and \n", " another . \n", ""]
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "source", [{"text": line} for line in lines], split)
    out = tmp_path / "out"
    prepare.main(["wikitext", "--source", str(tmp_path / "source"), "--config", "default", "--output_dir", str(out)])
    text = " \n = A = \n \n One line , and \n another . \n \n"
    assert all((out / f"{split}.txt").read_bytes().decode() == text for split in SPLITS)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[2] == "train_clm.py" and command[-1] == str(out / "test.txt")
    sources = open_sources(parse_config(train_clm.Config, command[3:]))
    assert {split: list(source.parts()) for split, source in sources.items()} == dict.fromkeys(
        SPLITS, [(text, False), ("", True)]
    )


def test_finetome_keeps_good_rows_and_holds_out_a_fifth(tmp_path, capsys):
    source, out = chat_source(tmp_path / "chat"), tmp_path / "out"
    prepare.main(["finetome", "--source", str(source), "--output_dir", str(out), "--min_score", "1"])
    printed = capsys.readouterr().out
    assert "train: read 100 rows, dropped 22 that have a score below 1 or are no conversation" in printed
    assert f"wrote {out / 'train'}.jsonl: 62 rows" in printed
    instruction_command(printed, out)
    data = load_chat(out)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 62, "validation": 8, "test": 8}
    questions = [row.messages[0]["content"] for rows in data.splits.values() for row in rows]
    assert sorted(questions) == sorted(f"Frage {i}\u2028é" for i in range(20, 100) if i not in (50, 60))
    assert data.report["shapes"]["test"] == {"ShareGPT": 8}
    facts = json.loads((out / "SOURCE.json").read_text())
    assert facts["options"]["min_score"] == 1.0 and facts["rows"] == {"train": 62, "validation": 8, "test": 8}


def test_finetome_takes_n_rows(tmp_path):
    source = chat_source(tmp_path / "chat")
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ["--output_dir", str(tmp_path / folder), "--max_rows", "50", "--seed", seed]
        prepare.main(["finetome", "--source", str(source), *options])
    sizes = [len(rows) for rows in load_chat(tmp_path / "a").splits.values()]
    assert sizes == [40, 5, 5]
    train = [(tmp_path / folder / "train.jsonl").read_bytes() for folder in "abc"]
    assert train[0] == train[1] != train[2]
    with pytest.raises(InputError, match="--min_score -0.5: must be at least 0"):
        prepare.main(["finetome", "--source", str(source), "--output_dir", str(tmp_path / "d"), "--min_score", "-0.5"])
    with pytest.raises(InputError, match="no column score; the data set has text, label"):
        prepare.main(["finetome", "--source", str(news_source(tmp_path / "news")), "--output_dir", str(tmp_path / "d")])


def test_bitext_is_stratified_by_intent(tmp_path, capsys):
    common = {"flags": "B", "category": "ORDER", "response": "{{Website}}"}
    rows = [{"instruction": f"q{i}", "intent": "ab"[i % 4 == 0], **common} for i in range(120)]
    source, out = write_jsonl(tmp_path / "bitext", rows), tmp_path / "out"
    prepare.main(["bitext", "--source", str(source), "--output_dir", str(out), "--max_rows", "80"])
    instruction_command(capsys.readouterr().out, out)
    data = load_chat(out)
    assert [len(rows) for rows in data.splits.values()] == [64, 8, 8]
    assert data.report["shapes"]["train"] == {"Bitext": 64}
    written = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    assert Counter(row["intent"] for row in written) == {"a": 6, "b": 2}
    assert list(written[0]) == ["instruction", "response", "category", "intent"]


def test_max_rows_is_a_stratified_sample_over_all_splits(tmp_path):
    out = build("ag_news", news_source(tmp_path / "news"), tmp_path / "out", "--max_rows", "52")
    assert [len(rows) for rows in (out.train, out.validation, out.test)] == [36, 4, 12]
    assert Counter(row["label"] for row in out.train + out.validation)["World"] == 30


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_split(tmp_path, amazon):
    for folder, seed in (("a", "42"), ("b", "42"), ("c", "43")):
        build("amazoncat13k", amazon, tmp_path / folder, "--max_rows", "90", "--seed", seed)
    for name in ("train.csv", "validation.csv", "test.csv", "SOURCE.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "train.csv").read_bytes() != (tmp_path / "c" / "train.csv").read_bytes()


def test_errors_name_the_remedy_and_leave_nothing_behind(tmp_path, amazon):
    out = tmp_path / "out"
    with pytest.raises(
        InputError, match=r"--source no_such/data: could not be loaded \(.*\)\. Check the name.*the folder"
    ):
        build("ag_news", Path("no_such/data"), out)
    with pytest.raises(InputError, match="no column label; the data set has uid_original, title.* Is --source the"):
        build("ag_news", amazon, out)
    papers = arxiv_source(tmp_path / "arxiv", lambda name: {"subject": name})
    with pytest.raises(InputError, match="primary_category or category or categories; .*subject. Name the right"):
        build("arxiver", papers, out)
    with pytest.raises(InputError, match="no column field; the data set has .*subject"):
        build("arxiver", papers, out, "--category_column", "field")
    with pytest.raises(InputError, match="13,330"):
        build("amazoncat13k", amazon, out, "--top", "0")
    with pytest.raises(InputError, match="--seed -1: must be at least 0"):
        build("amazoncat13k", amazon, out, "--seed", "-1")
    with pytest.raises(InputError, match="No rows are left for validation, test: raise --max_rows"):
        build("amazoncat13k", amazon, out, "--max_rows", "3")
    only_test = write_jsonl(tmp_path / "only", [{"text": "t", "label": "a"}], "test")
    with pytest.raises(InputError, match="no split train; it has test"):
        build("ag_news", only_test, out)
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["amazon", "arxiv", "cache", "only"]


def test_an_existing_folder_is_only_used_when_empty(tmp_path):
    news = news_source(tmp_path / "news")
    (tmp_path / "out").mkdir()
    build("ag_news", news, tmp_path / "out")
    before = (tmp_path / "out" / "train.csv").read_bytes()
    with pytest.raises(InputError, match="out exists and is not empty.*delete it"):
        build("ag_news", news, tmp_path / "out", "--seed", "1")
    assert (tmp_path / "out" / "train.csv").read_bytes() == before


def test_a_failed_write_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk")

    monkeypatch.setattr(datasets.Dataset, "to_csv", fail)
    with pytest.raises(OSError, match="disk"):
        build("ag_news", news_source(tmp_path / "news"), tmp_path / "made" / "out")
    assert list((tmp_path / "made").iterdir()) == []


def test_the_commit_of_a_hub_source_is_noted():
    part = SimpleNamespace(cache_files=[{"filename": f"/cache/a___b/default/0.0.0/{'a1' * 20}/b-train.arrow"}])
    assert builders.revision_of(part) == "a1" * 20
    part.cache_files[0]["filename"] = "/cache/folder/default/0.0.0/2263f2d6c50225fc/folder-train.arrow"
    assert builders.revision_of(part) is None


def test_the_command_line_fails_in_one_paragraph_and_lists_each_builders_options():
    def run(*words):
        command = [sys.executable, "-X", "importtime", "-m", "common.prepare", *words]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)

    shown = run("arxiver", "--help")
    assert "--category_column" in shown.stdout and "(default: 5)" in shown.stdout
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert not imported & {"datasets", "torch", "transformers", "pandas"}
    refused = run("ag_news", "--category_column", "c")
    assert refused.returncode == 2 and "unrecognized arguments: --category_column c" in refused.stderr
    missing = run("ag_news", "--source", "/no/such/folder", "--output_dir", "/no/such/output")
    errors = [line for line in missing.stderr.splitlines() if not line.startswith("import time:")]
    assert (
        missing.returncode == 2
        and len(errors) == 1
        and errors[0].startswith("error: --source /no/such/folder: could not")
    )


def test_own_data_are_seen_by_git_and_outputs_are_not(tmp_path):
    """A new folder in data/ is not left out of a commit; what `prepare` fetched there can be fetched again."""
    project = tmp_path / "project"
    subprocess.run(["git", "init", "-q", project], check=True, timeout=60)
    shutil.copy(ROOT / ".gitignore", project)
    for name in ("data/mine/train.csv", "outputs/run/config.yaml", "common/__pycache__/x.pyc", ".mypy_cache/x"):
        (project / name).parent.mkdir(parents=True)
        (project / name).touch()
    source = write_jsonl(tmp_path / "source", [{"text": f"t{i}", "label": i % 2} for i in range(40)])
    build("ag_news", source, project / "data" / "ag_news")
    command = ["git", "status", "--porcelain", "-uall"]
    status = subprocess.run(command, cwd=project, check=True, timeout=60, capture_output=True, text=True)
    assert status.stdout.split() == ["??", ".gitignore", "??", "data/mine/train.csv"]
