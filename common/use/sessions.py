"""What inference.py does with a loaded model: rows of a file, one answer, a chat, or several models side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from accelerate import Accelerator

from common.data.classification import Example
from common.model.base_model import precision
from common.model.sharding import lock_step
from common.options import Sampling
from common.use import terminal
from common.use.answer_file import AnswerFile, write_answers
from common.use.label_models import LabelModel, Prediction
from common.use.text_models import TextModel

Batch = tuple[AnswerFile, Sequence[Any]]  # the file, and the rows that it answers


def answer_labels(
    config: Any, model: LabelModel, instruction: str | None, batch: Batch | None, accelerator: Accelerator
) -> None:
    """Labels for the rows of a file, for one text, or for what is typed. config: of inference.py."""
    size = config.per_device_eval_batch_size

    def label(text: str) -> Iterator[str]:
        yield show_labels(model.classify([text], size, config.min_probability)[0])

    def lines(rows: Sequence[Example], chunk: int, progress: Any) -> list[dict[str, Any]]:
        with precision(model.device, model.precision), lock_step(model.classifier.model):
            return model.answer_rows(rows, size, config.min_probability, progress)

    if batch:
        write_answers(*batch, lines, size, accelerator)
    elif instruction is not None:
        terminal.show(label(instruction))
    else:
        terminal.greet("Every text that you type is classified.")
        terminal.answer_lines(label)


def answer_texts(
    config: Any, model: TextModel, instruction: str | None, batch: Batch | None, accelerator: Accelerator
) -> None:
    """Texts for the rows of a file, one text, or a chat. config: of inference.py."""
    size, seeded = config.per_device_eval_batch_size, list[int]()
    sampling = Sampling(**{item.name: getattr(config, item.name) for item in fields(Sampling)})

    def lines(rows: Sequence[Any], chunk: int, progress: Any) -> list[dict[str, Any]]:
        with precision(model.device, model.precision), lock_step(model.model):
            return model.answer_rows(rows, replace(sampling, seed=(config.seed + chunk) % 2**32), size, progress)

    def answer(question: Any, settings: Sampling) -> Iterator[str]:
        if seeded != [settings.seed]:  # set, or changed by /params; a question repeated continues the sampling
            seeded[:] = [settings.seed]
            torch.manual_seed(settings.seed)
        yield from model.pieces(question, settings)

    if batch:
        write_answers(*batch, lines, size, accelerator)
    elif instruction is not None:
        if terminal.show(answer(model.turns(instruction), sampling))[1]:
            raise KeyboardInterrupt
    elif model.template is None:
        terminal.greet("Every text is continued.")
        terminal.answer_lines(lambda text: answer(text, sampling))
    else:
        terminal.greet("/help lists the commands.")
        terminal.Chat(answer, sampling, model.system).run()


def side_by_side(models: Sequence[tuple[str, TextModel]], questions: Sequence[str], sampling: Sampling) -> None:
    """Every named model's answer to every question, as it is written."""
    for question in questions:
        print(f"\n> {question}", flush=True)
        for name, model in models:
            print(f"\n[{name}]", flush=True)
            torch.manual_seed(sampling.seed)
            if terminal.show(model.pieces(model.turns(question), sampling))[1]:
                raise KeyboardInterrupt


def show_labels(answer: Prediction) -> str:
    """An answer in labels, for people: the prediction, then the likeliest labels."""
    found = answer.prediction
    if answer.error:
        return f"({answer.error})"
    first = "(abstains)" if answer.abstained else ", ".join(found) or "(no label)" if isinstance(found, list) else found
    likeliest = sorted(answer.probabilities.items(), key=lambda pair: -pair[1])[:10]
    return "\n".join([str(first), *(f"  {p:.3f}  {label}" for label, p in likeliest)])
