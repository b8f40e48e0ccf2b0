"""What inference.py is asked: the rows of an input file, or the questions of --demo; and what decides their answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.data.classification import unlabeled_rows
from common.data.conversations import DEMO, read_columns, read_question, read_row
from common.data.files import columns_of, file_hash, read_rows, require_columns, row_ids, text_columns, text_in
from common.options import CAUSAL_LM, CLASSIFICATION, binding_options
from common.use.runs import Run

OPENINGS = ("In a shocking discovery,", "The first thing to know is", "It was a cold morning when")


def read_input(config: Any, run: Run) -> tuple[list[str], Sequence[Any]]:
    """The ids of the rows of --input_file, and what each asks: turns, a text, or an Example.

    config: of inference.py. Raises InputError that names file, row and column for what cannot be answered.
    """
    rows = read_rows(config.input_file, blank_lines=True)  # as the answers are joined to the rows by their numbers
    ids = row_ids(rows, config.input_file, config.id_column)
    if run.task == CLASSIFICATION:
        return ids, unlabeled_rows(rows, ids, config.input_file, text_columns(columns_of(rows), config.text_fields))
    if run.task == CAUSAL_LM:
        names = config.text_fields or ["prompt" if all("prompt" in row for row in rows) else "text"]
        unlabeled_rows(rows, ids, config.input_file, names)  # checks columns and cells
        return ids, ["\n".join(filter(None, (text_in(row.get(name), "") for name in names))) for row in rows]
    renamed, system = read_columns(config.columns or []), config.system_prompt or run.trained.get("system_prompt")
    require_columns(renamed.values(), columns_of(rows), config.input_file, "--columns")
    where = f"{config.input_file}, data row"
    return ids, [read_question(row, f"{where} {number}", renamed, system) for number, row in enumerate(rows, 1)]


def made_from(config: Any, run: Run) -> dict[str, Any]:
    """What decides the answers to a file: its rows, the weights (of a base that is not fetched, none), the options."""
    source = run.folder or Path(config.model)
    files = [*source.glob("*.safetensors"), source / "task.json"] if source.is_dir() else []
    weights = {"model": None if run.folder else config.model, "revision": config.revision}
    weights |= {file.name: file_hash(file) for file in sorted(files) if file.is_file()}
    options = {name: value for name, value in binding_options(config).items() if name not in ("model", "revision")}
    for name in ("chat_template", "prompt_template"):
        if options[name] and Path(options[name]).is_file():
            options[name] = file_hash(options[name])
    base = run.base_fingerprint()
    return {"input file": file_hash(config.input_file), "weights": weights, "base": base, "options": options}


def demo_questions(task: str) -> list[str]:
    """What --demo asks: the single questions of the demo data's test split, or beginnings of texts."""
    if task == CAUSAL_LM:
        return list(OPENINGS)
    turns = [read_row(row, "demo")[1] for row in read_rows(next(DEMO.glob("test.*")))]
    return [messages[0]["content"] for messages in turns if len(messages) == 2][:5]
