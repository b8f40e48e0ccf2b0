"""A JSONL file of answers, one line per row of an input file, that can be continued after a kill.

Beside `y.jsonl` is `y.jsonl.source.json`: the hash of the input, and everything else that decides the answers. Lines
are kept only if all of it is the same. Imports neither torch nor transformers.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.disk import lock, named, read_json, to_json, write_json
from common.errors import InputError
from common.log import Progress, is_first_process, say

if TYPE_CHECKING:
    from accelerate import Accelerator

Row = TypeVar("Row")
Line = dict[str, Any]
ADVICE = "Delete it, or name another --output_file."
CHUNK = 4  # batches that are answered, and written, together


class AnswerFile:
    """The answers to rows with these ids, in their order.

    source: gives what the answers are made from; called once the place is known to be good. done: the number of rows
    that have a complete line.
    Raises InputError if the file cannot be written, is being written by another process, or belongs to something else.
    Before `start` nothing is written but a lock, which the first process holds until it ends.
    """

    def __init__(self, path: str | Path, ids: Sequence[str], source: Callable[[], dict[str, Any]]) -> None:
        self.path, self.ids = Path(path), list(ids)
        self.source_path = self.path.with_name(f"{self.path.name}.source.json")
        if self.path.suffix != ".jsonl":
            raise InputError(f"--output_file {path}: answers are written as JSONL, so name it .jsonl.")
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise InputError(f"--output_file {path}: there is no folder {self.path.parent}. Make it, or name another.")
        if self.path.is_dir() or not os.access(self.path if self.path.exists() else folder, os.W_OK):
            raise InputError(f"--output_file {path}: it cannot be written. Choose a place that you may write to.")
        self.source = json.loads(json.dumps(source()))
        if is_first_process():
            self._lock = lock(self.path.with_name(f".{self.path.name}.lock"), f"--output_file {path}")
        self.done, self._bytes = self._complete_lines() if self.path.exists() else (0, 0)

    def _complete_lines(self) -> tuple[int, int]:
        """The number of complete lines, and their bytes; a kill may have left a part of another one after them."""
        if not self.path.stat().st_size:
            return 0, 0
        if not read_json(self.source_path):
            raise InputError(f"--output_file {self.path}: the file was not written by inference.py. {ADVICE}")
        self._refuse_others()
        done = size = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if done >= len(self.ids) or _id(line) != self.ids[done]:
                    raise InputError(
                        f"--output_file {self.path}, line {done + 1}: not the answer to this row. {ADVICE}"
                    )
                done, size = done + 1, size + len(line)
        return done, size

    def _refuse_others(self) -> None:
        before = read_json(self.source_path)
        if changed := [name for name, value in self.source.items() if value and before.get(name) != value]:
            raise InputError(
                f"--output_file {self.path} holds answers made otherwise (other {', '.join(changed)}; see "
                f"{self.source_path.name}). {ADVICE}"
            )

    def note(self, name: str, value: str) -> None:
        """Fills in what of the source was empty, as it was not known. Raises InputError where lines differ in it."""
        self.source[name] = value
        if self.done:
            self._refuse_others()

    def start(self) -> None:
        """Opens the file after its complete lines; notes what the answers are made from."""
        write_json(self.source_path, self.source)
        self._file = open(self.path, "ab")  # noqa: SIM115
        self._file.truncate(self._bytes)

    def write(self, answers: Sequence[Line]) -> None:
        """Writes lines for the next rows, each with its row's id first."""
        with named(self.path):
            for answer in answers:
                line = to_json({"id": self.ids[self.done], **answer})
                self._file.write(line.encode() + b"\n")
                self.done += 1
            self._file.flush()

    def close(self) -> None:
        self._file.close()
        self._lock.release(force=True)


def write_answers(
    out: AnswerFile,
    rows: Sequence[Row],
    answer: Callable[[Sequence[Row], int, Progress], list[Line]],
    batch_size: int,
    accelerator: "Accelerator",
) -> None:
    """Answers the rows that the file lacks, chunk by chunk, and writes them in order.

    A chunk is answered by one process and always has the same rows, so neither the number of processes nor a kill
    changes a batch, and so no answer. answer: (rows, number of the chunk, progress) -> lines; a process that has no
    chunk left is asked to answer no rows as long as others have.
    """
    from accelerate.utils import gather_object  # imports torch

    size, kept = CHUNK * batch_size, out.done
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    first = kept // size
    own = chunks[first + accelerator.process_index :: accelerator.num_processes]
    progress = Progress(accelerator, "answers", sum(map(len, own)))
    accelerator.wait_for_everyone()  # all have read what is there, before anything is written
    if accelerator.is_main_process:
        out.start()
    started, tokens, errors = time.perf_counter(), 0, 0
    skip = kept % size  # lines of the first chunk that are there
    for start in range(first, len(chunks), accelerator.num_processes):
        number = start + accelerator.process_index
        lines = gather_object(answer(chunks[number] if number < len(chunks) else [], number, progress))
        tokens += sum(line.get("tokens", 0) for line in lines)
        errors += sum("error" in line for line in lines)
        if accelerator.is_main_process:
            out.write(lines[skip:])
        skip = 0
    progress.close()
    if accelerator.is_main_process:
        out.close()
    seconds, done = time.perf_counter() - started, len(rows) - first * size
    if kept:
        say(accelerator, f"{kept} rows had been answered and were kept.")
    if kept < len(rows):
        rate = f"{done / seconds:.2f} rows/s" + (f", {tokens / seconds:.1f} tokens/s" if tokens else "")
        say(accelerator, f"{done} rows in {seconds:.1f} s: {rate}")
    if errors:
        say(accelerator, f"{errors} rows could not be answered; their lines say why, under error.")
    say(accelerator, f"Written to {out.path}")


def _id(line: bytes) -> Any:
    try:
        return json.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        return None
