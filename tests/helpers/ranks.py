"""Data that processes cannot share out evenly: every shape is trained on, evaluated, and answered row by row.

    PYTHONPATH=.:tests torchrun --nproc_per_node 2 tests/helpers/ranks.py FOLDER MODEL
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from helpers.rows import chats, toy_rows, write_csv, write_jsonl
from helpers.runs import timeless, train, train_chat, train_text

SCRIPTS = {"cls": train, "sft": train_chat, "clm": train_text}
WORLD = 2
LONG = 300  # words of a row beside which the others are short; more than fit


class Shape(NamedTuple):
    """rows: of train, validation and test. batch: rows of a micro-batch. accumulation: micro-batches of each of WORLD
    processes in an update; one process alone makes as many as all of them. kept: answers of a file that are there.
    """

    script: str
    rows: tuple[int, int, int]
    batch: int = 1
    accumulation: int = 1
    long: bool = False  # whether the first row is
    options: tuple[str, ...] = ()
    kept: int = 0


HEAD, MASKED, PACKED = ("--approach", "head"), ("--document_masking", "true"), ("--packing", "true")
SHAPES = [
    Shape("cls", (3, 1, 1)),  # the second update has one row
    Shape("cls", (2, 1, 3), batch=4, options=HEAD),
    Shape("cls", (3, 2, 5), batch=2, kept=1),
    Shape("cls", (5, 7, 2), batch=2, accumulation=2, options=HEAD),
    Shape("cls", (7, 3, 1), batch=3, long=True, kept=7),
    Shape("cls", (11, 5, 7), batch=2, accumulation=3, options=("--shared_prefix", "on")),
    Shape("cls", (13, 1, 17), batch=5, long=True, options=(*HEAD, "--class_weights", "balanced"), kept=4),
    Shape("sft", (1, 2, 1), batch=3),
    Shape("sft", (2, 1, 1), long=True),
    Shape("sft", (3, 5, 2), batch=2, accumulation=2, kept=3),
    Shape("sft", (5, 1, 3), batch=4, options=PACKED),
    Shape("sft", (7, 2, 7), batch=2, accumulation=2, long=True, options=PACKED, kept=5),
    Shape("sft", (13, 3, 5), batch=3, options=("--loss_on", "all")),
    Shape("clm", (1, 1, 1), batch=2),
    Shape("clm", (2, 1, 2), accumulation=4),
    Shape("clm", (3, 2, 1), batch=2, options=MASKED, kept=2),
    Shape("clm", (5, 3, 7), batch=4, accumulation=2),
    Shape("clm", (7, 1, 3), accumulation=3, long=True, options=MASKED),
    Shape("clm", (11, 5, 5), batch=3, options=("--stride", "20"), kept=10),
    Shape("clm", (17, 7, 2), batch=5, accumulation=2, long=True, kept=16),
]  # fmt: skip


def write_data(folder: Path, shape: Shape) -> list[str]:
    """The data options of a shape, whose files are written."""
    options = []
    folder.mkdir(parents=True)
    for split, count, start in zip(("train", "validation", "test"), shape.rows, (0, 20, 40), strict=True):
        rows: list[dict[str, Any]]
        if shape.script == "cls":
            rows = toy_rows(count, start=start)[:count]
            for row in rows[: shape.long]:
                row["text"] += " quark" * LONG
            file = str(write_csv(folder / f"{split}.csv", rows))
        elif shape.script == "sft":
            rows = chats(count, start)
            for row in rows[: shape.long]:
                row["messages"][0]["content"] += " quark" * LONG
            file = write_jsonl(folder / f"{split}.jsonl", rows)
        else:  # rows are blocks, of 32 tokens, most of two documents; the last one of the test split is short
            rows = [{"text": row["text"]} for row in toy_rows(2 * count, start=start)[: 2 * count]]
            for row in rows[: shape.long and split != "test"]:
                row["text"] += " quark" * LONG
            file = write_jsonl(folder / f"{split}.jsonl", rows)
        options += [f"--{split}_file", file]
    if shape.script == "cls":
        options += ["--labels", "sport", "science", "music"]
    if shape.script == "clm":
        options += ["--max_train_samples", str(shape.rows[0]), "--max_eval_samples", str(shape.rows[1])]
    return options


def run_shapes(folder: Path, model: str) -> list[dict[str, Any]]:
    """The figures of every shape that every process returns; the runs are in FOLDER/<number of the shape>."""
    from accelerate import Accelerator

    from common.measure import perplexity
    from common.use.answer_file import AnswerFile, write_answers

    perplexity.SAMPLE_TOKENS = 1  # every process draws the sample for itself

    found = []
    world = Accelerator(cpu=True).num_processes
    for number, shape in enumerate(SHAPES):
        out = folder / str(number)
        sizes = [shape.batch, "--gradient_accumulation_steps", shape.accumulation * WORLD // world]
        data = json.loads((folder.parent / f"data_{number}.json").read_text())
        figures = SCRIPTS[shape.script](
            "--model", model, *data, "--per_device_train_batch_size", *sizes, "--per_device_eval_batch_size",
            shape.batch, "--num_train_epochs", 1, "--lora_dropout", 0, "--save_strategy", "no", *shape.options,
            "--output_dir", out, last=False,
        )  # fmt: skip
        ids = [str(i) for i in range(shape.rows[0])]
        accelerator = Accelerator(cpu=True)
        if shape.kept and accelerator.is_main_process:
            lines = [json.dumps({"id": i, "row": i, "chunk": -1}) + "\n" for i in ids[: shape.kept]]
            (out / "answers.jsonl").write_text("".join(lines))
            (out / "answers.jsonl.source.json").write_text('{"shape": "this"}')
        accelerator.wait_for_everyone()
        file = AnswerFile(out / "answers.jsonl", ids, lambda: {"shape": "this"})
        write_answers(file, ids, lambda rows, chunk, _: [{"row": row, "chunk": chunk} for row in rows], shape.batch,
                      accelerator)  # fmt: skip
        found.append({name: value for name, value in timeless(figures).items() if name not in ("source", "weights")})
    return found


if __name__ == "__main__":
    from accelerate import PartialState

    out, given = Path(sys.argv[1]), sys.argv[2]
    results = run_shapes(out, given)
    (out / f"rank_{PartialState().process_index}.json").write_text(json.dumps(results))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
