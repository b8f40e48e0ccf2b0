"""Evaluates a trained run, or an untrained model, and writes predictions, metrics, pictures and a report.

    python evaluate.py --run outputs/smollm2-135m/arxiv_demo/run_1            # on its own test split
    python evaluate.py --run RUN --test_file other.csv                        # on other rows with the same columns
    python evaluate.py --run RUN --decode generate                            # free text instead of label scoring
    python evaluate.py --run meta-llama/Llama-3.2-1B --test_file t.csv --text_fields text --labels good bad

Without --run: the newest run under outputs/, else the embedded model on the demo data. Results go to RUN/eval/test.
So far for classification; a head cannot generate.
"""

import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from common import rundir
from common.config import (
    ClassificationConfig,
    DataConfig,
    InputError,
    ModelConfig,
    check_classification,
    cli_errors,
    from_texts,
    option,
    parse_given,
    read_yaml,
)
from common.data import ClassificationData, draw_few_shot, load_classification
from common.demo_model import EMBEDDED, resolve_model
from common.prompts import check_prompt, read_template
from common.runlog import say

# torch and what stands on it is imported inside the functions: options and data are checked before, in a moment.


@dataclass
class Config(ModelConfig, DataConfig, ClassificationConfig):
    """evaluate"""

    run: str | None = option(None, "run folder, adapter folder, or base model")
    split: Literal["train", "validation", "test"] = option("test", "split of the run to evaluate on")
    decode: Literal["score", "generate"] = option("score", "score every label, or generate text greedily")
    per_device_eval_batch_size: int = option(16, "a pass holds the tokens of so many of the longest rows", at_least=1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "unset: as trained; for a base model, bf16")
    num_threads: int | None = option(None, "CPU threads; unset: cores / processes on this machine", at_least=1)
    tf32: bool = option(False, "TF32 products on NVIDIA GPUs for what runs in fp32")
    output_dir: str | None = option(None, "unset: RUN/eval/<split>, or outputs/<model>/eval for a base model")


# What a run was trained with, and a base model by --run: given here too, they must be the same.
SETTLED = {item.name for item in fields(ModelConfig)} | {
    "approach", "labels", "class_weights", "few_shot", "prompt_template", "max_length",
}  # fmt: skip


def read_options(cls: type[Config] = Config, given: dict[str, Any] | None = None) -> tuple[Config, Path | None, bool]:
    """The options, the folder of trained weights (None: a base model), and whether the rows are not the run's own.

    Data and labels are those of the run unless the command line names others; --test_file replaces all of its files.
    given: the options as texts; unset, those of the command line.
    """
    given = parse_given(cls) if given is None else given
    run = Path(given["run"]) if "run" in given else rundir.newest_run()
    if run is None or not run.is_dir() or (run / "config.json").is_file() and not (run / "task.json").is_file():
        name = given.get("run", EMBEDDED)
        if given.get("model", name) != name:
            raise InputError(f"--model {given['model']}: evaluate.py takes the model by --run.")
        if given.get("approach") == "head":
            raise InputError(f"--approach head: {name} is a base model, whose head would be random. Drop the option.")
        return from_texts(cls, {**given, "model": name}), None, True
    folder = rundir.weights_folder(run)
    run = folder.parent if folder.name in ("adapter", "model") else folder
    saved = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    saved = {name: value for name, value in saved.items() if name not in ("output_dir", "mixed_precision")}
    if "label_columns" not in {**saved, **given}:
        saved["labels"] = json.loads((folder / "task.json").read_text(encoding="utf-8"))["labels"]
    for name in sorted(SETTLED & given.keys()):
        if given[name] != saved.get(name):
            raise InputError(f"--{name} was settled when {run} was trained: drop it.")
    if "test_file" in given:
        for name in ("train_file", "validation_file", "dataset_name", "dataset_config"):
            saved.pop(name, None)
        if given.get("split", "test") != "test":
            raise InputError("--test_file is the test split: drop --split.")
    return from_texts(cls, {**saved, **given, "run": str(run)}), folder, "test_file" in given


def check_same_task(task: dict[str, Any], data: ClassificationData) -> None:
    """Refuses rows whose labels the run does not answer with, or not in the order of its probabilities."""
    if (data.labels, data.multi_label) != (task["labels"], task["multi_label"]):
        kind = "any number of labels" if task["multi_label"] else "one label"
        raise InputError(
            f"The run answers with {kind} of {', '.join(task['labels'])}, in this order; the options given describe "
            f"others ({', '.join(data.labels)}). Drop or correct --label_column, --label_columns, --label_delimiter."
        )


def check_unchanged(run: Path, data: ClassificationData, split: str) -> None:
    """Refuses to evaluate a run on a file that is no longer the one it was split from."""
    saved = json.loads((run / "splits.json").read_text(encoding="utf-8"))
    for name, source in data.sources.items():
        if saved["sources"].get(name, {}).get("sha256") != source["sha256"]:
            raise InputError(
                f"{source['name']} has changed since the run was trained, so its {split} split is no longer the same "
                "rows. Restore the file, or name the rows to evaluate with --test_file."
            )


def untrained(config: Config, data: ClassificationData, path: str, accelerator: Any) -> Any:
    """A base model as a classifier that is asked with the prompt."""
    from common import modeling
    from common.scoring import Classifier

    tokenizer = modeling.load_tokenizer(path, config)
    shots, _ = draw_few_shot(data, config)
    prompt = modeling.classification_prompt(
        tokenizer,
        False,
        labels=data.labels,
        multi_label=data.multi_label,
        template=read_template(config.prompt_template, "generative"),
        max_length=config.max_length,
        few_shot=shots,
    )
    prompt.reserve(data.splits[config.split])
    model, _ = modeling.load_base(path, config, device=accelerator.device)
    return Classifier(model.eval(), prompt, tokenizer, False, False, [0.5] * len(data.labels))


def main() -> None:
    config, folder, other_rows = read_options()
    check_classification(config)
    data = load_classification(config, training=False)
    examples = data.splits[config.split]
    if not examples:
        raise InputError(f"There are no {config.split} rows: name some with --test_file.")
    if folder is None:
        path = resolve_model(config.model, config.revision)
        check_prompt(config, data, path)
        config.full_finetuning = False
    else:
        task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        check_same_task(task, data)
        config.mixed_precision = config.mixed_precision or task["mixed_precision"]
        if not other_rows and (Path(config.run) / "splits.json").is_file():
            check_unchanged(Path(config.run), data, config.split)
        if task["approach"] == "head" and config.decode == "generate":
            raise InputError("--decode generate: this run has a classification head and writes no text.")

    from common import loop, modeling, report
    from common.metrics import summarise
    from common.scoring import predict

    if folder is None:
        modeling.resolve_options(config, modeling.is_encoder(path, config))
    accelerator = loop.start_accelerator(config, [])
    if folder:
        classifier = modeling.load_trained(folder, accelerator.device, config.mixed_precision)
    else:
        classifier = untrained(config, data, path, accelerator)

    started = time.perf_counter()
    batch_size = config.per_device_eval_batch_size
    answers = predict(classifier, examples, accelerator, batch_size, config.split, config.decode)
    metrics = summarise(answers, [example.labels for example in examples], data.labels)
    metrics |= loop.evaluation_cost(len(examples), started, accelerator.device)
    if accelerator.is_main_process:
        results = {"this run" if folder else "untrained base, as asked": metrics}
        name = config.split if config.decode == "score" else f"{config.split}-generate"
        parent = Path(config.run) if folder else rundir.OUTPUTS / Path(config.model).name
        target = Path(config.output_dir) if config.output_dir else parent / "eval" / name
        if not other_rows:
            results |= rundir.read_json(parent / "eval" / config.split / "baselines.json")
            metrics = {**rundir.train_figures(parent), **metrics}
            metrics.pop("update", None)  # of the line in metrics.jsonl
        report.write_evaluation(target, classifier, examples, answers, metrics, results, config.split)
        say(accelerator, report.results_table(results, config.split))
        outside = f"{metrics['outside_label_set']} of {metrics['rows']} answers outside the label set"
        say(accelerator, f"\n{outside}; {metrics['examples_per_second']:.1f} examples/s\nWritten to {target}")
    loop.finish(accelerator)


if __name__ == "__main__":
    with cli_errors():
        main()
