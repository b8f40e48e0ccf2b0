"""A file -> its rows, as text wherever the file has text; and what all kinds of rows share: columns and ids.

Imports neither torch nor transformers: whatever is wrong with a file is reported before a model is loaded.
"""

import contextlib
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import InputError, why_unreadable

Row = dict[str, Any]  # column -> cell
UTF_16 = "UTF-16. Save it as UTF-8, for example with `iconv -f utf-16 -t utf-8 {name}`"
TWICE = "an object has twice the name"
EXAMPLE = '{"text": ..., "label": ...}'
OTHER_KINDS = {  # first bytes -> what the file is, and the remedy
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
    b"\x1f\x8b": "compressed by gzip. Unpack it, for example with `gzip -dc {name}`",
    b"PK\x03\x04": "a ZIP archive or a workbook (.xlsx). Unpack it, or save the sheet as CSV in UTF-8",
    b"PAR1": "Parquet. Rename it, ending in .parquet",
    b"\xd0\xcf\x11\xe0": "an old workbook (.xls). Save the sheet as CSV in UTF-8",
}


def read_rows(path: str | Path, blank_lines: bool = False) -> list[Row]:
    """The rows of a CSV, TSV, JSON, JSONL or Parquet file; cells of CSV and TSV stay text as written.

    blank_lines: of a CSV or TSV file of one column, such a line between others is a row with an empty cell.
    """
    rows = list(iterate_rows(path, blank_lines))
    if not rows:
        raise InputError(f"{path}: the file has no rows. It needs at least one, in CSV and TSV under a header line.")
    return rows


def iterate_rows(path: str | Path, blank_lines: bool = False, others: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of `read_rows` one by one: memory does not grow with the file, unless it is .json, a single value.

    others: endings of files that the caller reads itself, for the error.
    """
    path = Path(path)
    tabular = partial(_read_csv, blank_lines=blank_lines)
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".csv": tabular,
        ".tsv": tabular,
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: unknown file type {path.suffix!r}; use one of {', '.join([*readers, *others])}.")
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


def text_in(cell: Any, where: str) -> str:
    """The text of a cell; "" for None and NaN. Raises InputError for bytes, lists and objects."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bytes | list | dict):
        kind = {bytes: "bytes", list: "a list", dict: "an object"}[type(cell)]
        raise InputError(f"{where}: expected a text, not {kind}. Write it as text, or name another column.")
    return "" if cell is None or cell != cell else str(cell)  # NaN is not itself


def row_ids(rows: Sequence[Row], source: str, id_column: str | None) -> list[str]:
    """The cells of --id_column, each of which must occur once; without it, the numbers of the rows from 0."""
    if id_column is None:
        return [str(number) for number in range(len(rows))]
    require_columns([id_column], columns_of(rows), source, "--id_column")
    ids: dict[str, None] = {}
    for number, row in enumerate(rows, 1):
        where = f"{source}, data row {number}, column {id_column!r}"
        id = text_in(row.get(id_column), where)
        if not id or id in ids:
            raise InputError(
                f"{where}: the id is missing or occurs in an earlier row. Give every row an id of its own, or drop "
                "--id_column."
            )
        ids[id] = None
    return list(ids)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hashes(folder: Path) -> dict[str, str]:
    """The files of the weights in a folder, each with its SHA-256."""
    return {file.name: file_hash(file) for file in sorted(folder.glob("*.safetensors"))}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns a failure to read a file into an InputError that names file and line."""
    try:
        with open(path, "rb") as file:
            _check_kind(path, file.read(4))
        yield
    except OSError as error:
        raise InputError(f"{path}: {why_unreadable(error)}.") from None
    except UnicodeDecodeError:
        line, byte = _first_not_utf8(path)
        remedy = f"Save the file as UTF-8, for example with `iconv -f windows-1252 -t utf-8 {path.name}`."
        raise InputError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8. {remedy}") from None


def _check_kind(path: Path, start: bytes) -> None:
    """Refuses a file of text that begins like one of another kind."""
    for mark, kind in OTHER_KINDS.items():
        if start.startswith(mark) and path.suffix.lower() != ".parquet":
            raise InputError(f"{path}: the file is {kind.format(name=path.name)}.")


def _first_not_utf8(path: Path) -> tuple[int, int]:
    """Line and byte; the decoder that failed reads ahead, so it does not know the line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, line[error.start]
    raise AssertionError(f"{path} is UTF-8")


def _read_csv(path: Path, blank_lines: bool) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        # strict: otherwise a quote that is never closed would swallow the rest of the file as one cell.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line, blank = 1, 0
        try:
            header = next((cells for cells in reader if cells), [])
            line = reader.line_num
            _check_header(header, f"{path}, line {max(line, 1)}", delimiter)
            line += 1
            for cells in reader:
                line = reader.line_num + 1
                if not cells:
                    blank += blank_lines and len(header) == 1
                    continue
                if len(cells) != len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: the row has "
                        f"{'more' if len(cells) > len(header) else 'fewer'} fields than the header's {len(header)}. "
                        "Put quotes around fields that contain a separator."
                    )
                if delimiter == "\t" and any(_joins_rows(cell, len(header)) for cell in cells):
                    raise InputError(
                        f"{path}, line {reader.line_num}: a field in quotes looks like several rows, as where a quote "
                        "that is text joins them. Double quotes inside a field and put it in quotes, or save the file "
                        "as CSV."
                    )
                yield from [{header[0]: ""}] * blank
                yield dict(zip(header, cells, strict=True))
                blank = 0
        except csv.Error as error:
            remedy = "A field in quotes must end with a quote, and quotes inside it are doubled."
            raise InputError(f"{path}, line {line}: not readable as CSV: {error}. {remedy}") from None


def _joins_rows(cell: str, columns: int) -> bool:
    """Whether a line of the cell has the tabs of a row of several columns, and not as its indentation."""
    lines = cell.split("\n")
    return len(lines) > 1 and 1 < columns <= max(line.lstrip("\t").count("\t") for line in lines) + 1


def _check_header(names: Sequence[str], where: str, delimiter: str = "") -> None:
    """delimiter: of a file of text; empty: Parquet."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        if twice == [""]:
            raise InputError(f"{where}: columns without a name. Name or delete them: {', '.join(names)}.")
        raise InputError(f"{where}: two columns have the same name. Rename one: {', '.join(names)}.")
    other = next((mark for mark in ";\t" if mark in "".join(names)), None)
    if other and delimiter == "," and len(names) == 1:
        raise InputError(f"{where}: the columns seem to be separated by {other!r}. Save the file with commas.")


def _read_json(path: Path) -> list[Row]:
    text = path.read_bytes().decode("utf-8-sig")
    try:
        rows = parse_json(text) if text.strip() else []
    except json.JSONDecodeError as error:
        remedy = "Name a file with one object per line .jsonl." if error.msg == "Extra data" else "Correct it there."
        raise InputError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}. {remedy}") from None
    except ValueError as error:
        raise InputError(f"{path}, data row {_first_bad_row(text)}: {error}. Correct the row.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a list of objects, one per row, such as [{EXAMPLE}].")
    return rows


def _first_bad_row(text: str) -> int:
    """Where `parse_json` fails in a list of objects."""
    decoder, number, start = json.JSONDecoder(), 1, 0
    while True:
        begin = re.compile(r"[\s,\[]*").match(text, start).end()
        try:
            start = decoder.raw_decode(text, begin)[1]
            parse_json(text[begin:start])
        except (ValueError, RecursionError):
            return number
        number += 1


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = parse_json(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}, line {number}: not valid JSON: {error.msg}. Correct it there.") from None
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: {error}. Correct it there.") from None
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: expected an object, such as {EXAMPLE}.")
                yield row


def parse_json(text: str) -> Any:
    """The value that a text spells. Raises ValueError with the reason: of JSON that is not valid, a JSONDecodeError.

    An object that has a name twice is refused, as one of the values would be lost.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        twice = str(error).startswith(TWICE)  # else of Python's own limit
        raise ValueError(str(error) if twice else "a number has too many digits") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{TWICE} {next(name for name in names if names.count(name) > 1)!r}")
    return found


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_header(file.schema_arrow.names, str(path))
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a complete Parquet file ({reason}). Copy or save it again.") from None
    # A date outside Python's years, a struct with a name twice, a time zone that is not known.
    except (OverflowError, ValueError, KeyError) as error:
        raise InputError(f"{path}: a column cannot be read ({error}). Write only the columns that you need.") from None
