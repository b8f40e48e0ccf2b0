"""Cells -> the label names of every row -> indices in the label set; what a reader should know about the labels.

    "Sports"   ["Sports", "Art"]   1 0 1 in columns      ->   ("Sports",)   ("Sports", "Art")   ...

Imports neither torch nor transformers: whatever is wrong with a label is reported before a model is loaded.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from common.data.files import Row, columns_of, require_columns, text_in
from common.data.splits import Sources
from common.errors import InputError
from common.options import ClassificationConfig

LabelNames = tuple[str, ...]  # of one row
MISSING = ("null", "na", "n/a", "#n/a", "<na>", "none", "nil")  # what tables write for a missing value
SHOWN = 10  # labels, or groups of them, in a line of the data report


def label_text(name: str) -> str:
    """A label as it is everywhere: trimmed, its characters composed (NFC)."""
    return unicodedata.normalize("NFC", name).strip()


def is_multi_label(tables: dict[str, list[Row]], sources: Sources, config: ClassificationConfig) -> bool:
    """Whether rows have several labels. Raises InputError if they have both forms, or not that of --problem_type."""
    detected = bool(config.label_columns or config.label_delimiter) or _has_lists(tables, sources, config)
    if config.problem_type and detected != (config.problem_type == "multi_label_classification"):
        raise InputError(
            f"--problem_type {config.problem_type} does not fit the labels: several labels per row come from "
            "--label_columns, from --label_delimiter or from JSON lists, and only from those."
        )
    return detected


def _has_lists(tables: dict[str, list[Row]], sources: Sources, config: ClassificationConfig) -> bool:
    """Whether labels are lists. Raises InputError for the first row whose label is not of the form of those before."""
    column, lists = config.label_column or "label", None
    for split, rows in tables.items():
        for number, row in enumerate(rows, 1):
            cell = row.get(column)
            if lists is None and cell is not None:
                lists = isinstance(cell, list)
            elif cell is not None and isinstance(cell, list) != lists:
                form, before = ("a single label", "lists") if lists else ("a list of labels", "single labels")
                raise InputError(
                    f"{sources[split]['name']}, data row {number}, column {column!r}: {form}, where the rows before "
                    f"have {before}. Use one form; a list may hold one label."
                )
    return bool(lists)


def read_labels(rows: Sequence[Row], source: str, config: ClassificationConfig) -> list[LabelNames]:
    """The label names of every row."""
    where, columns = f"{source}, data row", columns_of(rows)
    if config.label_columns:
        column_of = {label_text(name): name for name in columns}
        labels = [label_text(name) for name in config.label_columns]
        require_columns(labels, list(column_of), source, "--label_columns")
        return [
            tuple(name for name in labels if _is_set(row.get(column_of[name]), f"{where} {number}, column {name!r}"))
            for number, row in enumerate(rows, 1)
        ]
    column = config.label_column or "label"
    require_columns([column], columns, source, "--label_column")
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
        names = [_label_name(item, where) for item in cell]
    elif delimiter and isinstance(cell, str):
        names = [label_text(name) for name in cell.split(delimiter) if name.strip()]
    else:
        names = [_label_name(cell, where)]
    if any(name.lower() in ("", "nan") for name in names):
        raise InputError(f"{where}: the label is missing (empty or NaN). Fill it in or delete the row.")
    if len(set(names)) != len(names):
        raise InputError(f"{where}: a label occurs twice in {cell!r}. Name each label once.")
    return tuple(names)


def _label_name(value: Any, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # integer labels with a gap are stored as floats by many tools
    return label_text(text_in(value, where))


def label_set(names: dict[str, list[LabelNames]]) -> list[str]:
    """The labels of the training rows (of all rows if there are none), sorted; whole numbers by their value."""
    rows = names["train"] if "train" in names else [row for rows in names.values() for row in rows]
    labels = {name for row in rows for name in row}
    if all(re.fullmatch(r"-?[0-9]+", name) for name in labels):
        return sorted(labels, key=lambda name: (Decimal(name), name))  # 1 and 01 are two labels
    return sorted(labels)


def label_notes(names: Sequence[LabelNames]) -> list[str]:
    """What a reader of the data report should know: labels that may be one label, or none. names: of every row."""
    counts = Counter(name for row in names for name in row)
    shown = {name: f"{name!r} in {n} row{'s' if n > 1 else ''}" for name, n in sorted(counts.items())}
    alike: dict[str | Decimal, list[str]] = {}
    for name in shown:
        alike.setdefault(_spelling(name), []).append(shown[name])
    groups = [", ".join(group) for group in alike.values() if len(group) > 1]
    notes = []
    if groups:
        more = f"; and {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
        notes.append(
            "labels that differ only in case, in the form of a number, or in invisible characters: "
            f"{'; '.join(groups[:SHOWN])}{more}. If they mean the same, write them alike."
        )
    if missing := [shown[name] for name in shown if name.lower() in MISSING]:
        notes.append(
            f"labels that often stand for a missing value: {', '.join(missing)}. If they do, fill them in or delete "
            "the rows."
        )
    if lists := [shown[name] for name in shown if re.fullmatch(r"\[.*\]", name)]:
        more = ", ..." if len(lists) > SHOWN else ""
        notes.append(
            f"labels that are written as a list: {', '.join(lists[:SHOWN])}{more}. If a row has several labels, write "
            "them as a;b and set --label_delimiter, or use JSON lists in a JSONL file."
        )
    return notes


def _spelling(label: str) -> str | Decimal:
    """The same for labels that look alike."""
    seen = "".join(c for c in label if c.isspace() or not _is_invisible(c))
    text = " ".join(seen.split()).casefold()
    return Decimal(text) if re.fullmatch(r"[+-]?\d+(\.\d+)?", text) else text


def _is_invisible(character: str) -> bool:
    """Zero-width and other format characters, control characters, variation selectors."""
    return unicodedata.category(character) in ("Cc", "Cf") or "\ufe00" <= character <= "\ufe0f"


def label_indices(names: Sequence[LabelNames], labels: Sequence[str], source: str) -> list[tuple[int, ...]]:
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
