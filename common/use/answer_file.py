"""A JSONL file of answers, one line a row of an input file, that can be gone on with after a kill.

Beside `y.jsonl` stands `y.jsonl.source.json`: the input's hash, and everything that decides what is answered. Lines are
kept only where all of it is the same. Imports neither torch nor transformers.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.disk import read_json, write_json
from common.errors import InputError

CHUNK = 4  # batches that are answered, and written, together


class AnswerFile:
    """The answers to rows with these ids, in their order.

    source: what the answers are made from. done: how many rows have a whole line.
    Raises InputError where the file cannot be written or belongs to something else. Writes nothing before `start`.
    """

    def __init__(self, path: str | Path, ids: Sequence[str], source: dict[str, Any]) -> None:
        self.path, self.ids, self.source = Path(path), list(ids), json.loads(json.dumps(source))
        self.note = self.path.with_name(f"{self.path.name}.source.json")
        if self.path.suffix != ".jsonl":
            raise InputError(f"--output_file {path}: answers are written as JSONL, so name it .jsonl.")
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise InputError(f"--output_file {path}: there is no folder {self.path.parent}. Make it, or name another.")
        if self.path.is_dir() or not os.access(self.path if self.path.exists() else folder, os.W_OK):
            raise InputError(f"--output_file {path}: it cannot be written. Choose a place that you may write to.")
        self.done, self._whole = self._kept() if self.path.exists() else (0, 0)

    def _kept(self) -> tuple[int, int]:
        """How many rows have a line, and the bytes of those lines; what a kill left of a further one is no line."""
        another = "Delete it, or name another --output_file."
        before = read_json(self.note)
        if not before and self.path.stat().st_size:
            raise InputError(f"--output_file {self.path}: the file was not written by inference.py. {another}")
        changed = [name for name in self.source if before and before.get(name) != self.source[name]]
        if changed:
            raise InputError(
                f"--output_file {self.path} holds answers made otherwise (other {', '.join(changed)}; see "
                f"{self.note.name}). {another}"
            )
        done = whole = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if done >= len(self.ids) or _id(line) != self.ids[done]:
                    raise InputError(
                        f"--output_file {self.path}, line {done + 1}: not the answer to this row. {another}"
                    )
                done, whole = done + 1, whole + len(line)
        return done, whole

    def start(self) -> None:
        """Opens the file behind its whole lines; notes what the answers are made from."""
        write_json(self.note, self.source)
        self._file = open(self.path, "ab")  # noqa: SIM115
        self._file.truncate(self._whole)

    def write(self, answers: Sequence[dict[str, Any]]) -> None:
        """Lines for the next rows, each with its row's id in front."""
        for answer in answers:
            line = json.dumps({"id": self.ids[self.done], **answer}, ensure_ascii=False)
            self._file.write(line.encode() + b"\n")
            self.done += 1
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def write_answers(
    out: AnswerFile,
    rows: Sequence[Any],
    answer: Callable[[Sequence[Any], int, Any], list[dict[str, Any]]],
    batch_size: int,
    accelerator: Any,
) -> None:
    """Answers the rows that the file lacks, chunk by chunk, and writes them in order.

    A chunk is answered by one process and always has the same rows, so neither the number of processes nor a kill
    changes a batch, and with it no answer. answer: (rows, number of the chunk, progress) -> lines.
    """
    from accelerate.utils import gather_object

    from common.log import Progress, say

    size = CHUNK * batch_size
    first, chunks = out.done // size, math.ceil(len(rows) / size)
    kept = out.done
    skip = kept - first * size
    mine = range(first + accelerator.process_index, chunks, accelerator.num_processes)
    progress = Progress(accelerator, "answers", sum(len(rows[i * size : (i + 1) * size]) for i in mine))
    accelerator.wait_for_everyone()  # all have read what is there, before anything is written
    if accelerator.is_main_process:
        out.start()
    started, tokens = time.perf_counter(), 0
    for turn in range(first, chunks, accelerator.num_processes):
        number = turn + accelerator.process_index
        some = rows[number * size : (number + 1) * size]
        lines = gather_object(answer(some, number, progress) if some else [])
        tokens += sum(line.get("tokens", 0) for line in lines)
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
    say(accelerator, f"Written to {out.path}")


def _id(line: bytes) -> Any:
    try:
        return json.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        return None
