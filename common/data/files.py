"""Files and hub data sets -> rows, as text where the file has text, and split -> rows with each file's hash.

Imports neither torch nor transformers: whatever is wrong with a file is reported before a model is loaded.
"""

import contextlib
import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, why_unreadable
from common.hub import hub_answers
from common.options import DataConfig

DEMO = Path(__file__).parents[2] / "data" / "arxiv_demo"
SPLITS = ("train", "validation", "test")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a CSV, TSV, JSON, JSONL or Parquet file; cells of CSV and TSV stay text as written."""
    rows = list(iterate_rows(path))
    if not rows:
        raise InputError(
            f"{path}: the file has no rows. It needs at least one row, in CSV and TSV under a header line."
        )
    return rows


def iterate_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of `read_rows` one by one: memory does not grow with the file, unless it is .json, a single value."""
    path = Path(path)
    readers = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: unknown file type {path.suffix!r}; use one of {', '.join(readers)}.")
    with reading(path):
        yield from readers[path.suffix.lower()](path)


def row_ids(rows: list[dict[str, Any]], source: str, id_column: str | None) -> list[str]:
    """What names the rows: the cells of `--id_column`, which must differ, else their numbers from 0."""
    if id_column is None:
        return [str(number) for number in range(len(rows))]
    columns = dict.fromkeys(name for row in rows for name in row)
    if id_column not in columns:
        raise InputError(f"{source}: there is no column {id_column!r} (--id_column); it has {', '.join(columns)}.")
    ids: dict[str, None] = {}
    for number, row in enumerate(rows, 1):
        if row.get(id_column) in (None, "") or str(row[id_column]) in ids:
            raise InputError(f"{source}, data row {number}, column {id_column!r}: an id is missing or occurs twice.")
        ids[str(row[id_column])] = None
    return list(ids)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what hinders reading a file into an InputError that names file and line."""
    try:
        open(path, "rb").close()
        yield
    except OSError as error:
        raise InputError(f"{path}: {why_unreadable(error)}.") from None
    except UnicodeDecodeError:
        line, byte = _first_not_utf8(path)
        raise InputError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8. "
            f"Save the file as UTF-8, for example with `iconv -f latin1 -t utf-8 {path.name}`."
        ) from None


def _first_not_utf8(path: Path) -> tuple[int, int]:
    """Line and byte; a decoder that reads ahead does not know the line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, line[error.start]
    raise AssertionError(f"{path} is UTF-8")


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        # strict: a quote that is never closed would else swallow the rest of the file as one cell.
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            if len(set(header := reader.fieldnames or [])) != len(header):
                raise InputError(f"{path}, line 1: two columns have the same name. Rename one: {', '.join(header)}.")
            line = 2
            for row in reader:
                line = reader.line_num + 1
                if None in row or None in row.values():
                    raise InputError(
                        f"{path}, line {reader.line_num}: the row has "
                        f"{'more' if None in row else 'fewer'} fields than the header's {len(reader.fieldnames)}. "
                        "Put quotes around fields that contain a separator."
                    )
                yield row
        except csv.Error as error:
            raise InputError(
                f"{path}, line {line}: not readable as CSV: {error}. A field in quotes must end with a quote, and "
                "quotes inside it are written twice."
            ) from None


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes().decode("utf-8-sig")
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise _not_json(path, error.lineno, error) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _not_rows(path)
    return rows


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise _not_json(path, number, error) from None
            if not isinstance(row, dict):
                raise _not_rows(path)
            if line.strip():
                yield row


def _not_json(path: Path, line: int, error: json.JSONDecodeError) -> InputError:
    remedy = "A file with one object a line is named .jsonl." if error.msg == "Extra data" else "Correct it there."
    return InputError(f"{path}, line {line}: not valid JSON: {error.msg}. {remedy}")


def _not_rows(path: Path) -> InputError:
    return InputError(f'{path}: expected a list of objects, one a row, such as [{{"text": ..., "label": ...}}].')


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(
            f"{path}: not a whole Parquet file ({' '.join(str(error).split())}). Copy or save it again."
        ) from None


def load_hub(config: DataConfig) -> dict[str, Any]:
    """split -> datasets.Dataset, of a hub data set or a local folder of one; rows stay on disk until they are asked."""
    if not Path(config.dataset_name).exists():
        hub_answers()
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(config.dataset_name, config.dataset_config)
    except Exception as error:  # the hub's client raises many kinds; each is the user's to act on
        raise InputError(
            f"--dataset_name {config.dataset_name}: could not be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Check the name, --dataset_config and the network, or give --train_file."
        ) from None
    aliases = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
    return {
        split: next(loaded[name] for name in aliases[split] if name in loaded)
        for split in SPLITS
        if any(name in loaded for name in aliases[split])
    }


def read_hub(config: DataConfig) -> tuple[dict, dict]:
    """split -> rows and split -> {name, sha256}, of a hub data set or a local folder of one."""
    parts = load_hub(config)
    import datasets

    tables, sources = {}, {}
    for split, part in parts.items():
        rows = part.to_list()
        for key, kind in part.features.items():
            classes = getattr(kind, "feature", kind)  # of a list of classes, too
            if isinstance(classes, datasets.ClassLabel):
                for row in rows:
                    row[key] = _class_names(row[key], classes.names)
        digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
        tables[split], sources[split] = rows, {"name": f"{config.dataset_name} [{split}]", "sha256": digest}
    return tables, sources


def _class_names(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_class_names(item, names) for item in value]
    return names[value] if value is not None and value >= 0 else None


def read_files(config: DataConfig, demo: Path = DEMO) -> tuple[dict, dict]:
    """split -> rows and split -> {name, sha256}, of the files that the options name; of those in `demo` without any."""
    paths = {"train": config.train_file, "validation": config.validation_file, "test": config.test_file}
    if not any(paths.values()):
        paths = {split: str(next(demo.glob(f"{split}.*"))) for split in SPLITS}
    paths = {split: path for split, path in paths.items() if path}
    tables = {split: read_rows(path) for split, path in paths.items()}
    return tables, {split: {"name": path, "sha256": file_hash(path)} for split, path in paths.items()}


def cut_splits(
    splits: dict[str, list], config: DataConfig, report: dict, draw: Callable[[list, int, int], Sequence[int]]
) -> dict[str, list]:
    """Cuts the splits that no file gives from the training rows, test first, both by --split_seed.

    draw(rows, count, seed): the numbers of the rows to take. The counts are noted in `report`.
    """
    rest, total, result = splits["train"], len(splits["train"]), dict(splits)
    for split, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        if split in splits or not fraction:
            continue
        count = round(total * fraction)
        if not 0 < count < len(rest):
            raise InputError(
                f"The training file's {total} rows are too few to cut {fraction:.0%} for {split}: "
                f"give --{split}_file, or set --{split}_fraction 0."
            )
        chosen = set(draw(rest, count, config.split_seed))
        result[split] = [row for i, row in enumerate(rest) if i in chosen]
        rest = [row for i, row in enumerate(rest) if i not in chosen]
        report.setdefault("cut_from_train", {})[split] = count
    return {**result, "train": rest}
