"""Files or a hub data set -> the rows of each split; splits that are missing are cut from the training rows.

    --train_file, --test_file   ->   read_splits   ->   rows of train, test; where they are from
    rows of train, test         ->   examples or conversations, in classification.py and conversations.py
    examples of train, test     ->   complete_splits   ->   train, validation (cut from train by --split_seed), test

Imports neither torch nor transformers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from common.data.files import Row, file_hash, read_rows, weights_hashes
from common.disk import TASK_FILE
from common.errors import InputError
from common.hub import hub_answers
from common.log import warn
from common.options import DataConfig

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")  # an example, or a conversation
Labels = tuple[Any, ...]  # of one row
Sources = dict[str, dict[str, str]]  # split -> name (file, or `data set [split]`) and sha256 of what it is read from

DEMO_FOLDERS = Path(__file__).parents[2] / "data"
SPLITS = ("train", "validation", "test")
MIN_COMBINATION = 10  # rows; rarer label combinations are one stratum when a split is cut
HUB_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def read_splits(config: DataConfig, demo: Path, training: bool) -> tuple[dict[str, list[Row]], Sources]:
    """split -> rows: of the hub data set or the files that the options name, or of those in `demo` if they name none.

    Raises InputError for what cannot be read; and for training, if there are no training rows.
    """
    if config.dataset_name:
        tables, sources = _read_hub(config.dataset_name, config.dataset_config)
    else:
        paths = given_files(config) or {split: str(next(demo.glob(f"{split}.*"))) for split in SPLITS}
        tables = {split: read_rows(path) for split, path in paths.items()}
        sources = {split: {"name": path, "sha256": file_hash(path)} for split, path in paths.items()}
    if training:
        require_training_rows(tables, config)
    return tables, sources


def require_training_rows(splits: Collection[str], config: DataConfig) -> None:
    if "train" not in splits:
        if config.dataset_name:
            raise InputError(f"{config.dataset_name}: there is no split `train`: write its rows to a --train_file.")
        raise InputError("The data: there are no training rows; give --train_file.")


def given_files(config: DataConfig) -> dict[str, str]:
    """split -> path, of the files that the options name."""
    paths = {"train": config.train_file, "validation": config.validation_file, "test": config.test_file}
    return {split: path for split, path in paths.items() if path}


def open_hub(
    name: str, configuration: str | None, option: str = "--dataset_name", progress: bool = False
) -> "dict[str, datasets.Dataset]":
    """The splits of a hub data set, or of a local folder of one; rows stay on disk until they are read.

    option: where the name is set, for errors. progress: whether a download shows its progress.
    Raises InputError where no split has a usual name; a warning names those that are not used.
    """
    if not Path(name).exists():
        hub_answers()  # if not, only the cache is searched
    import datasets

    if not progress:
        datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, configuration)
    except Exception as error:  # the hub's client raises many kinds; the user can act on each
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"{option} {name}: could not be loaded ({reason}). Check the name, the configuration and the network, or "
            "give the folder of a downloaded copy."
        ) from None
    found = {split: [alias for alias in aliases if alias in loaded] for split, aliases in HUB_NAMES.items()}
    used = {split: aliases[0] for split, aliases in found.items() if aliases}
    others = ", ".join(sorted(set(loaded) - set(used.values())))
    if not used:
        raise InputError(
            f"{option} {name}: none of its splits ({others}) is called train, validation or test. Write their rows to "
            "files instead."
        )
    if others:
        warn(f"{option} {name}: its splits {others} are not used.")
    return {split: loaded[alias] for split, alias in used.items()}


def origin(sources: Sources, split: str, weights: Path | None) -> dict[str, Any]:
    """What figures are of, for a metrics.json: the file of the rows, and the SHA-256 of the trained weights.

    sources: a split that is not among them was cut from the training rows. weights: their folder, whose task.json says
    how they are used, and so counts too; None: an untrained base.
    """
    hashes = {**weights_hashes(weights), TASK_FILE: file_hash(weights / TASK_FILE)} if weights else {}
    return {"source": sources.get(split) or sources["train"], "weights": hashes}


def _read_hub(name: str, configuration: str | None) -> tuple[dict[str, list[Row]], Sources]:
    parts = open_hub(name, configuration)
    from datasets import ClassLabel  # after the check in open_hub: at its import it notes whether there is a network

    tables, sources = {}, {}
    for split, part in parts.items():
        rows = part.to_list()
        for column, feature in part.features.items():
            classes = getattr(feature, "feature", feature)  # of a list of classes, too
            if isinstance(classes, ClassLabel):
                for row in rows:
                    row[column] = _class_names(row[column], classes.names)
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
        tables[split], sources[split] = rows, {"name": f"{name} [{split}]", "sha256": digest}
    return tables, sources


def _class_names(cell: Any, names: list[str]) -> Any:
    """The names of the class numbers in a cell; None for an unlabeled row (-1)."""
    if isinstance(cell, list):
        return [_class_names(item, names) for item in cell]
    return names[cell] if cell is not None and cell >= 0 else None


def complete_splits(
    splits: dict[str, list[T]],
    config: DataConfig,
    report: dict[str, Any],
    labels_of: Callable[[T], Labels] = lambda row: (),
) -> dict[str, list[T]]:
    """Cuts the splits that no file gives from the training rows, then draws the rows that --max_..._samples leaves.

    labels_of(row): the labels that these splits and samples are stratified by. The counts are noted in `report`.
    """
    splits, seed, rows = dict(splits), config.split_seed, splits.get("train", [])
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    fractions = {split: fraction for split, fraction in fractions.items() if fraction and split not in splits and rows}
    counts = {split: round(len(rows) * fraction) for split, fraction in fractions.items()}
    parts = cut(rows, counts, seed, labels_of)
    for split, fraction in fractions.items():
        if not parts[split] or not parts["train"]:
            file, remedy = report["files"]["train"]["name"], f"give --{split}_file, or set --{split}_fraction 0."
            problem = f"{len(rows)} rows are too few to cut {fraction:.0%}"
            if counts[split] and labels_of(rows[0]):
                problem = f"no label has rows to spare among the {len(rows)}, to cut {fraction:.0%}"
                remedy += " Is --label_column right?"
            raise InputError(f"{file}: {problem} for {split}: {remedy}")
        report.setdefault("cut_from_train", {})[split] = len(parts[split])
    splits |= parts if rows else {}
    for split, limit in (("train", config.max_train_samples), ("validation", config.max_eval_samples)):
        rows = splits.get(split, [])
        if limit and len(rows) > limit:
            splits[split] = [rows[i] for i in stratified_sample([labels_of(row) for row in rows], limit, seed)]
    return splits


def hold_out(rows: Sequence[T], fold: int, folds: int, seed: int, labels_of: Callable[[T], Labels]) -> dict[str, list]:
    """Fold number `fold` (1 to `folds`) of the rows as `test`, the others as `train`.

    Folds are of equal sizes and drawn by `seed`: rows with the same labels are dealt to them in turn.
    """
    drawn = np.random.default_rng(seed).permutation(len(rows)).tolist()
    dealt = sorted(drawn, key=lambda i: str(labels_of(rows[i])))
    test = set(dealt[fold - 1 :: folds])
    parts = {"test": [rows[i] for i in sorted(test)], "train": [row for i, row in enumerate(rows) if i not in test]}
    if not parts["test"]:
        raise InputError(f"--folds {folds}: there are only {len(rows)} rows. Use a smaller number.")
    return parts


def cut(rows: Sequence[T], counts: dict[str, int], seed: int, labels_of: Callable[[T], Labels]) -> dict[str, list[T]]:
    """The rows in splits of (at most) these sizes, and the rest, `train`; no label loses its last row there."""
    whole, parts = [labels_of(row) for row in rows], dict[str, list[T]]()
    for number, (split, count) in enumerate(counts.items()):
        labels = [labels_of(row) for row in rows]
        chosen = set(stratified_sample(labels, count, seed, leave=len(counts) - number, whole=whole))
        parts[split] = [row for i, row in enumerate(rows) if i in chosen]
        rows = [row for i, row in enumerate(rows) if i not in chosen]
    return {**parts, "train": list(rows)}


def stratified_sample(
    labels: Sequence[Labels], count: int, seed: int, leave: int = 0, whole: Sequence[Labels] = ()
) -> list[int]:
    """`count` row numbers, ascending, drawn by `seed`, with the strata in proportion.

    A label with more than `leave` rows is drawn at least once, if `count` is enough for all of these.

    labels: of each row. leave: so many rows of every label stay for other splits, of one with fewer rows all but one; a
    label's only row is never drawn, so there may be fewer than `count`. With 0, none need stay. whole: as `labels`, of
    the rows whose proportions count, if these are the rest of them.
    """
    counts = Counter(label for row in labels for label in row)
    spare = {label: n - max(1, min(leave, n - 1)) if leave else n for label, n in counts.items()}
    missing = {label for label, n in counts.items() if n > leave}
    order = _in_proportion(labels, count, seed, whole or labels)
    chosen: set[int] = set()
    for completing in (True, False) if len(missing) <= count else (False,):
        for number in order:
            row = labels[number]
            if len(chosen) == count:
                break
            if number in chosen or any(not spare[label] for label in row) or completing and missing.isdisjoint(row):
                continue
            chosen.add(number)
            missing.difference_update(row)
            for label in row:
                spare[label] -= 1
    return sorted(chosen)


def _in_proportion(labels: Sequence[Labels], count: int, seed: int, whole: Sequence[Labels]) -> list[int]:
    """All row numbers, such that the first `count` are a stratified sample (largest remainders; `seed` breaks ties).

    Strata are the labels; of rows with any number of labels, the combinations with at least MIN_COMBINATION rows.
    Within the sample, and after it, the strata take turns in proportion to their rows.
    """
    combinations = Counter(whole)

    def stratum(row: Labels) -> Labels:
        return ("rare",) if len(row) != 1 and combinations[row] < MIN_COMBINATION else row

    sizes = Counter[Labels]()
    for row, n in combinations.items():
        sizes[stratum(row)] += n
    strata: dict[Labels, list[int]] = {}
    for number, row in enumerate(labels):
        strata.setdefault(stratum(row), []).append(number)
    rng = np.random.default_rng(seed)
    place = np.empty(len(labels))  # of a row in its stratum, from 0 to 1
    excess = np.empty(len(labels), dtype=np.int64)  # of its stratum, drawn up to this row, over its share x len(whole)
    for key in sorted(strata, key=str):
        rows, ranks = rng.permutation(strata[key]), np.arange(len(strata[key]))
        place[rows] = (ranks + 0.5) / len(rows)
        excess[rows] = (ranks + 1) * len(whole) - count * sizes[key]
    tie = rng.random(len(labels))
    outside = np.ones(len(labels), dtype=bool)
    outside[np.lexsort((tie, excess))[:count]] = False
    return np.lexsort((tie, place, outside)).tolist()


def count_copies(
    splits: dict[str, list[T]], report: dict[str, Any], content: Callable[[T], Any], question: Callable[[T], Any]
) -> None:
    """Adds to the report how many rows of each split are used, repeat another one, or are in the training rows too.

    content(row): the same for rows that repeat each other. question(row): for rows that a model answers alike.
    """
    train = {question(row) for row in splits.get("train", ())}
    for split, rows in splits.items():
        entry = report["rows"].setdefault(split, {})
        entry["used"] = len(rows)
        entry["duplicates"] = len(rows) - len({content(row) for row in rows})
        if split != "train":
            entry["also_in_train"] = sum(question(row) in train for row in rows)
