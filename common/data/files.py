"""A file -> its rows, as text wherever the file has text; and what all kinds of rows share: columns and ids.

Imports neither torch nor transformers: whatever is wrong with a file is reported before a model is loaded.
"""

import contextlib
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError, why_unreadable

Row = dict[str, Any]  # column -> cell


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a CSV, TSV, JSON, JSONL or Parquet file; cells of CSV and TSV stay text as written."""
    rows = list(iterate_rows(path))
    if not rows:
        raise InputError(f"{path}: the file has no rows. It needs at least one, in CSV and TSV under a header line.")
    return rows


def iterate_rows(path: str | Path) -> Iterator[Row]:
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


def columns_of(rows: Iterable[Row]) -> list[str]:
    """The columns in their order; JSON rows may each lack some."""
    return list(dict.fromkeys(name for row in rows for name in row))


def require_columns(names: Iterable[str], columns: Sequence[str], source: str, option: str) -> None:
    """Raises InputError for the first of `names` that is none of the columns; `option` is where it is set."""
    for name in names:
        if name not in columns:
            raise InputError(
                f"{source}: there is no column {name!r}; it has {', '.join(columns)}. Name the right one with {option}."
            )


def text_columns(columns: Sequence[str], text_fields: list[str] | None) -> list[str]:
    """--text_fields; without it `title` and `abstract` where they are columns and `text` is none, else `text`."""
    if text_fields:
        return text_fields
    return ["title", "abstract"] if {"title", "abstract"} <= set(columns) and "text" not in columns else ["text"]


def row_ids(rows: Sequence[Row], source: str, id_column: str | None) -> list[str]:
    """The cells of --id_column, each of which must occur once; without it, the numbers of the rows from 0."""
    if id_column is None:
        return [str(number) for number in range(len(rows))]
    require_columns([id_column], columns_of(rows), source, "--id_column")
    ids: dict[str, None] = {}
    for number, row in enumerate(rows, 1):
        if row.get(id_column) in (None, "") or str(row[id_column]) in ids:
            raise InputError(
                f"{source}, data row {number}, column {id_column!r}: the id is missing or occurs in an earlier row. "
                "Give every row an id of its own, or drop --id_column."
            )
        ids[str(row[id_column])] = None
    return list(ids)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns a failure to read a file into an InputError that names file and line."""
    try:
        open(path, "rb").close()
        yield
    except OSError as error:
        raise InputError(f"{path}: {why_unreadable(error)}.") from None
    except UnicodeDecodeError:
        line, byte = _first_not_utf8(path)
        remedy = f"Save the file as UTF-8, for example with `iconv -f latin1 -t utf-8 {path.name}`."
        raise InputError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8. {remedy}") from None


def _first_not_utf8(path: Path) -> tuple[int, int]:
    """Line and byte; the decoder that failed reads ahead, so it does not know the line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, line[error.start]
    raise AssertionError(f"{path} is UTF-8")


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        # strict: otherwise a quote that is never closed would swallow the rest of the file as one cell.
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            header = reader.fieldnames or []
            if len(set(header)) != len(header):
                raise InputError(f"{path}, line 1: two columns have the same name. Rename one: {', '.join(header)}.")
            line = 2
            for row in reader:
                line = reader.line_num + 1
                if None in row or None in row.values():
                    raise InputError(
                        f"{path}, line {reader.line_num}: the row has {'more' if None in row else 'fewer'} fields than "
                        f"the header's {len(header)}. Put quotes around fields that contain a separator."
                    )
                yield row
        except csv.Error as error:
            remedy = "A field in quotes must end with a quote, and quotes inside it are doubled."
            raise InputError(f"{path}, line {line}: not readable as CSV: {error}. {remedy}") from None


def _read_json(path: Path) -> list[Row]:
    text = path.read_bytes().decode("utf-8-sig")
    rows = _parse_json(text, path) if text.strip() else []
    _check_rows(rows, path)
    return rows


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = _parse_json(line, path, number)
                _check_rows([row], path)
                yield row


def _parse_json(text: str, path: Path, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        extra = error.msg == "Extra data"
        remedy = "Name a file with one object per line .jsonl." if extra else "Correct it there."
        raise InputError(f"{path}, line {line or error.lineno}: not valid JSON: {error.msg}. {remedy}") from None


def _check_rows(rows: Any, path: Path) -> None:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f'{path}: expected a list of objects, one per row, such as [{{"text": ..., "label": ...}}].')


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a complete Parquet file ({reason}). Copy or save it again.") from None
