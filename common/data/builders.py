"""Builders of public data sets: from the hub's rows to files that the training scripts read.

A builder's parameters are the options that `python -m common.prepare NAME` takes. To add a data set, write a builder
and enter it in BUILDERS.
"""

import csv
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.classification import Example
from common.data.conversations import read_row
from common.data.files import Row
from common.data.splits import SPLITS, cut, open_hub, stratified_sample
from common.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

Splits = dict[str, "Dataset"]
HELD_OUT = 0.1  # share of the training rows that becomes validation, and test, if the source has none


def number_or_all(text: str) -> int | None:
    """--max_rows: None means all."""
    return None if text == "all" else int(text)


OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {  # what the builders' parameters are
    "source": (str, "hub id, or local folder of a copy"),
    "top": (int, "keep the rows of this many most frequent labels; 0: of all, if there are few"),
    "max_rows": (number_or_all, "keep at most this many of those rows, over all splits, drawn stratified; or all"),
    "seed": (int, "of the sample and of the split"),
    "config": (str, "configuration of the source"),
    "category_column": (str, "column of the categories; None: guessed from the names"),
    "min_score": (float, "keep the rows whose quality score is at least this"),
}


@dataclass
class Prepared:
    """What a builder returns: the splits, the script and options that train on them, and facts for SOURCE.json.

    suffix: .csv; .jsonl, for cells that are lists; or .txt, for the lines of a text.
    """

    tables: Splits
    launch: list[str]
    facts: dict[str, Any]
    suffix: str = ".csv"


def arxiver(
    source="real-jiakai/arxiver-with-category", top=5, max_rows=None, seed=42, category_column=None
) -> Prepared:
    """arXiv papers: title, abstract and the first category; 80/10/10."""
    parts = load(source)
    guesses = [category_column] if category_column else ["primary_category", "category", "categories"]
    named = label_names(parts, find_column(parts, guesses, "Name the right one with --category_column."))
    # Several categories are a list, or one text with spaces between them; an arXiv category itself has no space.
    named = {split: [" ".join(names).split()[:1] for names in rows] for split, rows in named.items()}
    return classification(parts, ["title", "abstract"], *draw(named, top, max_rows, seed))


def ag_news(source="fancyzhx/ag_news", top=0, max_rows=None, seed=42) -> Prepared:
    """News with 4 topics: text and topic; the source's own test split."""
    parts = load(source)
    named = label_names(parts, find_column(parts, ["label"]))
    return classification(parts, ["text"], *draw(named, top, max_rows, seed))


def amazoncat13k(source="pietrolesci/amazoncat-13k", top=10, max_rows=None, seed=42) -> Prepared:
    """Amazon products: title, content, a 0/1 column for each of the most frequent labels; its own test split."""
    if not top:
        raise InputError("--top 0 would make a column of each of 13,330 labels. Give the number of labels to keep.")
    parts = load(source)
    texts = ["title", find_column(parts, ["content", "text"])]
    named = label_names(parts, find_column(parts, ["labels", "target_ind"]))
    labels, examples = draw(named, top, max_rows, seed)
    if all(label.isdecimal() for label in labels):  # numbers; their names are a configuration of their own
        table = load(source, "labels")
        names = table["train"][find_column(table, ["labels"])][:]
        labels = [names[int(label)] for label in labels]
    columns: list[str] = []
    for label in labels:
        name = " ".join(label.replace(",", " ").split())
        while name in ("id", *texts, *columns):
            name += "_"
        columns.append(name)
        if name != label:
            print(f"the label {label!r} becomes the column {name!r}: the trainer wants unique names without commas")
    return classification(parts, texts, columns, examples, multi_label=True)


def finetome(source="mlabonne/FineTome-100k", min_score=0.0, max_rows=1000, seed=42) -> Prepared:
    """Instructions and answers, mostly of one turn, with a quality score from 0 to 5; 80/10/10."""
    parts = load(source)
    column = find_column(parts, ["score"])
    chosen = [find_column(parts, [name]) for name in ("conversations", "source", column)]
    named = {
        split: [["kept"] if (row[column] or 0) >= min_score and is_conversation(row) else [] for row in part]
        for split, part in parts.items()
    }
    _, examples = draw(named, 0, max_rows, seed, f"have a score below {min_score:g} or are no conversation")
    return instructions(parts, chosen, examples)


def bitext(source="bitext/Bitext-customer-support-llm-chatbot-training-dataset", max_rows=5000, seed=42) -> Prepared:
    """Customer support: one question and answer each, of 27 intents; 80/10/10, stratified by intent."""
    parts = load(source)
    _, examples = draw(label_names(parts, find_column(parts, ["intent"])), 0, max_rows, seed, "have no intent")
    chosen = [find_column(parts, [name]) for name in ("instruction", "response", "category", "intent")]
    return instructions(parts, chosen, examples)


def wikitext(source="Salesforce/wikitext", config="wikitext-2-raw-v1") -> Prepared:
    """Wikipedia articles as running text, one row per line of the source; its own splits."""
    parts = load(source, config)
    column = find_column(parts, ["text"])
    tables = {split: part.select_columns([column]) for split, part in parts.items()}
    return Prepared(tables, ["train_clm.py"], {"revision": revision_of(parts["train"])}, ".txt")


BUILDERS = {f.__name__: f for f in (arxiver, amazoncat13k, ag_news, finetome, bitext, wikitext)}


def load(source: str, config: str | None = None) -> Splits:
    """The splits of a hub id or a local folder. Raises InputError if they cannot be loaded."""
    parts = open_hub(source, config, "--source", progress=True)
    if "train" not in parts:
        raise InputError(f"{source}: there is no split train; it has {', '.join(parts)}. Use another --source.")
    return parts


def find_column(parts: Splits, names: Sequence[str], remedy: str = "Is --source the right data set?") -> str:
    """The first of `names` that is a column. Raises InputError that lists the columns if none is."""
    existing = parts["train"].column_names
    if found := [name for name in names if name in existing]:
        return found[0]
    raise InputError(f"There is no column {' or '.join(names)}; the data set has {', '.join(existing)}. {remedy}")


def label_names(parts: Splits, column: str) -> dict[str, list[list[str]]]:
    """split -> the label names of every row; a cell is a label or a list of them; class numbers become names."""
    feature = getattr(parts["train"].features[column], "feature", parts["train"].features[column])
    name = getattr(feature, "int2str", str)
    named = {}
    for split, part in parts.items():
        cells = (cell if isinstance(cell, list) else [cell] for cell in part[column][:])
        named[split] = [[name(label) for label in cell if label not in (None, "", -1)] for cell in cells]
    return named


def draw(
    named: dict[str, list[list[str]]],
    top: int,
    max_rows: int | None,
    seed: int,
    why_dropped: str = "have none of the {} labels",
) -> tuple[list[str], dict[str, list[Example]]]:
    """The `top` labels of the training rows (0: all), most frequent first, and split -> rows; `id` is the row number.

    Rows without any of these labels are dropped, then `max_rows` of all splits are sampled. A split that the source
    lacks is cut from its training rows; evaluated rows whose label no training row has are dropped.
    """
    counts = Counter(label for row in named["train"] for label in set(row))
    labels = sorted(counts, key=lambda label: (-counts[label], label))[: top or None]
    index = {label: i for i, label in enumerate(labels)}
    splits = {}
    for split, rows in named.items():
        kept = (tuple(sorted({index[label] for label in row if label in index})) for row in rows)
        splits[split] = [Example(str(number), "", found) for number, found in enumerate(kept) if found]
        dropped = len(rows) - len(splits[split])
        print(f"{split}: read {len(rows)} rows, dropped {dropped} that {why_dropped.format(len(labels))}")
    total = sum(map(len, splits.values()))
    if max_rows is not None and max_rows < total:
        for split, examples in splits.items():
            count = max_rows * len(examples) // total
            splits[split] = [examples[i] for i in stratified_sample([row.labels for row in examples], count, seed)]
        print(f"kept a sample of {sum(map(len, splits.values()))} of these {total} rows")
    count = round(HELD_OUT * len(splits["train"]))
    cuts = {split: count for split in ("test", "validation") if split not in splits}
    splits |= cut(splits["train"], cuts, seed, attrgetter("labels"))
    for split in cuts:
        print(f"{split}: {len(splits[split])} rows cut from train")
    known = {label for row in splits["train"] for label in row.labels}
    for split in ("validation", "test"):  # the trainer refuses labels that it never trains on
        trained = [row for row in splits[split] if known.issuperset(row.labels)]
        if dropped := len(splits[split]) - len(trained):
            print(f"{split}: dropped {dropped} rows with a label that no training row has")
        splits[split] = trained
    if empty := [split for split in SPLITS if not splits[split]]:
        raise InputError(f"No rows are left for {', '.join(empty)}: raise --max_rows, or use a larger --source.")
    return labels, {split: splits[split] for split in SPLITS}


def select(parts: Splits, columns: list[str], examples: dict[str, list[Example]]) -> Splits:
    """The rows that `draw` returned, with these columns; those of a split that the source lacks are training rows."""
    return {
        split: parts.get(split, parts["train"]).select_columns(columns).select([int(row.id) for row in rows])
        for split, rows in examples.items()
    }


def classification(
    parts: Splits, texts: list[str], labels: list[str], examples: dict[str, list[Example]], multi_label: bool = False
) -> Prepared:
    """The columns id (if there is one), `texts`, and either `label` or a 0/1 column per label."""
    texts = [find_column(parts, [text]) for text in texts]
    key = [name for name in ("id", "uid") if name in parts["train"].column_names][:1]
    tables, counts = select(parts, key + texts, examples), {}
    for split, rows in examples.items():
        flags = {name: [int(i in row.labels) for row in rows] for i, name in enumerate(labels)}
        for name, cells in (flags if multi_label else {"label": [labels[row.labels[0]] for row in rows]}).items():
            tables[split] = tables[split].add_column(name, cells)
        tables[split] = tables[split].rename_columns(dict.fromkeys(key, "id"))
        counts[split] = {name: sum(cells) for name, cells in flags.items()}
    options = ["--label_columns", *labels] if multi_label else ["--label_column", "label"]
    facts = {"revision": revision_of(parts["train"]), "label_counts": counts}
    return Prepared(tables, ["train_cls.py", "--text_fields", *texts, *options], facts)


def instructions(parts: Splits, columns: list[str], examples: dict[str, list[Example]]) -> Prepared:
    """The columns as they are; JSON holds what CSV cannot, such as lists of turns."""
    facts = {"revision": revision_of(parts["train"])}
    return Prepared(select(parts, columns, examples), ["train_sft.py"], facts, ".jsonl")


def is_conversation(row: Row) -> bool:
    """Whether train_sft.py can read the row; in a large data set a few have empty answers or turns out of order."""
    try:
        read_row(row, "")
    except InputError:
        return False
    return True


def revision_of(part: "Dataset") -> str | None:
    """The commit of a hub data set, by which its folder in the cache is named; None for a local one."""
    names = [Path(file["filename"]).parent.name for file in part.cache_files]
    return next((name for name in names if re.fullmatch("[0-9a-f]{40}", name)), None)


def write(prepared: Prepared, folder: Path, source: dict[str, Any]) -> None:
    """Writes the files of a data set, all or none: under a temporary name, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        for split, table in prepared.tables.items():
            path = partial / f"{split}{prepared.suffix}"
            if prepared.suffix == ".jsonl":
                table.to_json(path, force_ascii=False)
            elif prepared.suffix == ".txt":
                with open(path, "w", encoding="utf-8", newline="") as file:
                    for row in table:  # the hub's copy has emptied the source's blank lines, of one space each
                        (line,) = row.values()
                        file.write(line or " \n")
            else:  # minimal quoting would leave a lone carriage return bare, which ends the row when it is read
                table.to_csv(path, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        source = source | {"rows": {split: len(table) for split, table in prepared.tables.items()}} | prepared.facts
        (partial / ".gitignore").write_text("*\n")  # the data can be fetched again, so they stay out of a commit
        (partial / "SOURCE.json").write_text(json.dumps(source, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(folder)
