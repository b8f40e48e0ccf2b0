"""Files and hub data sets -> rows, as text where the file has text, and split -> rows with each file's hash.

Imports neither torch nor transformers: whatever is wrong with a file is reported before a model is loaded.
"""

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from common.config import DataConfig, InputError, why_unreadable
from common.demo_model import hub_answers

DEMO = Path(__file__).parent.parent / "data" / "arxiv_demo"
SPLITS = ("train", "validation", "test")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a CSV, TSV, JSON, JSONL or Parquet file; cells of CSV and TSV stay text as written."""
    path = Path(path)
    readers = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".json": _read_json,
        ".jsonl": _read_json,
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: unknown file type {path.suffix!r}; use one of {', '.join(readers)}.")
    try:
        open(path, "rb").close()
        rows = readers[path.suffix.lower()](path)
    except OSError as error:
        raise InputError(f"{path}: {why_unreadable(error)}.") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8. "
            f"Save the file as UTF-8, for example with `iconv -f latin1 -t utf-8 {path.name}`."
        ) from None
    if not rows:
        raise InputError(
            f"{path}: the file has no rows. It needs at least one row, in CSV and TSV under a header line."
        )
    return rows


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    text = path.read_bytes().decode("utf-8-sig")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # strict: a quote that is never closed would else swallow the rest of the file as one cell.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, line = [], 1
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
            rows.append(row)
    except csv.Error as error:
        raise InputError(
            f"{path}, line {line}: not readable as CSV: {error}. A field in quotes must end with a quote, and quotes "
            "inside it are written twice."
        ) from None
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes().decode("utf-8-sig")
    try:
        if path.suffix.lower() == ".json":
            rows = json.loads(text) if text.strip() else []
        else:
            rows = []
            for number, line in enumerate(text.split("\n"), 1):  # noqa: B007 (named in the error below)
                if line.strip():
                    rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        line = error.lineno if path.suffix.lower() == ".json" else number
        remedy = " A file with one object a line is named .jsonl." if error.msg == "Extra data" else ""
        raise InputError(f"{path}, line {line}: not valid JSON: {error.msg}.{remedy or ' Correct it there.'}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f'{path}: expected a list of objects, one a row, such as [{{"text": ..., "label": ...}}].')
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(
            f"{path}: not a whole Parquet file ({' '.join(str(error).split())}). Copy or save it again."
        ) from None


def read_hub(config: DataConfig) -> tuple[dict, dict]:
    """split -> rows and split -> {name, sha256}, of a hub data set or a local folder of one."""
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
    tables, sources = {}, {}
    for split, aliases in zip(SPLITS, (("train",), ("validation", "valid", "val", "dev"), ("test",)), strict=True):
        for part in (loaded[name] for name in aliases[::-1] if name in loaded):
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
