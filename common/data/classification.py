"""Rows -> classification examples: their text and labels; the label set; class weights; the counts of the data report.

    {"title": "On qubits", "abstract": "We show ...", "label": "quant-ph"}      a row
    Example(id="0", text="On qubits. We show ...", labels=(4,))                 index 4 of the sorted label set

Imports neither torch nor transformers: whatever is wrong with the data is reported before a model is loaded.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from common.data import doctor
from common.data.files import Row, columns_of, parse_json, require_columns, row_ids, text_columns, text_in
from common.data.labels import (
    SHOWN,
    is_multi_label,
    label_indices,
    label_notes,
    label_set,
    label_text,
    read_labels,
)
from common.data.splits import (
    DEMO_FOLDERS,
    SPLITS,
    Sources,
    complete_splits,
    count_copies,
    hold_out,
    read_splits,
    stratified_sample,
)
from common.disk import read_text
from common.errors import InputError
from common.options import ClassificationConfig, ClassificationDataConfig

DEMO = DEMO_FOLDERS / ClassificationConfig.demo
FACTORS = (0.01, 100.0)  # bounds of negatives / positives, which would be 0 for a label that every row has
END_MARK = re.compile("FULL STOP|QUESTION MARK|EXCLAMATION|ELLIPSIS|DANDA|SIGN SECTION|SIGN KHAN")  # Unicode's names
SEPARATOR = ", "  # between the labels of an instruction, and of a multi-label answer


@dataclass(frozen=True)
class Example:
    """One classification row: `labels` holds the indices of its labels, ascending (one, or any number)."""

    id: str
    text: str
    labels: tuple[int, ...]


@dataclass
class ClassificationData:
    """The three splits (a missing one is empty), the label set in its order, and the data report."""

    splits: dict[str, list[Example]]
    labels: list[str]
    multi_label: bool
    sources: Sources
    report: dict[str, Any] = field(default_factory=dict)


def load_classification(config: ClassificationDataConfig, training: bool = True) -> ClassificationData:
    """Reads, checks and cuts the splits that the options describe; for training, there must be training rows.

    The label set is `--labels`, else `--label_columns`, else the labels of the training rows, sorted.
    Raises InputError that names file, row and column for whatever cannot be used.
    """
    tables, sources = read_splits(config, DEMO, training)
    left_out = _unlabeled_splits(tables, config)
    replaced = ["test"] if config.folds else []  # by a fold of the training rows
    for split in left_out + replaced:
        tables.pop(split, None)
        sources.pop(split, None)
    if not tables:
        raise InputError(f"{config.dataset_name}: no row has a label. Is --label_column right?")
    multi_label = is_multi_label(tables, sources, config)
    names = {split: read_labels(rows, sources[split]["name"], config) for split, rows in tables.items()}
    given = config.labels or config.label_columns
    labels = [label_text(name) for name in given] if given else label_set(names)
    if not labels:
        source = next(iter(sources.values()))["name"]
        raise InputError(f"{source}: no row has a label. Is --label_column right?")
    _check_labels(labels, multi_label, config)
    indices = {split: label_indices(rows, labels, sources[split]["name"]) for split, rows in names.items()}
    data = assemble(tables, indices, sources, config, labels, multi_label, stratified=True)
    if train := data.splits["train"]:
        used = {label for example in train for label in example.labels}
        if len(used) < (1 if multi_label else 2):
            option = "--label_columns" if config.label_columns else "--label_column"
            what = f"have the label {labels[used.pop()]!r}" if used else "are without a label"
            raise InputError(
                f"{sources['train']['name']}: all {len(train)} training rows {what}, so there is nothing to tell "
                f"apart. Is {option} right?"
            )
    data.report |= {"labels": labels, "multi_label": multi_label}
    for split, entry in data.report["rows"].items():
        entry["label_counts"] = _label_counts(data.splits[split], labels)
    data.report["findings"] += doctor.few_rows(data.report["rows"].get("train", {}).get("label_counts", {}))
    notes = [f"{config.dataset_name} [{split}] has no label in any row and is left out" for split in left_out]
    notes += [] if given else label_notes(names.get("train", []))
    weights = class_weights(config.class_weights, train, labels, multi_label) if training else None  # checks a file
    if weights and multi_label:
        notes += _weight_notes(weights, data.report["rows"]["train"]["label_counts"], len(train))
    if notes:
        data.report["notes"] = notes
    return data


def assemble(
    tables: dict[str, list[Row]],
    targets: dict[str, list[tuple]],
    sources: Sources,
    config: ClassificationDataConfig,
    labels: list[str],
    multi_label: bool,
    stratified: bool = False,
) -> ClassificationData:
    """The rows as examples in three splits; cut from the training rows where no file gives a split.

    targets: of each split, what every row's `Example.labels` shall be. stratified: splits and samples keep their
    proportions. Training rows without a text teach nothing and are left out. Raises InputError where no row has a text.
    """
    report: dict[str, Any] = {"files": sources, "rows": {}}
    splits = {}
    text_fields = _text_fields(tables, sources, config)
    for split, rows in tables.items():
        source = sources[split]["name"]
        examples = unlabeled_rows(rows, row_ids(rows, source, config.id_column), source, text_fields)
        examples = [Example(row.id, row.text, found) for row, found in zip(examples, targets[split], strict=True)]
        splits[split] = [example for example in examples if example.text or split != "train"]
        if not splits[split]:
            raise InputError(f"{source}: no row has any text. Is --text_fields right?")
        report["rows"][split] = {"read": len(rows), "dropped_empty_text": len(rows) - len(splits[split])}

    def labels_of(example: Example) -> tuple:
        return example.labels if stratified else ()

    if config.fold and config.folds and "train" in splits:
        splits |= hold_out(splits["train"], config.fold, config.folds, config.split_seed, labels_of)
        report["cut_from_train"] = {"test": len(splits["test"])}
    splits = complete_splits(splits, config, report, labels_of)
    count_copies(splits, report, attrgetter("text"), attrgetter("text"))
    report["findings"] = doctor.examine(
        {split: [doctor.Item(row.id, row.text, row.labels) for row in rows] for split, rows in splits.items()}
    )
    splits = {split: splits.get(split, []) for split in SPLITS}
    return ClassificationData(splits, labels, multi_label, sources, report)


def _unlabeled_splits(tables: dict[str, list[Row]], config: ClassificationDataConfig) -> list[str]:
    """The splits of a hub data set of which no row has a label, as the test split of a competition."""
    if not config.dataset_name:
        return []
    column, others = config.label_column or "label", [split for split in tables if split != "train"]
    return [split for split in others if all(row.get(column, "") is None for row in tables[split])]


def _text_fields(tables: dict[str, list[Row]], sources: Sources, config: ClassificationDataConfig) -> list[str]:
    """The columns that are the text. Raises InputError where files differ in them, or one of them is the label."""
    found = {split: text_columns(columns_of(rows), config.text_fields) for split, rows in tables.items()}
    fields = next(iter(found.values()))
    if any(names != fields for names in found.values()):
        shown = "; ".join(f"{sources[split]['name']}: {', '.join(names)}" for split, names in found.items())
        raise InputError(f"The text would be in other columns of every file ({shown}). Name them with --text_fields.")
    if seen := {*(config.label_columns or [config.label_column or "label"])} & {*fields}:
        raise InputError(
            f"The label column {seen.pop()!r} would be a part of the text, and the model would read the answer. Name "
            "the others with --text_fields."
        )
    return fields


def unlabeled_rows(rows: Sequence[Row], ids: Sequence[str], source: str, text_fields: list[str]) -> list[Example]:
    """The rows as examples without labels, as for rows to be answered."""
    require_columns(text_fields, columns_of(rows), source, "--text_fields")
    return [
        Example(id, join_fields(row, text_fields, f"{source}, data row {number}"), ())
        for number, (id, row) in enumerate(zip(ids, rows, strict=True), 1)
    ]


def draw_few_shot(
    data: ClassificationData, config: ClassificationDataConfig
) -> tuple[list[tuple[str, tuple[int, ...]]], list[Example]]:
    """--few_shot stratified (text, labels) pairs for the prompt, and the training rows whose texts are none of these.

    The data report counts the rows whose text is in the prompt; those of validation and test stay.
    """
    rows, count = data.splits["train"], config.few_shot
    if not count:
        return [], list(rows)
    if not rows:
        raise InputError("--few_shot: there are no training rows to draw from. Give a --train_file, or drop it.")
    answers = Counter(text for text, _ in {(row.text, row.labels) for row in rows})
    distinct = list({row.text: row for row in reversed(rows)}.values())[::-1]  # of equal texts the first
    distinct = [row for row in distinct if answers[row.text] == 1]  # a contradiction is no example
    drawn = stratified_sample([row.labels for row in distinct], count, config.split_seed, leave=1)
    if len(drawn) < count:
        raise InputError(
            f"--few_shot {count}: only {len(drawn)} of the {len(rows)} training rows can be spared, since one of every "
            "label stays, and a text with two labels is no example. Use a smaller number."
        )
    chosen = [distinct[i] for i in drawn]
    texts = {row.text for row in chosen}
    rest = [row for row in rows if row.text not in texts]
    for split, examples in data.splits.items():
        if examples:
            data.report["rows"][split]["also_few_shot"] = sum(row.text in texts for row in examples)
    copies = len(rows) - len(rest) - count
    data.report["rows"]["train"] |= {
        "few_shot": count, "also_few_shot": copies, "used": len(rest), "label_counts": _label_counts(rest, data.labels)
    }  # fmt: skip
    return [(row.text, row.labels) for row in chosen], rest


def _label_counts(rows: Sequence[Example], labels: Sequence[str]) -> dict[str, int]:
    """label -> the rows that have it."""
    counts = Counter(label for row in rows for label in row.labels)
    return {label: counts[i] for i, label in enumerate(labels)}


def class_weights(option: str, rows: Sequence[Example], labels: Sequence[str], multi_label: bool) -> list[float] | None:
    """The weights of `--class_weights`, one per label, or None.

    balanced: n / (K n_k) for a row of label k (as scikit-learn); for multi-label rows negatives / positives, the
    `pos_weight` of binary cross-entropy, within FACTORS. A label without a row counts as if it had one. A file: JSON
    {label: weight}.
    """
    if option == "none":
        return None
    if option != "balanced":
        return _read_weights(option, labels)
    counts = Counter(label for row in rows for label in row.labels)
    sizes = [max(1, counts[k]) for k in range(len(labels))]
    if multi_label:
        return [min(max((len(rows) - size) / size, FACTORS[0]), FACTORS[1]) for size in sizes]
    return [len(rows) / (len(labels) * size) for size in sizes]


def _weight_notes(weights: Sequence[float], counts: dict[str, int], rows: int) -> list[str]:
    """A line about the labels whose balanced weight is at a bound, or that no training row has, if there are any."""
    found = [
        f"{label!r} in {n}" for (label, n), x in zip(counts.items(), weights, strict=True) if x in FACTORS or not n
    ]
    if not found:
        return []
    shown = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
    bounds = " to ".join(f"{factor:g}" for factor in FACTORS)
    return [
        f"--class_weights balanced has factors from {bounds}. Labels at a bound, or without a row, of {rows} training "
        f"rows: {shown}"
    ]


def _read_weights(path: str, labels: Sequence[str]) -> list[float]:
    text = read_text(Path(path), f"--class_weights {path}", ". Give none, balanced, or a JSON file {label: weight}")
    try:
        given = {label_text(label): weight for label, weight in parse_json(text).items()}
        weights = [float(given[label]) for label in labels]
    except KeyError as error:
        raise InputError(f"--class_weights {path}: the file has no weight for the label {error}. Add it.") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"--class_weights {path}: not a JSON object {{label: weight}}: {error}.") from None
    for label, weight in zip(labels, weights, strict=True):
        if not 0 < weight < math.inf:
            raise InputError(
                f"--class_weights {path}: the weight of {label!r} is {weight}; use a number above 0. Rows that are not "
                "to count are left out of the file."
            )
    return weights


def join_fields(row: Row, names: Sequence[str], where: str = "the row") -> str:
    """The fields as a sequence of sentences: blank ones skipped, a period after each that lacks an end mark.

    where: what an InputError calls the row, if a cell is no text.
    """
    texts = [" ".join(text_in(row.get(name), f"{where}, column {name!r}").split()) for name in names]
    return " ".join(text if _ends_a_sentence(text) else f"{text}." for text in texts if text)


def _ends_a_sentence(text: str) -> bool:
    """Whether the last character, but for closing quotes and brackets, is an end mark of some script."""
    end = len(text) - 1
    while end > 0 and (text[end] in "\"'" or unicodedata.category(text[end]) in ("Pe", "Pf", "Pi")):
        end -= 1
    return unicodedata.category(text[end]) == "Po" and END_MARK.search(unicodedata.name(text[end])) is not None


def _check_labels(labels: list[str], multi_label: bool, config: ClassificationConfig) -> None:
    option = "--label_columns" if config.label_columns else "--labels"
    for label, count in Counter(labels).items():
        if count > 1:
            raise InputError(f"{option} names {label!r} twice. Name each label once.")
        if not label:
            raise InputError(f"{option}: a label is blank. Name it.")
        if multi_label and SEPARATOR.strip() in label:
            raise InputError(f"The label {label!r} contains a comma, which separates labels in an answer. Rename it.")
    if multi_label and config.class_weights not in ("none", "balanced"):
        raise InputError("--class_weights takes a file for one label per row only; for several, use balanced.")
    if multi_label and config.class_weights == "balanced" and config.approach == "generative":
        raise InputError("--class_weights with several labels per row needs --approach head: an answer has no weight.")
