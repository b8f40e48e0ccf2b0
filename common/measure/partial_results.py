"""An evaluation that continues after a kill: the results of rows are on disk as soon as they are there."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from common.disk import named, to_json
from common.log import say

Row = TypeVar("Row")
Result = TypeVar("Result")
CHUNK = 16  # batches of rows, whose results are written together


def measure_in_chunks(
    measure: Callable[..., list[Result]],
    rows: Sequence[Row],
    *,
    file: Path,
    source: dict[str, Any],
    batch_size: int,
    accelerator: Accelerator,
    what: str,
    restore: Callable[[Any], Result],
) -> tuple[list[Result], float]:
    """The results of all rows, in their order, on every process; those that are in `file` are not computed again.

    And the seconds that it took, those before a kill included.

    measure: (rows, what=caption of the progress bar) -> their results, on every process. A chunk always has the same
    rows, so a kill changes no batch, and so no result. source: what the results are made from; those of anything else
    are dropped. restore: makes a result of its JSON. The file is deleted once all are there.
    """
    chunks = _complete_chunks(file, source)
    results = [restore(line) for chunk in chunks for line in chunk["results"]]
    seconds = sum(chunk["seconds"] for chunk in chunks)
    accelerator.wait_for_everyone()  # all have read what is there, before anything is written
    if results:
        say(accelerator, f"{len(results)} rows had been evaluated before, and are kept.")
    for start in range(0, len(rows), CHUNK * batch_size):
        end = min(len(rows), start + CHUNK * batch_size)
        if end <= len(results):
            continue
        caption = what if end - start == len(rows) else f"{what}, rows {start + 1} to {end} of {len(rows)}"
        started = time.perf_counter()
        results += measure([rows[i] for i in range(start, end)], what=caption)
        took = time.perf_counter() - started
        seconds += took
        if accelerator.is_main_process:
            _append(file, source, start, results[start:], took)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        file.unlink(missing_ok=True)
    return results, seconds


def _append(file: Path, source: dict[str, Any], start: int, results: Sequence[Any], seconds: float) -> None:
    """One line per chunk: a kill leaves it complete, or without its end."""
    if not start:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_json(source) + "\n", encoding="utf-8")
    with named(file), open(file, "r+b") as lines:
        content = lines.read()
        lines.seek(content.rfind(b"\n") + 1)
        lines.truncate()
        values = [getattr(result, "__dict__", result) for result in results]
        lines.write(to_json({"start": start, "seconds": seconds, "results": values}).encode() + b"\n")


def _complete_chunks(file: Path, source: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks in the file, if they are of this source: seconds and results of each."""
    if not file.is_file():
        return []
    try:
        first, *chunks = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]  # the last one has no end
    except ValueError:  # empty, or damaged
        return []
    if first != json.loads(to_json(source)):
        return []
    found, rows = [], 0
    for chunk in chunks:
        if chunk["start"] == rows:  # another process with the same options may have written it as well
            found.append(chunk)
            rows += len(chunk["results"])
    return found
