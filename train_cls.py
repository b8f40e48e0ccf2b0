"""Fine-tunes a language model to classify texts: it answers with a label, or gets a classification head.

    accelerate launch train_cls.py                                  # the embedded model on the demo data, CPU or GPU
    accelerate launch train_cls.py --train_file my.csv --text_fields title body --label_column topic
    accelerate launch train_cls.py --train_file my.csv --label_columns sports politics art --approach head
    accelerate launch train_cls.py --config configs/arxiv_llama.yaml --output_dir outputs/arxiv

LoRA on a 4-bit NF4 base by default; `--help` lists the options. Not supported: encoder-decoder models, regression.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from common.data.classification import ClassificationData, Example, class_weights, draw_few_shot, load_classification
from common.data.report import data_report
from common.data.splits import origin
from common.errors import RESUME_HINT, InputError, cli_errors
from common.hub import resolve_model
from common.log import RunLog, chosen_trackers, evaluation_cost, say
from common.measure.metrics import TASKS, choosable, summarize
from common.model.initial import initial_adapter
from common.model.losses import label_losses, token_losses
from common.options import CLASSIFICATION, ClassificationDataConfig, PackConfig, RunConfig, option, parse_config
from common.text.prompts import check_prompt, classification_rows, read_template, show_row
from common.train.run_folder import RunFolder
from common.train.seeds import configs_per_seed, train_each

if TYPE_CHECKING:
    import torch

    from common.measure.label_answer import Answer
    from common.model.classifier import Classifier
    from common.text.batches import Batch

# torch and what needs it is imported by `train`: options and data are checked before, in a moment.


@dataclass
class Config(RunConfig, PackConfig, ClassificationDataConfig):
    """train_cls"""

    metric_for_best_model: str = option(
        "f1_macro", "validation metric that chooses the best weights", choices=choosable(CLASSIFICATION)
    )


def loss_of(model: "torch.nn.Module", batch: "Batch") -> "torch.Tensor":
    """The SUM of weight x loss over the targets of one micro-batch. Change this one first."""
    if batch.for_head:
        logits = model(**batch.inputs)  # [rows, labels]
        losses = label_losses(logits, batch)
    else:
        losses = token_losses(model, batch)  # [targets]
    return (losses * batch.weights).sum()


def evaluate(
    predict: "Callable[..., list[Answer]]",
    classifier: "Classifier",
    examples: Sequence[Example],
    what: str,
    probabilities: bool = False,
) -> "tuple[list[Answer], dict[str, Any]]":
    """Answers to `examples` in their order, and their metrics: sums and counts over all ranks, no means of means.

    predict: `common.measure.scoring.predict`. probabilities: of every label, too, which takes most of the time.
    """
    started = time.perf_counter()
    answers = predict(classifier, examples, what=what, probabilities=probabilities)
    metrics = summarize(answers, [example.labels for example in examples], classifier.prompt.labels)
    return answers, metrics | evaluation_cost(len(examples), started)


def train(config: Config, data: ClassificationData, path: str, last: bool = True) -> dict[str, Any]:
    """One run from the base model to its evaluated weights; returns its figures. last: no further run follows."""
    import torch
    from accelerate.utils import set_seed

    from common.measure import baselines, report
    from common.measure.figures import draw_learning_curve, say_what_is_missing
    from common.measure.model_card import complete_card
    from common.measure.scoring import ROWS_AT_ONCE, predict
    from common.model import attention, base_model, lora, storage
    from common.model.classifier import Classifier, HeadClassifier, classification_prompt
    from common.model.token_losses import TokenLosses
    from common.text import batches
    from common.text.plan import Plan
    from common.train import ahead, dry_run, loop
    from common.train.checkpoints import load_state, save_best, save_checkpoint

    run = RunFolder(config)
    encoder, head = base_model.is_encoder(path, config), config.approach == "head"
    base_model.resolve_options(config, encoder, head)
    accelerator = loop.start_accelerator(config, chosen_trackers(config.report_to))
    say_what_is_missing(accelerator, config.report_to)

    # --- data
    shots, examples = draw_few_shot(data, config)
    validation, test = data.splits["validation"], data.splits["test"]
    base_model.check_length(path, config, config.max_length, "--max_length")
    tokenizer = base_model.load_tokenizer(path, config)
    template = read_template(config.prompt_template, config.approach)
    prompt = classification_prompt(tokenizer, encoder, labels=data.labels, multi_label=data.multi_label,
                                   template=template, max_length=config.max_length, few_shot=shots)  # fmt: skip
    prompt.reserve(examples)
    weights = class_weights(config.class_weights, examples, data.labels, data.multi_label)
    rows = classification_rows(examples, prompt, weights)
    prompt.count_shortened(data, examples)
    report_text = data_report(data.report, show_row(rows[0], tokenizer))
    say(accelerator, report_text)
    begin_with = initial_adapter(config, path, CLASSIFICATION, labels=data.labels if head else None,
                                 approach=config.approach, multi_label=data.multi_label, template=template)  # fmt: skip

    # --- model
    set_seed(config.seed)  # the first weights of adapter and head depend on the seed alone
    base, missing = base_model.load_base(path, config, labels=data.labels if head else None,
                                         multi_label=data.multi_label, device=accelerator.device)  # fmt: skip
    shared_prefix = attention.resolve_shared_prefix(base, config, encoder)
    base = begin_with(lora.make_trainable(base, config, missing, head))
    module = HeadClassifier(base, encoder) if head else TokenLosses(base)
    census = base_model.census(module)
    say(accelerator, report.census_table(census, config.mixed_precision))

    # --- optimizer, scheduler
    batch_size = config.per_device_train_batch_size
    rows_per_update = batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    lengths = [row.length for row in rows]
    plan = Plan(lengths, rows_per_update, config.seed)
    total = loop.total_updates(config, plan.updates_per_epoch)
    optimizer = loop.make_optimizer(module, config)
    scheduler = loop.make_scheduler(optimizer, config, total)
    flops = loop.flops_per_token(base)
    model, optimizer = loop.prepare(accelerator, module, optimizer, scheduler, config)
    classifier = Classifier(module if head else base, prompt, tokenizer)
    prefix = batches.describe_prefix([row.prompt for row in rows], lengths, batch_size, shared_prefix)
    say(accelerator, f"{loop.describe_plan(accelerator, total, rows_per_update)}; {prefix}")

    # --- run folder, resume
    trained = {**data.splits, "train": examples}
    split_ids = {split: [example.id for example in part] for split, part in trained.items()}
    run.start(
        accelerator,
        data,
        path,
        splits={"ids": split_ids, "few_shot": [text for text, _ in shots]},
        data_report=report_text,
        census=census,
        fingerprint={"rows_per_update": rows_per_update, "prompt": prompt.hash, "weights of the labels": weights},
    )
    measure = partial(evaluate, partial(predict, accelerator=accelerator, batch_size=config.per_device_eval_batch_size))
    set_seed(config.seed, device_specific=True)  # dropout differs between ranks
    state = load_state(accelerator, run)
    collate = partial(batches.collate_rows, pad_id=tokenizer.pad_token_id, encoder=encoder,
                      shared_prefix=shared_prefix, pos_weight=weights if data.multi_label else None)  # fmt: skip

    def passed(examples: Sequence[Example], **options: Any) -> dry_run.Evaluation:
        lengths = [len(rendered.ids) for rendered in prompt.prompts([example.text for example in examples])]
        return dry_run.Evaluation(examples, partial(measure, classifier, **options), lengths, ROWS_AT_ONCE)

    def validate() -> dict[str, Any]:
        return measure(classifier, validation, what="validation")[1]

    write = partial(storage.save_classifier, classifier=classifier, config=config)
    keep_best = partial(save_best, accelerator, run, write)
    if config.dry_run:
        return dry_run.predict(
            run, accelerator, plan, total, rows, model=model, optimizer=optimizer, collate=collate, loss_of=loss_of,
            validation=passed(validation, what="validation"), test=passed(test, what="test", probabilities=True),
            keep_best=keep_best, save=partial(save_checkpoint, accelerator, run, lambda: state, None), last=last,
            fit_baselines=partial(baselines.fit, run.path, data, config.split_seed),
        )  # fmt: skip
    log = RunLog(run.path, accelerator, config, total, state.update)
    ledger = ahead.Ledger(accelerator, state, log)
    save = partial(save_checkpoint, accelerator, run, ledger.settle, config.save_total_limit)
    planned = ahead.batches_ahead(plan.updates(state.update, total), rows, batch_size, accelerator, collate)
    updates = loop.until_stopped(planned, accelerator, save)
    # A batch of R rows with T target tokens (common/text/batches.py): input_ids, attention_mask, position_ids
    # [R, length]; positions [T], where in the flattened batch the targets are predicted; targets, weights, rows [T].
    # In a shared-prefix pack: input_ids [1, prefix + R x row].
    # For a classification head: positions [R], the last tokens; targets, weights [R], or [R, labels] if multi-label.
    # --- loop
    for numbers, collated in updates:  # the row numbers of one update, the same on every rank
        if config.early_stopping_patience and state.stale_evaluations >= config.early_stopping_patience:
            break
        started = time.perf_counter()
        model.train()
        micro_batches = collated()  # on a GPU made by a thread, while the update before ran
        target_count = accelerator.reduce(loop.count_targets(micro_batches), "sum")  # on all ranks
        loss_sum = torch.zeros_like(target_count)
        for i, batch in enumerate(micro_batches):
            with loop.sync_context(accelerator, model, last=i == len(micro_batches) - 1):
                loss = loss_of(model, batch)
                accelerator.backward(loss * accelerator.num_processes / target_count)  # DDP averages; undo it
            loss_sum += loss.detach()
        loss_sum = accelerator.reduce(loss_sum, "sum")
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
        ids = (examples[i].id for i in numbers)
        ledger.check(loss_sum, target_count, norm, loop.learning_rates(scheduler), ids)  # stops a broken run
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ledger.count(plan.lengths[numbers].tolist(), time.perf_counter() - started)
        if loop.is_due(config.eval_strategy, config.eval_steps, state.update, plan.updates_per_epoch, total):
            ledger.settle()  # before anything is kept
            metrics = validate()
            log.write(state.update, {"split": "validation", **metrics})
            if state.improves(config.metric_for_best_model, metrics):
                keep_best()
        if loop.is_due(config.save_strategy, config.save_steps, state.update, plan.updates_per_epoch, total):
            save()
    # --- end loop

    updates.close()  # signals end the program from here on
    ledger.close()
    if state.best_update is None:
        keep_best()
    storage.load_weights(classifier.model, run.best)  # what was saved is what is measured
    figures = {"epochs": state.update / plan.updates_per_epoch, **state.summary(flops)}
    log.write(state.update, figures)
    answers, metrics = measure(classifier, test, what="test", probabilities=True) if test else ([], {})
    results = {"this run": metrics}
    if config.baselines and test:
        results |= baselines.measure(run.path, classifier=classifier, data=data, path=path, config=config,
                                     accelerator=accelerator, evaluate=measure)  # fmt: skip
    if accelerator.is_main_process:
        if test:
            metrics |= origin(data.sources, "test", run.best)
            table = report.write_classification(run.path / "eval" / "test", {**figures, **metrics}, results, "test",
                                                classifier=classifier, examples=test, answers=answers)  # fmt: skip
            say(accelerator, f"\n{table}")
        draw_learning_curve(run.path, TASKS[CLASSIFICATION].curve)
        complete_card(run.path)
        run.finish()
        say(accelerator, f"\nRun folder: {run.path}\nEvaluate again: python evaluate.py --run {run.path}")
    loop.finish(accelerator, model, optimizer, last=last)
    return {**figures, **metrics, "run_folder": str(run.path)}


def main() -> None:
    config = parse_config(Config)
    runs = configs_per_seed(config)
    data = load_classification(runs[0])
    if config.eval_strategy != "no" and not data.splits["validation"]:
        raise InputError("--eval_strategy needs validation rows: set --validation_fraction, or --eval_strategy no.")
    path = resolve_model(config.model, config.revision)
    check_prompt(config, data, path, config.revision)
    # What --init_adapter names is looked at before torch is imported, and again once all is known.
    initial_adapter(config, path, CLASSIFICATION, approach=config.approach, multi_label=data.multi_label,
                    template=read_template(config.prompt_template, config.approach))  # fmt: skip

    def train_one(run: Config, last: bool) -> dict[str, Any]:
        return train(run, load_classification(run) if run.fold else data, path, last)

    train_each(runs, config, train_one)


if __name__ == "__main__":
    with cli_errors(RESUME_HINT):
        main()
