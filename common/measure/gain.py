"""Baselines' predictions on disk, and what a run gains over the best of them on the same rows."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.classification import Example
from common.disk import read_lines, to_json
from common.measure.intervals import Measure, bootstrap, difference, point
from common.measure.metrics import METRICS, label_measure

Answers = Sequence[tuple[int, ...] | None]  # label indices of each row; None: outside the label set

MAJORITY = "majority class"
TFIDF = "TF-IDF + logistic regression"
ZERO_SHOT = "untrained base, zero-shot"
FILES = {MAJORITY: "majority.jsonl", TFIDF: "tfidf.jsonl", ZERO_SHOT: "zero_shot.jsonl"}  # in FOLDER
FOLDER = "baselines"  # in that of an evaluation
VALUES = ("accuracy", "f1_micro", "f1_macro")
BEST_BY = "f1_micro"  # which is the accuracy where a row has one label; of several, exact sets are a poor measure


def write_predictions(
    folder: Path,
    name: str,
    rows: Sequence[Example],
    answers: Answers,
    labels: Sequence[str],
    multi_label: bool,
    probabilities: np.ndarray | None = None,
) -> None:
    """What a baseline answered to each row: id, prediction and, where there are any, probabilities [rows, labels].

    folder: of the evaluation.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    with open(folder / FOLDER / FILES[name], "w", encoding="utf-8") as file:
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            names = None if answer is None else [labels[k] for k in answer]
            line: dict[str, Any] = {"id": row.id, "prediction": names if names is None or multi_label else names[0]}
            if probabilities is not None:
                line["probabilities"] = dict(zip(labels, probabilities[number].tolist(), strict=True))
            file.write(to_json(line) + "\n")


def read_predictions(folder: Path, name: str, labels: Sequence[str]) -> dict[str, tuple[int, ...] | None]:
    """id -> label indices, of a baseline that `write_predictions` has kept; empty if there is none."""
    file, found = folder / FOLDER / FILES[name], dict[str, tuple[int, ...] | None]()
    index = {label: k for k, label in enumerate(labels)}
    for row in read_lines(file):
        names = [row["prediction"]] if isinstance(row["prediction"], str) else row["prediction"]
        found[row["id"]] = None if names is None else tuple(index[name] for name in names)
    return found


def copy_zero_shot(source: Path, folder: Path) -> None:
    """What the untrained base answered, from one evaluation of a run's rows to another one of the same rows."""
    old, new = (each / FOLDER / FILES[ZERO_SHOT] for each in (source, folder))
    if old.is_file() and old.resolve() != new.resolve():
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(old, new)


def gain_over_best(
    folder: Path, methods: Sequence[str], rows: Sequence[Example], answers: Answers, labels: Sequence[str]
) -> dict[str, Any]:
    """How much more than the best baseline the answers measure, with paired 95 % intervals.

    Empty without a baseline, and of a single row. The best one has the highest micro-F1 (with one label per row:
    accuracy) on all rows. One that answered only some of them, as the untrained base may, is it where it beats that one
    on its own rows, and is then compared on these. folder: of the evaluation, with the predictions of the baselines.
    methods: of the results table; those that have no predictions there are left out.
    """
    position = {row.id: i for i, row in enumerate(rows)}
    found = {name: read_predictions(folder, name, labels) for name in FILES if any(m.startswith(name) for m in methods)}
    found = {name: answered for name, answered in found.items() if answered and answered.keys() <= position.keys()}

    def measure(given: Mapping[str, tuple[int, ...] | None], ids: Sequence[str]) -> Measure:
        return label_measure([rows[position[id]].labels for id in ids], [given[id] for id in ids], len(labels))

    def value(name: str, ids: Sequence[str]) -> float:
        return point(measure(found[name], ids), len(ids))[BEST_BY]

    ids, best = list(position), None
    for name in sorted(found, key=lambda name: -len(found[name])):  # those of all rows first
        some = [id for id in position if id in found[name]]
        if best is None or value(name, some) > value(best, some):
            ids, best = some, name
    if best is None or len(ids) < 2:
        return {}
    own = {row.id: answer for row, answer in zip(rows, answers, strict=True)}
    gained = difference(measure(found[best], ids), measure(own, ids))
    values, intervals = point(gained, len(ids)), bootstrap(gained, len(ids))
    shown = {name: values[name] for name in VALUES}
    return {"baseline": best, "rows": len(ids), **shown, "intervals_95": {name: intervals[name] for name in VALUES}}


def gain_sentence(gain: Mapping[str, Any], rows: int, multi_label: bool) -> str:
    """`gain_over_best` for people. rows: of the evaluation."""
    shown = []
    for name in ("f1_micro" if multi_label else "accuracy", "f1_macro"):
        low, high = gain["intervals_95"][name]
        shown.append(f"{METRICS[name].title} {gain[name]:+.3f} [{low:+.3f}, {high:+.3f}]")
    which = f"{gain['rows']:,} rows" if gain["rows"] == rows else f"the {gain['rows']:,} of {rows:,} rows it was given"
    return f"Gain over the best baseline ({gain['baseline']}): {', '.join(shown)}; 95 % paired, on {which}."
