"""Rows of files -> classification rows with their labels; splits; the counts of the data report.

Imports neither torch nor transformers: whatever is wrong with the data is reported before a model is loaded.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.data.files import SPLITS, cut_splits, read_files, read_hub
from common.errors import InputError, why_unreadable
from common.options import ClassificationConfig, TextConfig

SEPARATOR = ", "  # between the labels of an instruction, and of a multi-label answer
MIN_COMBINATION = 10  # rows; rarer label combinations are one stratum when a split is cut


@dataclass(frozen=True)
class Example:
    """One classification row: `labels` holds the indices of its labels, ascending (one, or any number)."""

    id: str
    text: str
    labels: tuple[int, ...]


@dataclass
class ClassificationData:
    """The three splits (a missing one is empty), the label set in its order, and what happened on the way."""

    splits: dict[str, list[Example]]
    labels: list[str]
    multi_label: bool
    sources: dict[str, dict[str, str]]  # split -> file (or data set) and its hash
    report: dict[str, Any] = field(default_factory=dict)


def load_classification(config: Any, training: bool = True) -> ClassificationData:
    """Reads, checks and cuts the splits that `config` (DataConfig and ClassificationConfig) describes.

    The label set is `--labels`, else `--label_columns`, else the labels of the training rows, sorted.
    Raises InputError that names file, row and column for whatever cannot be used.
    """
    tables, sources = read_hub(config) if config.dataset_name else read_files(config)
    if training and "train" not in tables:
        raise InputError(f"{config.dataset_name or 'The data'}: there are no training rows; give --train_file.")
    multi_label = _is_multi_label(config, tables)
    named = {split: _named_labels(rows, sources[split]["name"], config) for split, rows in tables.items()}
    labels = config.labels or config.label_columns or _collect_labels(named)
    if not labels:
        raise InputError(f"{next(iter(sources.values()))['name']}: no row has a label. Is --label_column right?")
    _check_labels(labels, multi_label, config)
    report: dict[str, Any] = {"files": sources, "labels": labels, "multi_label": multi_label, "rows": {}}
    examples = {}
    for split, rows in tables.items():
        examples[split] = _examples(rows, named[split], labels, multi_label, split, sources[split]["name"], config)
        report["rows"][split] = {"read": len(rows), "dropped_empty_text": len(rows) - len(examples[split])}
    if "train" in examples:
        counts = Counter(label for example in examples["train"] for label in example.labels)
        if len(counts) < (1 if multi_label else 2):
            found = f"have the label {labels[next(iter(counts))]!r}" if counts else "are without a label"
            raise InputError(
                f"{sources['train']['name']}: all {len(examples['train'])} rows {found}, so there is nothing to tell "
                f"apart. Is {'--label_columns' if config.label_columns else '--label_column'} right?"
            )
    examples = cut_splits(examples, config, report, stratified_sample) if "train" in examples else examples
    for split, limit in (("train", config.max_train_samples), ("validation", config.max_eval_samples)):
        if limit and len(examples.get(split, ())) > limit:
            chosen = stratified_sample(examples[split], limit, config.split_seed)
            examples[split] = [examples[split][i] for i in chosen]
    if training:
        class_weights(config.class_weights, examples["train"], labels, multi_label)  # a file is checked right now
    _count(examples, labels, report)
    return ClassificationData(
        {split: examples.get(split, []) for split in SPLITS}, labels, multi_label, sources, report
    )


def unlabelled_rows(
    rows: Sequence[dict[str, Any]], ids: Sequence[str], source: str, config: TextConfig
) -> list[Example]:
    """Rows without labels, to be answered: their texts are joined as those of training rows are."""
    fields = _text_fields(_columns(list(rows)), source, config)
    return [Example(name, join_fields(row, fields), ()) for name, row in zip(ids, rows, strict=True)]


def draw_few_shot(data: ClassificationData, config: Any) -> tuple[list[tuple[str, tuple[int, ...]]], list[Example]]:
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
    """The weights of `--class_weights`, one a label, or None.

    balanced: n / (K n_k) for a row of label k (as scikit-learn); for several labels a row, negatives / positives, the
    `pos_weight` of binary cross-entropy. A file: {label: weight} in JSON. A label without a row counts as with one.
    """
    if option == "none":
        return None
    counts = Counter(label for row in rows for label in row.labels)
    number = [max(1, counts[k]) for k in range(len(labels))]
    if option == "balanced":
        if multi_label:
            return [(len(rows) - n) / n for n in number]
        return [len(rows) / (len(labels) * n) for n in number]
    try:
        given = json.loads(Path(option).read_text(encoding="utf-8"))
        weights = [float(given[label]) for label in labels]
    except OSError as error:
        raise InputError(
            f"--class_weights {option}: {why_unreadable(error)}. Give none, balanced, or a JSON file {{label: weight}}."
        ) from None
    except KeyError as error:
        raise InputError(f"--class_weights {option}: the file has no weight for the label {error}. Add it.") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"--class_weights {option}: not a JSON object {{label: weight}}: {error}.") from None
    for label, weight in zip(labels, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise InputError(f"--class_weights {option}: the weight of {label!r} is {weight}; use a number from 0 up.")
    return weights


def join_fields(row: dict[str, Any], names: Sequence[str]) -> str:
    """The fields as one run of sentences: blank ones skipped, a period after each that lacks an end mark."""
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


def _is_multi_label(config: ClassificationConfig, tables: dict) -> bool:
    column = config.label_column or "label"
    lists = any(isinstance(row.get(column), list) for rows in tables.values() for row in rows)
    seen = bool(config.label_columns or config.label_delimiter or lists)
    if config.problem_type and seen != (config.problem_type == "multi_label_classification"):
        raise InputError(
            f"--problem_type {config.problem_type} does not fit the labels: several labels a row come from "
            "--label_columns, from --label_delimiter or from JSON lists, and only from those."
        )
    return seen


def _columns(rows: list[dict]) -> list[str]:
    """The columns in their order; JSON rows may each lack some."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _text_fields(columns: list[str], source: str, config: TextConfig) -> list[str]:
    known = f"it has {', '.join(map(str, columns))}."
    if not config.text_fields:
        for names in (["text"], ["title", "abstract"]):
            if set(names) <= set(columns):
                return names
        raise InputError(
            f"{source}: there is neither a column 'text' nor 'title' and 'abstract'; {known} "
            "Name the text columns with --text_fields."
        )
    for name in config.text_fields:
        if name not in columns:
            raise InputError(f"{source}: there is no text column {name!r}; {known} Correct --text_fields.")
    return config.text_fields


def _named_labels(rows: list[dict], source: str, config: Any) -> list[tuple[str, ...]]:
    """The label names of every row, as strings."""
    columns, present = config.label_columns or [config.label_column or "label"], _columns(rows)
    for column in columns:
        if column not in present:
            option = "--label_columns" if config.label_columns else "--label_column"
            raise InputError(
                f"{source}: there is no label column {column!r}; it has {', '.join(map(str, present))}. Set {option}."
            )
    result = []
    for number, row in enumerate(rows, 1):
        where = f"{source}, data row {number}, column"
        if config.label_columns:
            result.append(tuple(name for name in columns if _flag(row.get(name), f"{where} {name!r}")))
        else:
            result.append(_cell_labels(row.get(columns[0]), f"{where} {columns[0]!r}", config.label_delimiter))
    return result


def _flag(value: Any, where: str) -> bool:
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true"):
        return True
    if text in ("0", "0.0", "false"):
        return False
    raise InputError(f"{where}: {value!r} is not 0 or 1. Correct the cell.")


def _cell_labels(value: Any, where: str, delimiter: str | None) -> tuple[str, ...]:
    if isinstance(value, list):
        parts = [_label_text(part) for part in value]
    elif delimiter and isinstance(value, str):
        parts = [part.strip() for part in value.split(delimiter) if part.strip()]
    else:
        parts = [_label_text(value)]
    if any(part.lower() in ("", "nan") for part in parts):
        raise InputError(f"{where}: the label is missing (empty or NaN). Fill it in or delete the row.")
    if len(set(parts)) != len(parts):
        raise InputError(f"{where}: a label occurs twice in {value!r}. Name each label once.")
    return tuple(parts)


def _label_text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # integer labels with a gap are stored as floats by many tools
    return str(value).strip()


def _collect_labels(named: dict[str, list[tuple[str, ...]]]) -> list[str]:
    """The labels of the training rows (of all rows where there are none); numbers in numeric order."""
    rows = named["train"] if "train" in named else [row for rows in named.values() for row in rows]
    names = {name for row in rows for name in row}
    numeric = all(re.fullmatch(r"-?[0-9]+", name) for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if numeric else sorted(names)  # 1 and 01 are two labels


def _check_labels(labels: list[str], multi_label: bool, config: ClassificationConfig) -> None:
    option = "--label_columns" if config.label_columns else "--labels"
    for label, count in Counter(labels).items():
        if count > 1:
            raise InputError(f"{option} names {label!r} twice. Name each label once.")
        if label != label.strip() or not label:
            raise InputError(f"{option}: the label {label!r} is blank or has a space at an end. Rename it.")
        if multi_label and SEPARATOR.strip() in label:
            raise InputError(f"The label {label!r} contains a comma, which separates labels in an answer. Rename it.")
    if multi_label and config.class_weights not in ("none", "balanced"):
        raise InputError("--class_weights takes a file for one label a row only; for several, use balanced.")
    if multi_label and config.class_weights == "balanced" and config.approach == "generative":
        raise InputError(
            "--class_weights with several labels a row needs --approach head: an answer has no single weight."
        )


def _examples(
    rows: list[dict],
    named: list[tuple[str, ...]],
    labels: list[str],
    multi_label: bool,
    split: str,
    source: str,
    config: Any,
) -> list[Example]:
    index = {label: i for i, label in enumerate(labels)}
    columns = _columns(rows)
    fields = _text_fields(columns, source, config)
    if config.id_column and config.id_column not in columns:
        raise InputError(
            f"{source}: there is no column {config.id_column!r} (--id_column); it has {', '.join(columns)}."
        )
    ids: set[str] = set()
    examples = []
    for number, (row, names) in enumerate(zip(rows, named, strict=True), 1):
        for name in names:
            if name not in index:
                known = ", ".join(labels[:10]) + (" ..." if len(labels) > 10 else "")
                raise InputError(
                    f"{source}, data row {number}: the label {name!r} is not among the labels ({known}). "
                    "Correct the row, or list every label with --labels."
                )
        identifier = str(row.get(config.id_column)) if config.id_column else str(number - 1)
        if config.id_column and (row.get(config.id_column) in (None, "") or identifier in ids):
            raise InputError(
                f"{source}, data row {number}, column {config.id_column!r}: an id is missing or occurs twice."
            )
        ids.add(identifier)
        text = join_fields(row, fields)
        if text or split != "train":  # every row to be evaluated gets an answer; an empty one teaches nothing
            examples.append(Example(identifier, text, tuple(sorted(index[name] for name in names))))
    if not examples:
        raise InputError(f"{source}: no row has any text in {', '.join(fields)}. Is --text_fields right?")
    return examples


def _count(examples: dict[str, list[Example]], labels: list[str], report: dict) -> None:
    train = Counter(example.text for example in examples.get("train", ()))
    for split, rows in examples.items():
        entry = report["rows"].setdefault(split, {})
        counts = Counter(label for example in rows for label in example.labels)
        entry["used"] = len(rows)
        entry["duplicates"] = len(rows) - len({example.text for example in rows})
        if split != "train":
            entry["also_in_train"] = sum(example.text in train for example in rows)
        entry["label_counts"] = {label: counts[i] for i, label in enumerate(labels)}
