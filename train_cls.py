"""Fine-tunes a language model to classify texts: it answers with a label, or gets a classification head.

    accelerate launch train_cls.py                                  # the embedded model on the demo data, CPU or GPU
    accelerate launch train_cls.py --train_file my.csv --text_fields title body --label_column topic
    accelerate launch train_cls.py --train_file my.csv --label_columns sports politics art --approach head
    accelerate launch train_cls.py --config configs/arxiv_llama.yaml --output_dir outputs/arxiv

LoRA on a 4-bit NF4 base by default; `--help` lists the options. Not supported: encoder-decoder models, regression.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from common import disk
from common.data.classification import (
    ClassificationData,
    Example,
    class_weights,
    draw_few_shot,
    load_classification,
)
from common.errors import InputError, cli_errors
from common.hub import resolve_model
from common.log import RunLog, chosen_trackers, say
from common.options import (
    RESUME,
    ClassificationConfig,
    DataConfig,
    LoopConfig,
    LoraArguments,
    ModelConfig,
    PackConfig,
    check_classification,
    check_loop,
    option,
    parse_config,
)
from common.text.prompts import check_prompt, read_template
from common.train import run_folder
from common.train.seeds import finish as finish_seeds
from common.train.seeds import keep_others, runs_of

# torch and what stands on it is imported inside the functions: options and data are checked before, in a moment.


@dataclass
class Config(ModelConfig, LoraArguments, LoopConfig, DataConfig, PackConfig, ClassificationConfig):
    """train_cls"""

    metric_for_best_model: Literal["f1_macro", "f1_micro", "accuracy", "eval_loss"] = option(
        "f1_macro", "validation metric that chooses the best weights"
    )


def loss_of(model: Any, batch: dict[str, Any]) -> Any:
    """The SUM of weight x loss over the targets of one micro-batch. Change this one first."""
    from common.train.loop import label_loss

    output = model(**batch["inputs"])
    if "pool" in batch["inputs"]:  # the logits of a classification head
        return label_loss(output, batch)
    return (output * batch["weights"]).sum()


def evaluate(
    classifier: Any,
    examples: Sequence[Example],
    accelerator: Any,
    batch_size: int,
    what: str,
    probabilities: bool = False,
) -> tuple:
    """Answers to `examples` in their order, and their metrics: sums and counts over all ranks, no means of means.

    probabilities: of every label, which the metrics do not need and which cost most of the time.
    """
    from common.measure.metrics import summarise
    from common.measure.scoring import predict
    from common.train.loop import evaluation_cost

    started = time.perf_counter()
    answers = predict(classifier, examples, accelerator, batch_size, what, probabilities=probabilities)
    metrics = summarise(answers, [example.labels for example in examples], classifier.prompt.labels)
    return answers, metrics | evaluation_cost(len(examples), started, accelerator.device)


def train(config: Config, data: ClassificationData, path: str, another: bool = False) -> dict[str, Any]:
    """One run from the base model to its evaluated weights; returns its figures. another: a further run follows."""
    import torch
    from accelerate.utils import broadcast_object_list, set_seed

    from common.data.report import data_report as data_report_text
    from common.measure import baselines, report
    from common.measure.figures import draw_learning_curve, say_what_is_missing
    from common.model import attention, base_model, classifier, lora, storage
    from common.model.classifier import Classifier
    from common.model.token_losses import TokenLosses
    from common.text import batches
    from common.text.plan import Plan
    from common.train import loop
    from common.train.checkpoints import State, load_checkpoint, register_hooks, save_best, save_checkpoint

    given = run_folder.options_hash(config)
    resume = run_folder.find_resume(config) if config.resume_from_checkpoint else None
    encoder, head = base_model.is_encoder(path, config), config.approach == "head"
    base_model.resolve_options(config, encoder, head)
    accelerator = loop.start_accelerator(config, chosen_trackers(config.report_to))
    say_what_is_missing(accelerator, config.report_to)

    # --- data
    shots, examples = draw_few_shot(data, config)
    validation, test = data.splits["validation"], data.splits["test"]
    base_model.check_length(path, config, config.max_length, "--max_length")
    tokenizer = base_model.load_tokenizer(path, config)
    prompt = classifier.classification_prompt(
        tokenizer,
        encoder,
        labels=data.labels,
        multi_label=data.multi_label,
        template=read_template(config.prompt_template, config.approach),
        max_length=config.max_length,
        few_shot=shots,
    )
    prompt.reserve(examples)
    weights = class_weights(config.class_weights, examples, data.labels, data.multi_label)
    rows = batches.classification_rows(examples, prompt, weights)
    prompt.count_shortened(data)
    data_report = data_report_text(data.report, batches.show_row(rows[0], tokenizer))
    say(accelerator, data_report)

    # --- model
    set_seed(config.seed)  # the first weights of adapter and head depend on the seed alone
    model, missing = base_model.load_base(
        path, config, labels=data.labels if head else None, multi_label=data.multi_label, device=accelerator.device
    )
    shared_prefix = attention.resolve_shared_prefix(model, config, encoder)
    if not config.full_finetuning:
        model = lora.add_lora(model, config, missing, head)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = classifier.HeadClassifier(model, encoder) if head else TokenLosses(model)
    if config.torch_compile:
        model.compile(dynamic=True)
    census = base_model.census(model)
    say(accelerator, report.census_table(census, config))

    # --- optimizer, scheduler
    batch_size = config.per_device_train_batch_size
    rows_per_update = batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    lengths = [row.length for row in rows]
    plan = Plan(lengths, rows_per_update, config.seed)
    total = loop.total_updates(config, plan.updates_per_epoch)
    optimizer = loop.make_optimizer(model, config)
    scheduler = loop.make_scheduler(optimizer, config, total)
    flops = loop.flops_per_token(model)
    model, optimizer = accelerator.prepare(
        model, optimizer, device_placement=[not (config.load_in_4bit or config.load_in_8bit), True]
    )
    accelerator.register_for_checkpointing(scheduler)
    register_hooks(accelerator)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inner = accelerator.unwrap_model(model)
    classifier = Classifier(inner if head else inner.model, prompt, tokenizer, head, encoder, [0.5] * len(data.labels))
    say(accelerator, f"{total} updates of {rows_per_update} rows; {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, {torch.get_num_threads()} thread(s) each; "
        f"{batches.describe_prefix([row.prompt for row in rows], lengths, batch_size, shared_prefix)}")  # fmt: skip
    if config.dry_run:
        loop.finish(accelerator, model, optimizer, another=another)
        return {}

    # --- run folder, baselines, resume
    where = [resume[0] if resume else run_folder.new_run_folder(config) if accelerator.is_main_process else None]
    run_dir = Path(broadcast_object_list(where)[0])
    best = run_dir / ("model" if config.full_finetuning else "adapter")
    mark = {
        **run_folder.binding_options(config),
        **{f"content of {source['name']}": source["sha256"][:12] for source in data.sources.values()},
        "rows_per_update": rows_per_update,
        "prompt": prompt.hash,
        "weights of the labels": weights,
    }
    if resume:
        say(accelerator, f"Resumes {run_dir} from {resume[1].name if resume[1] else 'its start: no checkpoint yet'}")
    if accelerator.is_main_process:
        disk.recover(best)
        if not (resume and resume[1]):
            ids = {split: [example.id for example in rows] for split, rows in data.splits.items()}
            splits = {"ids": ids, "few_shot": [text for text, _ in shots]}
            run_folder.write_start(run_dir, config, given, data, splits, data_report, accelerator.num_processes, census)
    accelerator.wait_for_everyone()
    evaluate_rows = partial(evaluate, accelerator=accelerator, batch_size=config.per_device_eval_batch_size)
    results = {}
    if config.baselines and test:
        file = run_dir / "eval" / "test" / "baselines.json"
        results = baselines.measure(file, classifier, data, path, config, accelerator, evaluate_rows)
    set_seed(config.seed, device_specific=True)  # dropout differs between ranks, and baselines change nothing
    state = load_checkpoint(accelerator, resume[1], mark) if resume and resume[1] else State()
    log = RunLog(run_dir, accelerator, config, total, state.update)
    collator = partial(batches.collate_rows, rows, pad_id=tokenizer.pad_token_id, encoder=encoder,
                       shared_prefix=shared_prefix, pos_weight=weights if data.multi_label else None)  # fmt: skip

    def validate() -> dict[str, Any]:
        return evaluate_rows(classifier, validation, what="validation")[1]

    def keep_best() -> None:
        save_best(accelerator, best, partial(storage.save_classifier, classifier=classifier, config=config))

    # --- loop
    for numbers in plan.updates(state.update, total):  # the row numbers of one update, the same on every rank
        if config.early_stopping_patience and state.stale_evaluations >= config.early_stopping_patience:
            break
        started = time.perf_counter()
        model.train()
        micro = loop.micro_batches(numbers, batch_size, accelerator, collator)
        n = accelerator.reduce(loop.count_targets(micro), "sum")  # targets on all ranks
        summed = torch.zeros_like(n)
        for i, batch in enumerate(micro):
            with loop.sync_context(accelerator, model, last=i == len(micro) - 1):
                loss = loss_of(model, batch)
                accelerator.backward(loss * accelerator.num_processes / n)  # DDP averages; undo it
            summed += loss.detach()
        summed = accelerator.reduce(summed, "sum")
        norm = accelerator.clip_grad_norm_(trainable, config.max_grad_norm or math.inf)
        loss = loop.finite_mean(summed, n, norm, accelerator, state.update, [examples[i].id for i in numbers])
        rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        state.count(loss, n.item(), [rows[i].length for i in numbers], time.perf_counter() - started)
        log.update(state, loss, learning_rate=rate, grad_norm=float(norm))
        if loop.is_due(config.eval_strategy, config.eval_steps, state.update, plan.updates_per_epoch, total):
            metrics = validate()
            log.write(state.update, {"split": "validation", **metrics})
            if state.improves(config.metric_for_best_model, metrics):
                keep_best()
        if loop.is_due(config.save_strategy, config.save_steps, state.update, plan.updates_per_epoch, total):
            save_checkpoint(accelerator, run_dir, state, mark, config.save_total_limit)
    # --- end loop

    log.close()
    if state.best_update is None:
        keep_best()
    storage.load_weights(classifier.model, best)  # what was saved is what is measured
    figures = {"epochs": state.update / plan.updates_per_epoch, **state.summary(flops)}
    log.write(state.update, figures)
    answers, metrics = evaluate_rows(classifier, test, what="test", probabilities=True) if test else ([], {})
    if accelerator.is_main_process:
        if test:
            results = {"this run": metrics, **results}
            metrics = {**figures, **metrics}
            report.write_evaluation(run_dir / "eval" / "test", classifier, test, answers, metrics, results)
            say(accelerator, "\n" + report.results_table(results))
        draw_learning_curve(run_dir / "learning_curve.png", run_dir / "metrics.jsonl", "f1_macro")
        run_folder.mark_finished(run_dir)
        say(accelerator, f"\nRun folder: {run_dir}\nEvaluate again: python evaluate.py --run {run_dir}")
    loop.finish(accelerator, model, optimizer, another=another)
    return {**figures, **metrics}


def main() -> None:
    config = parse_config(Config)
    check_loop(config)
    check_classification(config)
    runs = runs_of(config)
    chosen_trackers(config.report_to)
    data = load_classification(config)
    if config.eval_strategy != "no" and not data.splits["validation"]:
        raise InputError("--eval_strategy needs validation rows: set --validation_fraction, or --eval_strategy no.")
    path = resolve_model(config.model, config.revision)
    check_prompt(config, data, path)
    results: dict[int, Any] = {}
    for run in runs:
        with keep_others(results, run, config):
            results[run.seed] = train(run, data, path, another=run is not runs[-1])
    finish_seeds(results, config)


if __name__ == "__main__":
    with cli_errors(RESUME):
        main()
