"""Talks with a trained run or a base model, answers one instruction, or answers the rows of a file.

    python inference.py --run RUN                                        # a chat; /help lists its commands
    python inference.py "What is a mortgage?" --run RUN                  # one answer
    echo "What is a mortgage?" | python inference.py - --run RUN         # the same from a pipe
    python inference.py --run RUN --demo                                 # examples, base and tuned side by side
    python inference.py --compare RUN_A RUN_B base --prompt "Hello!"     # adapters of one base, loaded once
    python inference.py --run RUN --input_file in.csv --output_file out.jsonl      # a row each; goes on after a kill
    accelerate launch inference.py --run RUN --input_file in.csv --output_file out.jsonl   # on several GPUs

A chat run answers, a run on running text goes on with a text, a classification run gives a label and probabilities.
Without --run: the newest run under outputs/, else the embedded model.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from common import disk
from common.data.classification import Example, join_fields, unlabelled_rows
from common.data.conversations import DEMO, read_columns, read_question, read_row
from common.data.files import file_hash, read_rows, row_ids
from common.errors import InputError, cli_errors
from common.hub import EMBEDDED, resolve_model
from common.options import (
    ModelConfig,
    Sampling,
    check_answers,
    check_sampling,
    from_texts,
    option,
    parse_given,
    read_yaml,
)
from common.text.prompts import read_template
from common.use import terminal
from common.use.answer_file import AnswerFile, write_answers
from common.use.terminal import choose_persona

# torch and what stands on it is imported inside the functions: options and files are checked before, in a moment.

OWN = {  # task -> the options that only it has
    "chat": {"chat_template", "system_prompt", "persona", "columns", "demo", "compare"}
    | {item.name for item in fields(Sampling)},
    "causal_lm": {"text_fields", "demo", "compare"} | {item.name for item in fields(Sampling)},
    "classification": {"text_fields", "labels", "prompt_template", "max_length", "min_probability"},
}
SETTLED = {item.name for item in fields(ModelConfig)} | {"task", "labels", "prompt_template", "max_length"}
OPENINGS = ("In a shocking discovery,", "The first thing to know is", "It was a cold morning when")


@dataclass
class Config(ModelConfig, Sampling):
    """inference"""

    positional: ClassVar[tuple[str, str]] = ("instruction", "answered once; - reads it from a pipe. Put it first")

    run: str | None = option(None, "run folder, adapter folder, merged model folder, or base model")
    task: Literal["chat", "causal_lm", "classification"] | None = option(
        None, "for a base model; unset: classification with --labels, else chat"
    )
    prompt: str | None = option(None, "the instruction, as an option")
    demo: bool = option(False, "examples, base and tuned side by side", flag=True)
    compare: list[str] | None = option(None, "runs of one base, and `base`: the answer of each to --prompt")
    input_file: str | None = option(None, "CSV, TSV, JSON, JSONL or Parquet: a row each is answered")
    output_file: str | None = option(None, "the answers, as JSONL; goes on with the rows that are missing")
    id_column: str | None = option(None, "column that names the rows; unset: their number, from 0")
    columns: list[str] | None = option(None, "odd column names, as instruction=question; unset: the usual names")
    text_fields: list[str] | None = option(
        None, "columns of the text; unset: as trained, else text, or title, abstract"
    )
    chat_template: str | None = option(None, "chatml, alpaca, plain, or a Jinja file; unset: the model's own")
    system_prompt: str | None = option(None, "system turn; unset: as trained")
    persona: str | None = option(None, "system turn from data/personas.yaml, by name")
    min_probability: float | None = option(
        None, "no prediction where the label (of several: the least sure decision) has less", at_least=0, at_most=1
    )
    labels: list[str] | None = option(None, "for a base model: the label set in order")
    prompt_template: str | None = option(None, "for a base model: file with {text}, {labels} and {label}")
    max_length: int = option(256, "for a base model: tokens of a text with its instruction and label", at_least=1)
    per_device_eval_batch_size: int = option(8, "rows answered together", at_least=1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "unset: as trained; for a base model, bf16")
    num_threads: int | None = option(None, "CPU threads; unset: cores / processes on this machine", at_least=1)
    tf32: bool = option(False, "TF32 products on NVIDIA GPUs for what runs in fp32")


def read_options() -> tuple[Config, Path | None, dict[str, Any]]:
    """The options, the folder of trained weights (None: a base model), and what its task.json says."""
    given = parse_given(Config)
    if "instruction" in given:
        if "prompt" in given:
            raise InputError("The instruction is given twice: drop --prompt.")
        given["prompt"] = given.pop("instruction")
    if "compare" in given and "run" in given:
        raise InputError("--compare names its runs itself: drop --run.")
    named = given.get("run") or next((run for run in given.get("compare", ()) if run != "base"), None)
    run = Path(named) if named else disk.newest_run()
    if disk.is_base_model(run):
        name = named or EMBEDDED
        if "compare" in given:
            raise InputError(f"--compare: {name} is no folder of a run. Name runs, and `base` for their base model.")
        if given.get("model", name) != name:
            raise InputError(f"--model {given['model']}: inference.py takes the model by --run.")
        task = {"task": given.get("task", "classification" if "labels" in given else "chat")}
        config, folder = from_texts(Config, {**given, "model": name, "task": task["task"]}), None
    else:
        folder = disk.weights_folder(run)
        task = disk.load_task(folder)
        for name in sorted(SETTLED & given.keys()):
            raise InputError(f"--{name} was settled when {run} was trained: drop it.")
        saved = folder.parent / "config.yaml" if folder.name in ("adapter", "model") else folder / "config.yaml"
        fields_then = read_yaml(saved).get("text_fields") if saved.is_file() else None
        if task["task"] != "chat" and fields_then:
            given.setdefault("text_fields", fields_then)
        config = from_texts(Config, {**given, "run": str(run), "task": task["task"]})
        config.mixed_precision = config.mixed_precision or task["mixed_precision"]
    if task["task"] not in OWN:
        raise InputError(f"--task {task['task']}: expected {', '.join(OWN)}.")
    for name in given:
        if name not in OWN[task["task"]] and any(name in own for own in OWN.values()):
            raise InputError(
                f"--{name} does not belong to {task['task']}, which {run or EMBEDDED} is used for: drop it."
            )
    check_sampling(config)
    check_answers(config)
    if task["task"] == "classification" and folder is None and not config.labels:
        raise InputError(f"--task classification: {config.model} is a base model, so name the labels with --labels.")
    if config.input_file is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("Several processes share the rows of an --input_file; for a chat, start one.")
    if config.persona:
        config.system_prompt = choose_persona(config.persona).system_prompt
    return config, folder, task


def load_labeller(config: Config, folder: Path | None, path: str, accelerator: Any) -> Any:
    """The classifier of a run, or a base model that is asked with the instruction."""
    from common.model import base_model, classifier, storage
    from common.model.classifier import Classifier

    if folder:
        return storage.load_classifier(folder, accelerator.device, config.mixed_precision)
    base_model.check_length(path, config, config.max_length, "--max_length")
    tokenizer = base_model.load_tokenizer(path, config)
    template = read_template(config.prompt_template, "generative")
    prompt = classifier.classification_prompt(
        tokenizer, False, labels=config.labels, multi_label=False, template=template, max_length=config.max_length
    )
    model, _ = base_model.load_base(path, config, device=accelerator.device)
    return Classifier(model.eval(), prompt, tokenizer, False, False, [0.5] * len(config.labels))


def label_rows(classifier: Any, examples: Sequence[Example], accelerator: Any, config: Config, progress: Any) -> list:
    """The lines of an answer file: prediction (None where it abstains) and the probability of every label."""
    from common.measure.scoring import classify

    size = config.per_device_eval_batch_size
    answers = classify(classifier, examples, accelerator, size, progress, labelled=False)
    labels, several = classifier.prompt.labels, classifier.prompt.multi_label
    lines = []
    for example, answer in zip(examples, answers, strict=True):
        p = answer.probabilities
        sure = min(max(x, 1 - x) for x in p) if several else max(p)
        abstained = config.min_probability is not None and sure < config.min_probability
        chosen = [labels[k] for k in answer.labels]
        prediction = None if abstained else chosen if several else chosen[0]
        line = {"prediction": prediction, "probabilities": dict(zip(labels, p, strict=True)), "abstained": abstained}
        lines.append({**line, "truncated": classifier.prompt.prompt(example.text).truncated})
    return lines


def show_labels(line: dict[str, Any]) -> str:
    """An answer in labels, for people: the prediction, then the likeliest labels."""
    found = line["prediction"]
    first = (
        "(abstains)" if line["abstained"] else ", ".join(found) or "(no label)" if isinstance(found, list) else found
    )
    likeliest = sorted(line["probabilities"].items(), key=lambda pair: -pair[1])[:10]
    return "\n".join([first, *(f"  {p:.3f}  {label}" for label, p in likeliest)])


def read_asked(config: Config, task: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """The ids of the rows of --input_file, and what each asks: turns, a text, or an Example."""
    rows = read_rows(config.input_file)
    ids = row_ids(rows, config.input_file, config.id_column)
    if task["task"] == "classification":
        return ids, unlabelled_rows(rows, ids, config.input_file, config)
    if task["task"] == "causal_lm":
        names = config.text_fields or ["prompt" if all("prompt" in row for row in rows) else "text"]
        config.text_fields = names
        examples = unlabelled_rows(rows, ids, config.input_file, config)  # checks the columns
        texts = [" ".join(str(row[name]) for name in names if row.get(name)) for row in rows]
        for number, example in enumerate(examples, 1):
            if not example.text:
                raise InputError(f"{config.input_file}, data row {number}: there is no text to go on with. Delete it.")
        return ids, texts
    renamed, system = read_columns(config.columns or []), config.system_prompt or task.get("system_prompt")
    columns = {name for row in rows for name in row}
    for column in renamed.values():
        if column not in columns:
            raise InputError(f"{config.input_file}: there is no column {column!r} (--columns).")
    where = f"{config.input_file}, data row"
    return ids, [read_question(row, f"{where} {number}", renamed, system) for number, row in enumerate(rows, 1)]


def made_from(config: Config, folder: Path | None) -> dict[str, Any]:
    """What decides the answers to a file: its rows, the weights, and the options."""
    source = folder or Path(config.model)
    files = [*source.glob("*.safetensors"), source / "task.json"] if source.is_dir() else []
    weights = {"model": None if folder else config.model, "revision": config.revision}
    weights |= {file.name: file_hash(file) for file in sorted(files) if file.is_file()}
    free = {"run", "output_file", "input_file", "per_device_eval_batch_size", "num_threads", "model", "revision"}
    options = {item.name: getattr(config, item.name) for item in fields(Config) if item.name not in free}
    for name in ("chat_template", "prompt_template"):
        if options[name] and Path(options[name]).is_file():
            options[name] = file_hash(options[name])
    return {"input file": file_hash(config.input_file), "weights": weights, "options": options}


def compare_folders(config: Config, task: dict[str, Any]) -> list[tuple[str, Path | None]]:
    """(name, weights folder; None for `base`) of every run of --compare.

    Raises InputError for runs that are not adapters of one base, or whose base cannot be had by switching them off.
    """
    found: list[tuple[str, Path | None]] = []
    for run in config.compare:
        other = None if run == "base" else disk.weights_folder(Path(run))
        found.append((run, other))
        if other is None:
            continue
        described = disk.load_task(other)
        if described["task"] != task["task"]:
            raise InputError(f"--compare: {run} was trained for {described['task']}, {config.run} for {task['task']}.")
        options, wanted = described["model_options"], task["model_options"]
        if differing := [name for name in wanted if options.get(name) != wanted[name]]:
            shown = ", ".join(f"{name} {options.get(name)} and {wanted[name]}" for name in differing)
            raise InputError(
                f"--compare: {run} and {config.run} have different bases ({shown}), and only one is loaded. Ask them "
                "one after the other, with --run."
            )
        if described["full_finetuning"]:
            raise InputError(f"--compare: {run} has no adapter, all its weights were trained. Ask it with --run.")
        check_switchable(other, run)
    return found


def check_switchable(folder: Path, run: Any) -> None:
    """Refuses an adapter whose initialisation moved weights out of the base: switched off, it leaves no base."""
    from common.disk import read_json

    init = read_json(folder / "adapter_config.json").get("init_lora_weights")
    if init in ("pissa", "olora"):
        raise InputError(
            f"{run} was trained with --init_lora_weights {init}, which changes the base: ask it with --run."
        )


def demo_questions(task: str) -> list[str]:
    """What --demo asks: the single questions of the demo data's test split, or beginnings of texts."""
    if task == "causal_lm":
        return list(OPENINGS)
    turns = [read_row(row, "demo")[1] for row in read_rows(next(DEMO.glob("test.*")))]
    return [messages[0]["content"] for messages in turns if len(messages) == 2][:5]


def side_by_side(voices: Sequence[tuple[str, Any]], questions: Sequence[str], sampling: Sampling) -> None:
    """Every writer's answer to every question, as it comes."""
    import torch

    for question in questions:
        print(f"\n> {question}", flush=True)
        for name, writer in voices:
            print(f"\n[{name}]", flush=True)
            torch.manual_seed(sampling.seed)
            _, stopped = terminal.show(writer.stream(writer.ask(question), sampling))
            if stopped:
                raise KeyboardInterrupt


def converse(writer: Any, config: Config, instruction: str | None) -> None:
    """One answer, or a chat in the terminal."""
    import torch

    seeded: list[int] = []

    def answer(asked: Any, sampling: Sampling) -> Iterator[str]:
        if seeded != [sampling.seed]:  # set, or changed by /params; a question asked again goes on drawing
            seeded[:] = [sampling.seed]
            torch.manual_seed(sampling.seed)
        yield from writer.stream(asked, sampling)

    sampling = Sampling(**{item.name: getattr(config, item.name) for item in fields(Sampling)})
    if instruction is not None:
        if terminal.show(answer(writer.ask(instruction), sampling))[1]:
            raise KeyboardInterrupt
    elif writer.template is None:
        terminal.answer_lines(lambda text: answer(text, sampling))
    else:
        terminal.Chat(answer, sampling, writer.system).run()


def given_instruction(config: Config) -> str | None:
    """The instruction of the command line or, for `-`, all that comes through the pipe."""
    text = config.prompt
    if text == "-":
        try:
            text = sys.stdin.read().strip()
        except UnicodeDecodeError:
            raise InputError("What comes through the pipe is not UTF-8.") from None
    if text is not None and not text.strip():
        raise InputError("The instruction is empty: give one, or leave it out for a chat.")
    return text


def answer_labels(
    config: Config, folder: Path | None, path: str, accelerator: Any, instruction: str | None, batch: Any
) -> None:
    """Labels for the rows of a file, for one text, or for what is typed. batch: (AnswerFile, rows), or None."""
    classifier = load_labeller(config, folder, path, accelerator)

    def label(text: str) -> Iterator[str]:
        example = Example("", join_fields({"text": text}, ["text"]), ())
        yield show_labels(label_rows(classifier, [example], accelerator, config, lambda rows: None)[0])

    if batch:

        def lines(rows: Sequence[Example], chunk: int, progress: Any) -> list[dict[str, Any]]:
            return label_rows(classifier, rows, accelerator, config, progress)

        write_answers(*batch, lines, config.per_device_eval_batch_size, accelerator)
    elif instruction is not None:
        terminal.show(label(instruction))
    else:
        terminal.greet("Every text that you type is classified.")
        terminal.answer_lines(label)


def answer_texts(
    config: Config,
    folder: Path | None,
    task: dict[str, Any],
    writer: Any,
    accelerator: Any,
    instruction: str | None,
    batch: Any,
) -> None:
    """Texts for the rows of a file, one text by several models, or a chat. batch: (AnswerFile, rows), or None."""
    from common.model import lora
    from common.use import text_models

    if batch:
        size = config.per_device_eval_batch_size

        def lines(rows: Sequence[Any], chunk: int, progress: Any) -> list[dict[str, Any]]:
            return writer.answers(rows, replace(config, seed=(config.seed + chunk) % 2**32), size, progress)

        write_answers(*batch, lines, size, accelerator)
    elif config.compare:
        others = compare_folders(config, task)
        side_by_side(text_models.load_compared(writer, folder, others, config), [instruction], config)
    elif config.demo:
        voices = [("this run" if folder else "base", writer)]
        if lora.is_adapted(writer.model):
            voices.insert(0, ("base", replace(writer, adapter=None)))
        side_by_side(voices, demo_questions(task["task"]), config)
    else:
        if instruction is None:
            terminal.greet("/help lists the commands." if writer.template else "Every text is gone on with.")
        converse(writer, config, instruction)


def main() -> None:
    config, folder, task = read_options()
    instruction, batch = given_instruction(config), None
    if config.input_file:
        ids, asked = read_asked(config, task)
        batch = AnswerFile(config.output_file, ids, made_from(config, folder)), asked
        if batch[0].done == len(ids):
            print(f"{config.output_file} has the answers to all {len(ids)} rows already.")
            return
    if config.compare:
        compare_folders(config, task)
    if config.demo and folder:
        check_switchable(folder, config.run)
    path = resolve_model(config.model, config.revision) if folder is None else ""
    print(f"Loading {folder or config.model} ...", file=sys.stderr, flush=True)

    from common.model import base_model
    from common.train import loop
    from common.use import text_models

    config.full_finetuning = False  # a base model is loaded as it is, not to be trained whole
    if folder is None:
        base_model.resolve_options(config, base_model.is_encoder(path, config))
    accelerator = loop.start_accelerator(config, [])
    if task["task"] == "classification":
        answer_labels(config, folder, path, accelerator, instruction, batch)
    else:
        writer = text_models.load_writer(config, folder, task, path, accelerator)
        with accelerator.autocast():
            answer_texts(config, folder, task, writer, accelerator, instruction, batch)
    loop.finish(accelerator)


if __name__ == "__main__":
    with cli_errors():
        try:
            main()
        except KeyboardInterrupt:
            print("\nStopped by Ctrl-C. Rows that are in an --output_file stay, and the same command goes on there.",
                  file=sys.stderr)  # fmt: skip
            sys.exit(130)
        except BrokenPipeError:  # whoever reads the answers has enough of them
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
