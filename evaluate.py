"""Evaluates a trained run, or an untrained model, and writes predictions, metrics, pictures and a report.

    python evaluate.py --run outputs/smollm2-135m/arxiv_demo/run_1            # on its own test split
    python evaluate.py --run RUN --test_file other.csv                        # on other rows with the same columns
    python evaluate.py --run RUN --decode generate                            # free text instead of label scoring
    python evaluate.py --run meta-llama/Llama-3.2-1B --test_file t.csv --text_fields text --labels good bad
    python evaluate.py --run meta-llama/Llama-3.2-1B --task causal_lm --test_file t.txt --stride 64
    python evaluate.py --run meta-llama/Llama-3.2-1B-Instruct --task chat --test_file chats.jsonl

Without --run: the newest run under outputs/, else the embedded model on the demo data. Results go to RUN/eval/test.
A classification head cannot generate.
"""

import importlib.util
import json
import time
from dataclasses import dataclass, fields
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from common import disk
from common.data.classification import ClassificationData, draw_few_shot, load_classification
from common.data.conversations import load_conversations
from common.data.corpus import load_corpus_once, open_sources
from common.data.files import SPLITS
from common.errors import InputError, cli_errors
from common.hub import EMBEDDED, resolve_model
from common.log import Progress, say
from common.options import (
    CHAT_LENGTH,
    CausalConfig,
    ClassificationConfig,
    DataConfig,
    InstructionConfig,
    ModelConfig,
    Sampling,
    check_causal,
    check_classification,
    check_instructions,
    from_texts,
    option,
    parse_given,
    read_yaml,
)
from common.text.prompts import check_prompt, read_template

# torch and what stands on it is imported inside the functions: options and data are checked before, in a moment.


TASKS = {  # what a run was trained for -> the options that belong to it
    "classification": ClassificationConfig,
    "causal_lm": CausalConfig,
    "chat": InstructionConfig,
}


@dataclass
class Config(ModelConfig, DataConfig, ClassificationConfig, CausalConfig, InstructionConfig):
    """evaluate"""

    run: str | None = option(None, "run folder, adapter folder, or base model")
    task: Literal["classification", "causal_lm", "chat"] | None = option(
        None, "for a base model; unset: classification"
    )
    split: Literal["train", "validation", "test"] = option("test", "split of the run to evaluate on")
    decode: Literal["score", "generate"] | None = option(
        None, "labels: score every one (unset), or generate text greedily"
    )
    max_new_tokens: int | None = option(
        None, "conversations: tokens of an answer at most; unset: 256, or the longest reference's", at_least=1
    )
    per_device_eval_batch_size: int = option(16, "a pass holds the tokens of so many of the longest rows", at_least=1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "unset: as trained; for a base model, bf16")
    num_threads: int | None = option(None, "CPU threads; unset: cores / processes on this machine", at_least=1)
    tf32: bool = option(False, "TF32 products on NVIDIA GPUs for what runs in fp32")
    output_dir: str | None = option(None, "unset: RUN/eval/<split>, or outputs/<model>/eval for a base model")


FITTED = ("in_several_rows", "without_early_turns", "shortened", "cut_answers")  # of the data report

# What a run was trained with, and a base model by --run: given here too, they must be the same.
SETTLED = {item.name for item in fields(ModelConfig)} | {
    "task", "approach", "labels", "class_weights", "few_shot", "prompt_template", "max_length",
    "document_masking", "system_prompt", "loss_on",
}  # fmt: skip


def read_options(cls: type[Config] = Config, given: dict[str, Any] | None = None) -> tuple[Config, Path | None, bool]:
    """The options, the folder of trained weights (None: a base model), and whether the rows are not the run's own.

    Data and labels are those of the run unless the command line names others; --test_file replaces all of its files.
    given: the options as texts; unset, those of the command line.
    """
    given = parse_given(cls) if given is None else given
    run = Path(given["run"]) if "run" in given else disk.newest_run()
    if disk.is_base_model(run):
        name = given.get("run", EMBEDDED)
        if given.get("model", name) != name:
            raise InputError(f"--model {given['model']}: evaluate.py takes the model by --run.")
        if given.get("approach") == "head":
            raise InputError(f"--approach head: {name} is a base model, whose head would be random. Drop the option.")
        if given.get("task") == "chat":
            given = {"max_length": str(CHAT_LENGTH), **given}
        config = from_texts(cls, {"task": "classification", **given, "model": name})
        check_options(given, config.task, name)
        return config, None, True
    folder = disk.weights_folder(run)
    task = disk.load_task(folder)
    run = folder.parent if folder.name in ("adapter", "model") else folder
    saved = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    changed = {"output_dir", "mixed_precision", "chat_template"}  # the template is saved with the weights
    saved = {name: value for name, value in saved.items() if name not in changed}
    kept = {name: task[name] for name in (*CausalConfig.settled, *InstructionConfig.settled) if name in task}
    kept = {name: value for name, value in {**task["model_options"], **kept}.items() if value is not None}
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in kept.items()}
    saved = {**texts, **saved, "task": task["task"]}  # a copied adapter has task.json alone
    if "labels" in task and "label_columns" not in {**saved, **given}:
        saved["labels"] = task["labels"]
    check_options(given, task["task"], run)
    for name in sorted(SETTLED & given.keys()):
        if given[name] != saved.get(name):
            raise InputError(f"--{name} was settled when {run} was trained: drop it.")
    chosen = given.get("split", "test")
    if "test_file" in given:
        text = given["test_file"].lower().endswith(".txt")
        for name in ("train_file", "validation_file", "dataset_name", "dataset_config", *["text_fields"] * text):
            saved.pop(name, None)
        if chosen != "test":
            raise InputError("--test_file is the test split: drop --split.")
    elif chosen != "train" and f"{chosen}_file" in saved:
        for split in set(SPLITS) - {chosen}:  # nothing of it is cut from those files, so none is read
            saved.pop(f"{split}_file", None)
    return from_texts(cls, {**saved, **given, "run": str(run)}), folder, "test_file" in given


def check_options(given: dict[str, Any], task: str, run: Any) -> None:
    """Refuses options of another task, which nothing would honour."""
    own = {task: {item.name for item in fields(kind)} for task, kind in TASKS.items()}
    own["classification"].add("decode")
    own["chat"].add("max_new_tokens")
    for name in given:
        if name not in own[task] and any(name in options for options in own.values()):
            raise InputError(f"--{name} does not belong to {task}, which {run} is evaluated for: drop it.")


def check_same_task(task: dict[str, Any], data: ClassificationData) -> None:
    """Refuses rows whose labels the run does not answer with, or not in the order of its probabilities."""
    if (data.labels, data.multi_label) != (task["labels"], task["multi_label"]):
        kind = "any number of labels" if task["multi_label"] else "one label"
        raise InputError(
            f"The run answers with {kind} of {', '.join(task['labels'])}, in this order; the options given describe "
            f"others ({', '.join(data.labels)}). Drop or correct --label_column, --label_columns, --label_delimiter."
        )


def check_unchanged(config: Config, sources: dict[str, dict[str, str]]) -> None:
    """Refuses to evaluate a run on a file that is no longer the one it was split from."""
    file = Path(config.run) / "splits.json"
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"sources": sources}
    for name, source in sources.items():
        if saved["sources"].get(name, {}).get("sha256") != source["sha256"]:
            raise InputError(
                f"{source['name']} has changed since the run was trained, so its {config.split} split is no longer the "
                "same rows. Restore the file, or name the rows to evaluate with --test_file."
            )


def untrained(config: Config, data: ClassificationData, path: str, accelerator: Any) -> Any:
    """A base model as a classifier that is asked with the prompt."""
    from common.model import base_model, classifier
    from common.model.classifier import Classifier

    base_model.check_length(path, config, config.max_length, "--max_length")
    tokenizer = base_model.load_tokenizer(path, config)
    shots, _ = draw_few_shot(data, config)
    prompt = classifier.classification_prompt(
        tokenizer,
        False,
        labels=data.labels,
        multi_label=data.multi_label,
        template=read_template(config.prompt_template, "generative"),
        max_length=config.max_length,
        few_shot=shots,
    )
    prompt.reserve(data.splits[config.split])
    model, _ = base_model.load_base(path, config, device=accelerator.device)
    return Classifier(model.eval(), prompt, tokenizer, False, False, [0.5] * len(data.labels))


def results_folder(config: Config, folder: Path | None, name: str) -> tuple[Path, Path]:
    """The run (or what stands for a base model's), and where results of this name go."""
    run = Path(config.run) if folder else disk.OUTPUTS / Path(config.model).name
    return run, Path(config.output_dir) if config.output_dir else run / "eval" / name


def other_file(config: Config, folder: Path | None, other_rows: bool) -> str:
    """What sets results on other rows than the run's own apart in the name of their folder."""
    return f"-{Path(config.test_file).stem}" if folder and other_rows and config.test_file else ""


def weights_of(config: Config) -> str:
    """What the base was loaded as; a 4-bit one gives other figures than a 16-bit one."""
    bits = "4-bit" if config.load_in_4bit else "8-bit" if config.load_in_8bit else "unquantised"
    return f"{bits} base, mixed precision {config.mixed_precision}"


def evaluate_classifier(config: Config, folder: Path | None, other_rows: bool) -> None:
    """Accuracy, F1 and predictions of a classifier, or of a base model that is asked with the prompt."""
    check_classification(config)
    config.decode = config.decode or "score"
    data = load_classification(config, training=False)
    examples = data.splits[config.split]
    if not examples:
        raise InputError(f"There are no {config.split} rows: name some with --test_file.")
    if folder is None:
        path = resolve_model(config.model, config.revision)
        check_prompt(config, data, path)
    else:
        task = disk.load_task(folder)
        check_same_task(task, data)
        config.mixed_precision = config.mixed_precision or task["mixed_precision"]
        if not other_rows:
            check_unchanged(config, data.sources)
        if task["approach"] == "head" and config.decode == "generate":
            raise InputError("--decode generate: this run has a classification head and writes no text.")

    from common.measure import report
    from common.measure.metrics import summarise
    from common.measure.scoring import predict
    from common.model import base_model, classifier, storage
    from common.train import loop

    if folder is None:
        base_model.resolve_options(config, base_model.is_encoder(path, config))
    accelerator = loop.start_accelerator(config, [])
    if folder:
        classifier = storage.load_classifier(folder, accelerator.device, config.mixed_precision)
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
        run, target = results_folder(config, folder, name + other_file(config, folder, other_rows))
        if not other_rows:
            results |= disk.read_json(run / "eval" / config.split / "baselines.json")
            metrics = {**disk.train_figures(run), **metrics}
        report.write_evaluation(target, classifier, examples, answers, metrics, results, config.split)
        say(accelerator, report.results_table(results, config.split))
        outside = f"{metrics['outside_label_set']} of {metrics['rows']} answers outside the label set"
        speed = f"{metrics['examples_per_second']:.1f} examples/s"
        say(accelerator, f"\n{outside}; {speed}; {weights_of(config)}\nWritten to {target}")
    loop.finish(accelerator)


def evaluate_text(config: Config, folder: Path | None, other_rows: bool) -> None:
    """Perplexity of a model on running text."""
    check_causal(config)
    sources = open_sources(config)
    if folder and not other_rows:
        named = {split: {"name": source.name, "sha256": source.sha256} for split, source in sources.items()}
        check_unchanged(config, named)
    path = str(folder) if folder else resolve_model(config.model, config.revision)

    from common.measure import report
    from common.measure.metrics import perplexity_metrics
    from common.measure.perplexity import UNTRAINED, continue_text, row_losses
    from common.model import attention, base_model, storage
    from common.model.generation import positions
    from common.model.token_losses import TokenLosses
    from common.text import batches
    from common.train import loop

    task = disk.load_task(folder) if folder else {}
    config.mixed_precision = config.mixed_precision or task.get("mixed_precision")
    base_model.resolve_options(config, encoder=folder is None and base_model.is_encoder(path, config))
    accelerator = loop.start_accelerator(config, [])
    tokenizer = base_model.load_tokenizer(path, config)
    start = task.get("start", base_model.start_ids(tokenizer))
    data = load_corpus_once(sources, config, tokenizer, accelerator)
    blocks = data.splits[config.split]
    if not len(blocks):
        raise InputError(f"There is no {config.split} text: name one with --test_file.")
    if folder:
        model, _ = storage.load_language_model(folder, accelerator.device, config.mixed_precision)
    else:
        model = base_model.load_base(path, config, device=accelerator.device)[0].eval()
    most = positions(model) or config.block_size + len(start)
    if config.block_size + len(start) > most:
        raise InputError(f"--block_size {config.block_size}: longer than the {most} positions of the model.")
    if config.document_masking:
        attention.check_masks(model, config, "document_masking", config.block_size)

    started = time.perf_counter()
    collator = partial(batches.collate_numbered, batches.collate_blocks, blocks, start=start,
                       end_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
                       document_masking=config.document_masking)  # fmt: skip
    batch_size = config.per_device_eval_batch_size
    losses = row_losses(TokenLosses(model), blocks.lengths, accelerator, batch_size, collator, config.split)
    metrics = perplexity_metrics(losses, data.per_token[config.split])
    metrics |= loop.evaluation_cost(len(blocks), started, accelerator.device)
    sample = continue_text(model, tokenizer, config.sample_prompt, accelerator, seed=42)
    if accelerator.is_main_process:
        results = {"this run" if folder else UNTRAINED: metrics}
        usual = folder is None or same_windows(config, Path(config.run))
        name = config.split + other_file(config, folder, other_rows)
        name += "" if usual else f"-windows-{config.block_size}-{config.stride or config.block_size}"
        run, target = results_folder(config, folder, name)
        if folder and usual and not other_rows:
            results |= disk.read_json(run / "eval" / config.split / "baselines.json")
            metrics = {**disk.train_figures(run), **metrics}
        report.write_perplexity(target, losses, metrics, results, config.split, sample)
        before = f"behind {tokenizer.decode(start)}" if start else "without a BOS token in front"
        windows = f"windows of {config.block_size} tokens, {config.stride or config.block_size} apart, {before}"
        say(accelerator, report.results_table(results, config.split, report.PERPLEXITY))
        say(accelerator, f"\n{windows}: {metrics['predicted_tokens']:,} tokens predicted; {weights_of(config)}")
        say(accelerator, f"A sample: {sample}")
        say(accelerator, f"\nWritten to {target}")
    loop.finish(accelerator)


def evaluate_chat(config: Config, folder: Path | None, other_rows: bool) -> None:
    """Loss of the reference answers, and greedy answers of the model beside them."""
    check_instructions(config)
    for package in ("sacrebleu", "rouge_score"):
        if not importlib.util.find_spec(package):
            raise InputError(f"{package} is not installed. Run `pip install sacrebleu rouge-score`.")
    data = load_conversations(config, training=False)
    if not data.splits[config.split]:
        raise InputError(f"There are no {config.split} rows: name some with --test_file.")
    if folder and not other_rows:
        check_unchanged(config, data.sources)
    path = str(folder) if folder else resolve_model(config.model, config.revision)

    from accelerate.utils import gather_object

    from common.measure import report
    from common.measure.metrics import perplexity_metrics, text_overlap
    from common.measure.perplexity import UNTRAINED, row_losses
    from common.model import base_model, storage
    from common.model.generation import NEW_TOKENS, answer_prompts, prompt_room
    from common.model.token_losses import TokenLosses
    from common.text import batches
    from common.text.chat import chat_rows, choose_template
    from common.train import loop

    task = disk.load_task(folder) if folder else {}
    config.mixed_precision = config.mixed_precision or task.get("mixed_precision")
    base_model.resolve_options(config, encoder=folder is None and base_model.is_encoder(path, config))
    accelerator = loop.start_accelerator(config, [])
    device, batch_size = accelerator.device, config.per_device_eval_batch_size
    if folder:
        model, tokenizer, template = storage.load_chat_model(
            folder, device, config.mixed_precision, config.chat_template
        )
    else:
        base_model.check_length(path, config, config.max_length, "--max_length")
        tokenizer = base_model.load_tokenizer(path, config)
        template = choose_template(tokenizer, config.chat_template)
        model = base_model.load_base(path, config, device=device)[0].eval()
    data.splits = {config.split: data.splits[config.split]}
    rows = chat_rows(data, template, config.max_length, config.loss_on)[config.split]

    started = time.perf_counter()
    collator = partial(batches.collate_numbered, batches.collate_chat, rows, pad_id=tokenizer.pad_token_id)
    lengths = [row.length for row in rows]
    losses = row_losses(TokenLosses(model), lengths, accelerator, batch_size, collator, config.split)
    asked = [conversation.messages[:-1] for conversation in data.splits[config.split]]
    gold = [conversation.messages[-1]["content"] for conversation in data.splits[config.split]]
    references = map(len, tokenizer(gold)["input_ids"])
    most = config.max_new_tokens or max(NEW_TOKENS, min(max(references) + 1, config.max_length))
    sampling = Sampling(do_sample=False, max_new_tokens=most)
    room = min(config.max_length, prompt_room(model, sampling) or config.max_length)
    prompts = [template.prompt(messages, room) for messages in asked]
    share = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    progress = Progress(accelerator, "answers", len(share))
    with accelerator.autocast():
        answers = answer_prompts(
            model, tokenizer, template, [prompts[i].ids for i in share], sampling, batch_size, device, progress
        )
    answers = [answer for _, answer in sorted(gather_object(list(zip(share, answers, strict=True))), key=itemgetter(0))]
    overlap = text_overlap([answer.text for answer in answers], gold)
    metrics = perplexity_metrics(losses)
    overlap["intervals_95"] |= metrics["intervals_95"]
    metrics |= overlap | {"stopped": sum(answer.stopped for answer in answers) / len(answers), "answers": len(answers)}
    metrics |= loop.evaluation_cost(len(answers), started, device)
    if accelerator.is_main_process:
        results = {"this run" if folder else UNTRAINED: metrics}
        name = config.split + other_file(config, folder, other_rows)
        run, target = results_folder(config, folder, name)
        if folder and not other_rows:
            results |= disk.read_json(run / "eval" / config.split / "baselines.json")
            metrics = {**disk.train_figures(run), **metrics}
        written = [
            {"id": conversation.id, "prompt": template.text_of(messages), "gold": reference,
             "prediction": answer.text, "stopped": answer.stopped,
             "truncated": prompt.shortened or prompt.dropped_turns > 0}
            for conversation, messages, reference, answer, prompt in zip(
                data.splits[config.split], asked, gold, answers, prompts, strict=True)
        ]  # fmt: skip
        report.write_answers(target, written, metrics, results, config.split)
        say(accelerator, report.results_table(results, config.split, report.ANSWERS))
        speed = f"{metrics['examples_per_second']:.1f} examples/s"
        say(accelerator, f"\n{speed}; {weights_of(config)}; samples in {target / 'report.md'}")
        fitted = [f"{name.replace('_', ' ')} {data.report['rows'][config.split][name]}" for name in FITTED]
        say(accelerator, f"Rows made to fit --max_length {config.max_length}: {', '.join(fitted)}")
    loop.finish(accelerator)


def same_windows(config: Config, run: Path) -> bool:
    """Whether the text is read as it was after training, so that figures compare; a copied adapter has none to."""
    if not (run / "config.yaml").is_file():
        return True
    saved = read_yaml(run / "config.yaml")
    return all(str(getattr(config, name)) == saved.get(name, "None") for name in ("block_size", "stride"))


def main() -> None:
    config, folder, other_rows = read_options()
    config.full_finetuning = False  # a base model is loaded as it is, not to be trained whole
    evaluations = {"classification": evaluate_classifier, "causal_lm": evaluate_text, "chat": evaluate_chat}
    evaluations[config.task](config, folder, other_rows)


if __name__ == "__main__":
    with cli_errors():
        main()
