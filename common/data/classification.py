"""Rows -> classification examples: their text and labels; the label set; class weights; the counts of the data report.

    {"title": "On qubits", "abstract": "We show ...", "label": "quant-ph"}      a row
    Example(id="0", text="On qubits. We show ...", labels=(4,))                 index 4 of the sorted label set

Imports neither torch nor transformers: whatever is wrong with the data is reported before a model is loaded.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from common.data.files import Row, columns_of, require_columns, row_ids, text_columns
from common.data.splits import DEMO_FOLDERS, SPLITS, Sources, complete_splits, count_copies, random_rows, read_splits
from common.disk import read_text
from common.errors import InputError
from common.options import ClassificationConfig, ClassificationDataConfig, TextConfig

DEMO = DEMO_FOLDERS / ClassificationConfig.demo
SEPARATOR = ", "  # between the labels of an instruction, and of a multi-label answer
MIN_COMBINATION = 10  # rows; rarer label combinations are one stratum when a split is cut
LabelNames = tuple[str, ...]  # of one row


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
    multi_label = _is_multi_label(tables, config)
    names = {split: _read_labels(rows, sources[split]["name"], config) for split, rows in tables.items()}
    labels = config.labels or config.label_columns or _label_set(names)
    if not labels:
        source = next(iter(sources.values()))["name"]
        raise InputError(f"{source}: no row has a label. Is --label_column right?")
    _check_labels(labels, multi_label, config)
    indices = {split: _indices(rows, labels, sources[split]["name"]) for split, rows in names.items()}
    data = assemble(tables, indices, sources, config, labels, multi_label, draw=stratified_sample)
    if train := data.splits["train"]:
        used = {label for example in train for label in example.labels}
        if len(used) < (1 if multi_label else 2):
            option = "--label_columns" if config.label_columns else "--label_column"
            what = f"have the label {labels[used.pop()]!r}" if used else "are without a label"
            raise InputError(
                f"{sources['train']['name']}: all {len(train)} training rows {what}, so there is nothing to tell "
                f"apart. Is {option} right?"
            )
    if training:  # a file of weights is checked right now
        class_weights(config.class_weights, train, labels, multi_label)
    data.report |= {"labels": labels, "multi_label": multi_label}
    for split, entry in data.report["rows"].items():
        counts = Counter(label for example in data.splits[split] for label in example.labels)
        entry["label_counts"] = {label: counts[i] for i, label in enumerate(labels)}
    return data


def assemble(
    tables: dict[str, list[Row]],
    targets: dict[str, list[tuple]],
    sources: Sources,
    config: ClassificationDataConfig,
    labels: list[str],
    multi_label: bool,
    draw: Callable[[Sequence[Example], int, int], list[int]] = random_rows,
) -> ClassificationData:
    """The rows as examples in three splits; cut from the training rows, by `draw`, where no file gives a split.

    targets: of each split, what every row's `Example.labels` shall be. Training rows without a text teach nothing and
    are left out. Raises InputError where no row has a text.
    """
    report: dict[str, Any] = {"files": sources, "rows": {}}
    splits = {}
    for split, rows in tables.items():
        source = sources[split]["name"]
        examples = unlabeled_rows(rows, row_ids(rows, source, config.id_column), source, config)
        examples = [replace(row, labels=found) for row, found in zip(examples, targets[split], strict=True)]
        splits[split] = [example for example in examples if example.text or split != "train"]
        if not splits[split]:
            raise InputError(f"{source}: no row has any text. Is --text_fields right?")
        report["rows"][split] = {"read": len(rows), "dropped_empty_text": len(rows) - len(splits[split])}
    splits = complete_splits(splits, config, report, draw)
    count_copies(splits, report, attrgetter("text"), attrgetter("text"))
    splits = {split: splits.get(split, []) for split in SPLITS}
    return ClassificationData(splits, labels, multi_label, sources, report)


def unlabeled_rows(rows: Sequence[Row], ids: Sequence[str], source: str, config: TextConfig) -> list[Example]:
    """The rows as examples without labels, as for rows to be answered."""
    columns = columns_of(rows)
    names = text_columns(columns, config.text_fields)
    require_columns(names, columns, source, "--text_fields")
    return [Example(id, join_fields(row, names), ()) for id, row in zip(ids, rows, strict=True)]


def draw_few_shot(
    data: ClassificationData, config: ClassificationDataConfig
) -> tuple[list[tuple[str, tuple[int, ...]]], list[Example]]:
    """--few_shot stratified (text, labels) pairs for the prompt, and the training rows without them."""
    rows, count = data.splits["train"], config.few_shot
    if count and count >= len(rows):
        raise InputError(f"--few_shot {count} leaves none of the {len(rows)} training rows. Use a smaller number.")
    chosen = set(stratified_sample(rows, count, config.split_seed))
    shots = [(row.text, row.labels) for i, row in enumerate(rows) if i in chosen]
    if count:
        data.report["rows"]["train"] |= {"few_shot": count, "used": len(rows) - count}
    return shots, [row for i, row in enumerate(rows) if i not in chosen]


def class_weights(option: str, rows: Sequence[Example], labels: Sequence[str], multi_label: bool) -> list[float] | None:
    """The weights of `--class_weights`, one per label, or None.

    balanced: n / (K n_k) for a row of label k (as scikit-learn); for multi-label rows negatives / positives, the
    `pos_weight` of binary cross-entropy. A label without a row counts as if it had one. A file: JSON {label: weight}.
    """
    if option == "none":
        return None
    if option != "balanced":
        return _read_weights(option, labels)
    counts = Counter(label for row in rows for label in row.labels)
    sizes = [max(1, counts[k]) for k in range(len(labels))]
    if multi_label:
        return [(len(rows) - size) / size for size in sizes]
    return [len(rows) / (len(labels) * size) for size in sizes]


def _read_weights(path: str, labels: Sequence[str]) -> list[float]:
    text = read_text(Path(path), f"--class_weights {path}", ". Give none, balanced, or a JSON file {label: weight}")
    try:
        given = json.loads(text)
        weights = [float(given[label]) for label in labels]
    except KeyError as error:
        raise InputError(f"--class_weights {path}: the file has no weight for the label {error}. Add it.") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"--class_weights {path}: not a JSON object {{label: weight}}: {error}.") from None
    for label, weight in zip(labels, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise InputError(f"--class_weights {path}: the weight of {label!r} is {weight}; use a number from 0 up.")
    return weights


def join_fields(row: Row, names: Sequence[str]) -> str:
    """The fields as a sequence of sentences: blank ones skipped, a period after each that lacks an end mark."""
    cells = (row.get(name) for name in names)
    texts = [" ".join(str(cell).split()) for cell in cells if cell is not None and cell == cell]  # NaN is not itself
    return " ".join(text if text[-1] in ".!?" else f"{text}." for text in texts if text)


def stratified_sample(examples: Sequence[Example], count: int, seed: int) -> list[int]:
    """`count` row numbers, ascending, with the strata in proportion (largest remainders), drawn by `seed`.

    Strata are the labels; of multi-label rows the label combinations with at least MIN_COMBINATION rows.
    """
    sizes = Counter(example.labels for example in examples)
    strata: dict[tuple, list[int]] = {}
    for number, example in enumerate(examples):
        rare = len(example.labels) != 1 and sizes[example.labels] < MIN_COMBINATION
        strata.setdefault(("rare",) if rare else example.labels, []).append(number)
    keys = sorted(strata, key=str)
    shares = [count * len(strata[key]) / len(examples) for key in keys]
    take = [math.floor(share) for share in shares]
    for i in sorted(range(len(keys)), key=lambda i: (take[i] - shares[i], i))[: count - sum(take)]:
        take[i] += 1
    rng = np.random.default_rng(seed)
    return sorted(int(number) for key, n in zip(keys, take, strict=True) for number in rng.permutation(strata[key])[:n])


def _is_multi_label(tables: dict[str, list[Row]], config: ClassificationConfig) -> bool:
    column = config.label_column or "label"
    lists = any(isinstance(row.get(column), list) for rows in tables.values() for row in rows)
    detected = bool(config.label_columns or config.label_delimiter or lists)
    if config.problem_type and detected != (config.problem_type == "multi_label_classification"):
        raise InputError(
            f"--problem_type {config.problem_type} does not fit the labels: several labels per row come from "
            "--label_columns, from --label_delimiter or from JSON lists, and only from those."
        )
    return detected


def _read_labels(rows: Sequence[Row], source: str, config: ClassificationConfig) -> list[LabelNames]:
    """The label names of every row."""
    where, several = f"{source}, data row", config.label_columns
    column = config.label_column or "label"
    require_columns(several or [column], columns_of(rows), source, "--label_columns" if several else "--label_column")
    if several:
        return [
            tuple(name for name in several if _is_set(row.get(name), f"{where} {number}, column {name!r}"))
            for number, row in enumerate(rows, 1)
        ]
    return [
        _labels_in(row.get(column), f"{where} {number}, column {column!r}", config.label_delimiter)
        for number, row in enumerate(rows, 1)
    ]


def _is_set(cell: Any, where: str) -> bool:
    text = str(cell).strip().lower()
    if text in ("1", "1.0", "true"):
        return True
    if text in ("0", "0.0", "false"):
        return False
    raise InputError(f"{where}: {cell!r} is not 0 or 1. Correct the cell.")


def _labels_in(cell: Any, where: str, delimiter: str | None) -> LabelNames:
    if isinstance(cell, list):
        names = [_label_name(item) for item in cell]
    elif delimiter and isinstance(cell, str):
        names = [name.strip() for name in cell.split(delimiter) if name.strip()]
    else:
        names = [_label_name(cell)]
    if any(name.lower() in ("", "nan") for name in names):
        raise InputError(f"{where}: the label is missing (empty or NaN). Fill it in or delete the row.")
    if len(set(names)) != len(names):
        raise InputError(f"{where}: a label occurs twice in {cell!r}. Name each label once.")
    return tuple(names)


def _label_name(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # integer labels with a gap are stored as floats by many tools
    return str(value).strip()


def _label_set(names: dict[str, list[LabelNames]]) -> list[str]:
    """The labels of the training rows (of all rows if there are none), sorted; whole numbers by their value."""
    rows = names["train"] if "train" in names else [row for rows in names.values() for row in rows]
    labels = {name for row in rows for name in row}
    numeric = all(re.fullmatch(r"-?[0-9]+", name) for name in labels)
    return sorted(labels, key=lambda name: (int(name), name)) if numeric else sorted(labels)  # 1 and 01 are two labels


def _check_labels(labels: list[str], multi_label: bool, config: ClassificationConfig) -> None:
    option = "--label_columns" if config.label_columns else "--labels"
    for label, count in Counter(labels).items():
        if count > 1:
            raise InputError(f"{option} names {label!r} twice. Name each label once.")
        if label != label.strip() or not label:
            raise InputError(f"{option}: the label {label!r} is blank, or begins or ends with a space. Rename it.")
        if multi_label and SEPARATOR.strip() in label:
            raise InputError(f"The label {label!r} contains a comma, which separates labels in an answer. Rename it.")
    if multi_label and config.class_weights not in ("none", "balanced"):
        raise InputError("--class_weights takes a file for one label per row only; for several, use balanced.")
    if multi_label and config.class_weights == "balanced" and config.approach == "generative":
        raise InputError("--class_weights with several labels per row needs --approach head: an answer has no weight.")


def _indices(names: Sequence[LabelNames], labels: Sequence[str], source: str) -> list[tuple[int, ...]]:
    """The label names of every row as indices in the label set, ascending."""
    index = {label: i for i, label in enumerate(labels)}
    for number, row in enumerate(names, 1):
        for name in row:
            if name not in index:
                known = ", ".join(labels[:10]) + (" ..." if len(labels) > 10 else "")
                raise InputError(
                    f"{source}, data row {number}: the label {name!r} is not among the labels ({known}). "
                    "Correct the row, or list every label with --labels."
                )
    return [tuple(sorted(index[name] for name in row)) for row in names]
