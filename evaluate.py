"""Evaluates a trained run, or an untrained model, and writes predictions, metrics, pictures and a report.

    python evaluate.py --run outputs/smollm2-135m/arxiv_demo/run_1            # on its own test split
    python evaluate.py --run RUN --test_file other.csv                        # on other rows with the same columns
    python evaluate.py --run RUN --decode generate                            # free text instead of label scoring
    python evaluate.py --run meta-llama/Llama-3.2-1B --test_file t.csv --text_fields text --labels good bad
    python evaluate.py --run meta-llama/Llama-3.2-1B --task causal_lm --test_file t.txt --stride 64
    python evaluate.py --run meta-llama/Llama-3.2-1B-Instruct --task chat --test_file chats.jsonl
    python evaluate.py --compare RUN_A RUN_B base                             # differences on the same rows

Without --run: the newest run under outputs/, else the embedded model on the demo data. Results go to RUN/eval/test.
A classification head cannot generate.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from common.data.classification import draw_few_shot, load_classification
from common.data.conversations import load_conversations
from common.data.corpus import load_corpus_once, open_sources, units_of
from common.errors import InputError, cli_errors
from common.hub import resolve_model
from common.log import evaluation_cost, say
from common.measure.intervals import sums_of
from common.measure.label_answer import Answer
from common.measure.metrics import chat_metrics, perplexity_metrics, require_overlap_packages, summarize
from common.options import (
    CAUSAL_LM,
    CHAT,
    CLASSIFICATION,
    ChatDataConfig,
    ClassificationDataConfig,
    CorpusDataConfig,
    DecisionConfig,
    DeviceConfig,
    ModelConfig,
    check,
    option,
    parse_given,
)
from common.text.prompts import check_prompt
from common.use.compared import compare, options_of_each, runs_to_compare
from common.use.runs import Run, open_run

# torch and what needs it is imported inside the functions: options and data are checked before, in a moment.


@dataclass
class Config(ModelConfig, ClassificationDataConfig, CorpusDataConfig, ChatDataConfig, DecisionConfig, DeviceConfig):
    """evaluate"""

    run: str | None = option(None, "run folder, adapter folder, or base model", binds=False)
    compare: list[str] | None = option(
        None, "runs, folders of several seeds, and `base`: each against the first, on the same rows", binds=False
    )
    task: Literal["classification", "causal_lm", "chat"] | None = option(
        None, "for a base model; unset: classification", binds=False
    )
    split: Literal["train", "validation", "test"] = option("test", "split of the run to evaluate on", binds=False)
    decode: Literal["score", "generate"] | None = option(
        None, "labels: score every one (unset), or generate text greedily", binds=False, tasks=[CLASSIFICATION]
    )
    max_new_tokens: int | None = option(
        None, "conversations: tokens of an answer at most; unset: 256, or the longest reference's",
        at_least=1, tasks=[CHAT],
    )  # fmt: skip
    per_device_eval_batch_size: int = option(
        16, "a pass holds the tokens of this many of the longest rows", at_least=1, binds=False
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "unset: as trained; for a base model, bf16 where the device has it"
    )
    output_dir: str | None = option(
        None, "unset: RUN/eval/<split>, or one in outputs/<model>/eval for a base model; --compare: that of RUN_A",
        binds=False,
    )  # fmt: skip


def read_options(given: dict[str, Any], run: Run | None = None) -> tuple[Config, Run, bool]:
    """The options, the run (or base model), and whether the rows are others than the run's own.

    given: the options of the command line. Data and labels are those of the run unless it names others.
    """
    run = run or open_run(given.get("run"), given.get("task"))
    if given.get("fit_decisions"):
        if run.folder is None:
            raise InputError(f"--fit_decisions: {run.name} is a base model. Name a trained run with --run.")
        given.setdefault("split", "test" if "test_file" in given else "validation")
    defaults = run.options_for_rows(given)
    config = run.configure(Config, given, defaults)
    check(config)
    return config, run, run.folder is None or "test_file" in given


def require_rows(rows: Sequence[Any], config: Config) -> None:
    if not len(rows):
        raise InputError(f"There are no {config.split} rows: name some with --test_file.")


def evaluate_classifier(config: Config, run: Run, other_rows: bool, reuse: bool = False) -> Path:
    """Accuracy, F1 and predictions of a classifier, or of a base model that is prompted."""
    config.decode = config.decode or "score"
    data = load_classification(config, training=False)
    of_training = config.split == "train"  # without the rows that the prompt has
    shots, unshown = draw_few_shot(data, config) if of_training or run.folder is None else ([], [])
    examples = unshown if of_training else data.splits[config.split]
    require_rows(examples, config)
    if run.folder is None:
        config.labels = data.labels
        path = resolve_model(config.model, config.revision)
        check_prompt(config, data, path, config.revision)
    else:
        run.check_labels(data.labels, data.multi_label)
        if not other_rows:
            run.check_unchanged(data.sources, config.split)
        if run.trained["approach"] == "head" and config.decode == "generate":
            raise InputError("--decode generate: this run has a classification head and writes no text.")
    decode = "head" if run.trained.get("approach") == "head" else config.decode
    name = f"{config.split}-generate" if decode == "generate" else config.split
    target = run.results_folder(config, name, other_rows)
    if reuse and run.has_results(target, data.sources, config.split, decode=decode):
        return target

    from common.measure import baselines, report
    from common.measure.partial_results import measure_in_chunks
    from common.measure.scoring import predict
    from common.train import loop
    from common.use.fit_decisions import check_fit, fit_decisions

    if config.fit_decisions:
        check_fit(config, run, examples)
    run.resolve(config)
    accelerator = loop.start_accelerator(config)
    model = run.load_classifier(config, accelerator.device, data.multi_label, examples, shots)
    classifier = model.classifier
    measure = partial(predict, classifier, accelerator=accelerator, batch_size=config.per_device_eval_batch_size,
                      decode=config.decode, decision=None if config.fit_decisions else model.decision)  # fmt: skip
    answers, seconds = measure_in_chunks(measure, examples, what=config.split, restore=Answer.restored,
                                **run.partial_results(config, data.sources, accelerator))  # fmt: skip
    if config.fit_decisions:
        if accelerator.is_main_process:
            say(accelerator, f"{fit_decisions(config, run, examples, answers)}\nSaved in {run.folder}.")
        loop.finish(accelerator)
        return target
    gold = [example.labels for example in examples]
    metrics = summarize(answers, gold, data.labels) | evaluation_cost(len(examples), time.perf_counter() - seconds)
    if accelerator.is_main_process:
        metrics, results = run.results(target, data.sources, config.split, metrics, usual=not other_rows)
        if run.weights:
            kept = baselines.measure_kept(run.run_folder, target, examples, data.labels, data.multi_label)
            results |= {name: {**results.get(name, {}), **measured} for name, measured in kept.items()}
        say(accelerator, report.write_classification(target, metrics, results, config.split, classifier=classifier,
                                                     examples=examples, answers=answers, decode=config.decode))
        outside = f"{metrics['outside_label_set']} of {metrics['rows']} answers outside the label set"
        speed = f"{metrics['examples_per_second']:.1f} examples/s"
        say(accelerator, f"\n{outside}; {speed}; {run.loaded_as(config)}\nWritten to {target}")
    loop.finish(accelerator, last=not reuse)
    return target


def evaluate_text(config: Config, run: Run, other_rows: bool, reuse: bool = False) -> Path:
    """Perplexity of a model on running text."""
    sources = open_sources(config, training=False)
    named = {split: source.origin for split, source in sources.items()}
    if run.folder and not other_rows:
        run.check_unchanged(named, config.split)
    windows_of = {name: run.options.get(name, getattr(CorpusDataConfig, name)) for name in ("block_size", "stride")}
    usual = all(getattr(config, name) == value for name, value in windows_of.items())
    windows = f"{config.block_size}-{config.stride or config.block_size}"
    target = run.results_folder(config, config.split if usual else f"{config.split}-windows-{windows}", other_rows)
    if reuse and run.has_results(target, named, config.split):
        return target
    path = str(run.folder or resolve_model(config.model, config.revision))

    from common.measure import report
    from common.measure.partial_results import measure_in_chunks
    from common.measure.perplexity import continue_text, row_losses
    from common.model import attention, base_model
    from common.model.generation import positions
    from common.model.token_losses import TokenLosses
    from common.text.batches import collate_blocks
    from common.train import loop

    run.resolve(config)
    accelerator = loop.start_accelerator(config)
    tokenizer = base_model.load_tokenizer(path, config)
    start = run.trained.get("start", base_model.start_ids(tokenizer))
    data = load_corpus_once(sources, config, tokenizer, accelerator)
    blocks = data.splits[config.split]
    require_rows(blocks, config)
    model = run.load_text_model(config, accelerator.device).model
    most = positions(model) or config.block_size + len(start)
    if config.block_size + len(start) > most:
        raise InputError(f"--block_size {config.block_size}: longer than the {most} positions of the model.")
    if config.document_masking:
        attention.check_masks(model, config, "document_masking", config.block_size + len(start))
    collate = partial(collate_blocks, start=start, end_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
                      document_masking=config.document_masking)  # fmt: skip
    measure = partial(row_losses, TokenLosses(model), collate=collate, accelerator=accelerator,
                      batch_size=config.per_device_eval_batch_size)  # fmt: skip
    losses, seconds = measure_in_chunks(measure, blocks, what=config.split, restore=tuple,
                               **run.partial_results(config, data.sources, accelerator))  # fmt: skip
    units, unit = units_of(blocks)
    metrics = perplexity_metrics(losses, data.per_token[config.split], units=units, unit=unit)
    metrics |= evaluation_cost(len(blocks), time.perf_counter() - seconds)
    sample = continue_text(model, tokenizer, config.sample_prompt, accelerator, seed=42)
    if accelerator.is_main_process:
        metrics, results = run.results(target, data.sources, config.split, metrics, usual and not other_rows)
        say(accelerator, report.write_causal_lm(target, metrics, results, config.split, blocks=losses, units=units,
                                                sample=sample))  # fmt: skip
        before = f"after {tokenizer.decode(start)}" if start else "without a BOS token before them"
        apart = f"windows of {config.block_size} tokens, {config.stride or config.block_size} apart, {before}"
        say(accelerator, f"\n{apart}: {metrics['predicted_tokens']:,} tokens predicted; {run.loaded_as(config)}")
        say(accelerator, f"A sample: {sample}\n\nWritten to {target}")
    loop.finish(accelerator, last=not reuse)
    return target


def evaluate_chat(config: Config, run: Run, other_rows: bool, reuse: bool = False) -> Path:
    """Loss of the reference answers, and greedy answers of the model beside them."""
    require_overlap_packages()
    data = load_conversations(config, training=False)
    require_rows(data.splits[config.split], config)
    if run.folder and not other_rows:
        run.check_unchanged(data.sources, config.split)
    target = run.results_folder(config, config.split, other_rows)
    if reuse and run.has_results(target, data.sources, config.split):
        return target

    from common.measure import report
    from common.measure.answers import answer_conversations, answer_length
    from common.measure.partial_results import measure_in_chunks
    from common.measure.perplexity import row_losses
    from common.model import base_model
    from common.model.token_losses import TokenLosses
    from common.text.batches import collate_chat
    from common.text.chat import FITTED, chat_rows, conversation_numbers
    from common.train import loop

    run.resolve(config)
    accelerator = loop.start_accelerator(config)
    if run.folder is None:
        base_model.check_length(resolve_model(config.model, config.revision), config, config.max_length, "--max_length")
    chat = run.load_text_model(config, accelerator.device)
    data.splits = {config.split: data.splits[config.split]}
    rows = chat_rows(data, chat.template, config.max_length, config.loss_on)[config.split]
    batch_size = config.per_device_eval_batch_size
    collate = partial(collate_chat, pad_id=chat.tokenizer.pad_token_id)
    losses = row_losses(TokenLosses(chat.model), rows, collate=collate, accelerator=accelerator,
                        batch_size=batch_size, what=config.split)  # fmt: skip
    conversations = data.splits[config.split]
    most = config.max_new_tokens or answer_length(chat.tokenizer, conversations, config.max_length)
    measure = partial(answer_conversations, chat.model, chat.tokenizer, chat.template, accelerator=accelerator,
                      max_length=config.max_length, max_new_tokens=most, batch_size=batch_size)  # fmt: skip
    answers, seconds = measure_in_chunks(measure, conversations, what="answers", restore=dict,
                                **run.partial_results(config, data.sources, accelerator))  # fmt: skip
    units = conversation_numbers(rows)
    for answer, (nats, count) in zip(answers, sums_of(losses, units).tolist(), strict=True):
        answer |= {"nats": nats, "predicted_tokens": int(count)}
    metrics = chat_metrics(losses, units, answers) | evaluation_cost(len(answers), time.perf_counter() - seconds)
    if accelerator.is_main_process:
        metrics, results = run.results(target, data.sources, config.split, metrics, usual=not other_rows)
        say(accelerator, report.write_chat(target, metrics, results, config.split, answers=answers))
        speed = f"{metrics['examples_per_second']:.1f} examples/s"
        say(accelerator, f"\n{speed}; {run.loaded_as(config)}; samples in {target / 'report.md'}")
        fitted = [f"{name.replace('_', ' ')} {data.report['rows'][config.split][name]}" for name in FITTED]
        say(accelerator, f"Rows made to fit --max_length {config.max_length}: {', '.join(fitted)}")
    loop.finish(accelerator, last=not reuse)
    return target


def main() -> None:
    given = parse_given(Config)
    evaluations = {CLASSIFICATION: evaluate_classifier, CAUSAL_LM: evaluate_text, CHAT: evaluate_chat}
    if "compare" not in given:
        config, run, other_rows = read_options(given)
        evaluations[run.task](config, run, other_rows)
        return
    compared = runs_to_compare(given)
    read = {name: [read_options(options_of_each(given), run) for run in runs] for name, runs in compared.items()}
    folders = {name: [evaluations[each[1].task](*each, reuse=True) for each in runs] for name, runs in read.items()}
    compare(given, folders, {name: [(run, config) for config, run, _ in runs] for name, runs in read.items()})


if __name__ == "__main__":
    with cli_errors("The same command continues with the rows that are left."):
        main()
