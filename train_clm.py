"""Trains a causal language model on running text: the next token of blocks of a corpus.

    accelerate launch train_clm.py                                  # the embedded model on Python's documentation
    accelerate launch train_clm.py --train_file train.txt --validation_file valid.txt --test_file test.txt
    accelerate launch train_clm.py --train_file posts.jsonl --text_fields title body --document_masking true
    accelerate launch train_clm.py --dataset_name Salesforce/wikitext --dataset_config wikitext-2-raw-v1

LoRA on a 4-bit NF4 base by default; `--help` lists the options. Not supported: encoders, encoder-decoder models.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from common.data.corpus import Block, Source, load_corpus_once, open_sources, units_of
from common.data.report import corpus_report
from common.data.splits import origin
from common.errors import RESUME_HINT, InputError, cli_errors
from common.hub import resolve_model
from common.log import RunLog, chosen_trackers, evaluation_cost, say
from common.measure.metrics import TASKS, choosable, perplexity_metrics
from common.model.initial import initial_adapter
from common.model.losses import token_losses
from common.options import CAUSAL_LM, CorpusDataConfig, RunConfig, option, parse_config
from common.train.run_folder import RunFolder
from common.train.seeds import configs_per_seed, train_each

if TYPE_CHECKING:
    import torch

    from common.text.batches import Batch

# torch and what needs it is imported by `train`: options and data are checked before, in a moment.


@dataclass
class Config(RunConfig, CorpusDataConfig):
    """train_clm"""

    learning_rate: float = option(2e-4, "peak learning rate", at_least=0)
    gradient_accumulation_steps: int = option(8, "forward passes per update", at_least=1, binds=False)
    num_train_epochs: float = option(1, "passes over the training blocks", at_least=0)
    metric_for_best_model: str = option(
        "eval_loss", "validation metric that chooses the best weights", choices=choosable(CAUSAL_LM)
    )


def loss_of(model: "torch.nn.Module", batch: "Batch") -> "torch.Tensor":
    """The SUM of weight x loss over the targets of one micro-batch. Change this one first."""
    losses = token_losses(model, batch)  # [targets]
    return (losses * batch.weights).sum()


def evaluate(
    row_losses: Callable[..., list[tuple[float, int]]], blocks: Sequence[Block], per_token: dict[str, float], what: str
) -> tuple[list[tuple[float, int]], dict[str, Any]]:
    """(loss sum in nats, predicted tokens) of every block, and their metrics: sums and counts over all ranks.

    row_losses: `common.measure.perplexity.row_losses` of the model.
    """
    started = time.perf_counter()
    losses = row_losses(blocks, what=what)
    units, unit = units_of(blocks)
    return losses, perplexity_metrics(losses, per_token, units=units, unit=unit) | evaluation_cost(len(blocks), started)


def train(config: Config, sources: dict[str, Source], path: str, last: bool = True) -> dict[str, Any]:
    """One run from the base model to its evaluated weights; returns its figures. last: no further run follows."""
    import torch
    from accelerate.utils import set_seed

    from common.measure import baselines, report
    from common.measure.figures import draw_learning_curve, say_what_is_missing
    from common.measure.model_card import complete_card
    from common.measure.perplexity import continue_text, row_losses
    from common.model import attention, base_model, lora, storage
    from common.model.token_losses import TokenLosses
    from common.text import batches
    from common.text.plan import Plan
    from common.train import ahead, dry_run, loop
    from common.train.checkpoints import load_state, save_best, save_checkpoint

    run = RunFolder(config)
    base_model.resolve_options(config, base_model.is_encoder(path, config))
    accelerator = loop.start_accelerator(config, chosen_trackers(config.report_to))
    say_what_is_missing(accelerator, config.report_to)

    # --- data
    tokenizer = base_model.load_tokenizer(path, config)
    start = base_model.start_ids(tokenizer)
    base_model.check_length(path, config, config.block_size + len(start), "--block_size")
    data = load_corpus_once(sources, config, tokenizer, accelerator)
    rows = examples = data.splits["train"]
    test = data.splits["test"]
    shown, begin = str(tokenizer.decode(rows[0].tokens)), str(tokenizer.decode(start))
    report_text = corpus_report(data.report, begin, not config.document_masking, shown)
    say(accelerator, report_text)
    begin_with = initial_adapter(config, path, CAUSAL_LM, start=start)

    # --- model
    set_seed(config.seed)  # the adapter's first weights depend on the seed alone
    base, missing = base_model.load_base(path, config, device=accelerator.device)
    if config.document_masking:
        attention.check_masks(base, config, "document_masking", config.block_size + len(start))
    base = begin_with(lora.make_trainable(base, config, missing))
    module = TokenLosses(base)
    census = base_model.census(module)
    say(accelerator, report.census_table(census, config.mixed_precision))

    # --- optimizer, scheduler
    batch_size = config.per_device_train_batch_size
    rows_per_update = batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    plan = Plan(rows.lengths, rows_per_update, config.seed)
    total = loop.total_updates(config, plan.updates_per_epoch)
    optimizer = loop.make_optimizer(module, config)
    scheduler = loop.make_scheduler(optimizer, config, total)
    flops = loop.flops_per_token(base)
    model, optimizer = loop.prepare(accelerator, module, optimizer, scheduler, config)
    say(accelerator, loop.describe_plan(accelerator, total, rows_per_update, "blocks"))

    # --- run folder, resume
    run.start(
        accelerator,
        data,
        path,
        splits={"pieces cut from train": data.cut},
        data_report=report_text,
        census=census,
        fingerprint={"rows_per_update": rows_per_update},
    )
    collate = partial(
        batches.collate_blocks,
        start=start,
        end_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        document_masking=config.document_masking,
    )
    set_seed(config.seed, device_specific=True)  # dropout differs between ranks
    state = load_state(accelerator, run)

    def measure(
        blocks: Sequence[Block], what: str, model: torch.nn.Module = model, split: str = "test"
    ) -> tuple[list[tuple[float, int]], dict[str, Any]]:
        losses_of = partial(row_losses, model, collate=collate, accelerator=accelerator,
                            batch_size=config.per_device_eval_batch_size)  # fmt: skip
        return evaluate(losses_of, blocks, data.per_token[split], what)

    def validate() -> dict[str, Any]:
        return measure(data.splits["validation"], "validation", split="validation")[1]

    write = partial(storage.save_language_model, model=base, tokenizer=tokenizer, start=start, config=config)
    keep_best = partial(save_best, accelerator, run, write)
    if config.dry_run:
        return dry_run.predict(
            run, accelerator, plan, total, rows, model=model, optimizer=optimizer, collate=collate, loss_of=loss_of,
            validation=dry_run.Evaluation(
                data.splits["validation"], partial(measure, what="validation", split="validation")),
            test=dry_run.Evaluation(test, partial(measure, what="test")),
            keep_best=keep_best, save=partial(save_checkpoint, accelerator, run, lambda: state, None), last=last,
        )  # fmt: skip
    log = RunLog(run.path, accelerator, config, total, state.update)
    ledger = ahead.Ledger(accelerator, state, log)
    save = partial(save_checkpoint, accelerator, run, ledger.settle, config.save_total_limit)
    planned = ahead.batches_ahead(plan.updates(state.update, total), rows, batch_size, accelerator, collate)
    updates = loop.until_stopped(planned, accelerator, save)
    # A batch of R rows with T target tokens (common/text/batches.py): input_ids, attention_mask, position_ids
    # [R, length]; positions [T], where in the flattened batch the targets are predicted; targets, weights, rows [T].
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
    storage.load_weights(base, run.best)  # what was saved is what is measured
    figures = {"epochs": state.update / plan.updates_per_epoch, **state.summary(flops)}
    log.write(state.update, figures)
    losses, metrics = measure(test, "test") if test else ([], {})
    results = {"this run": metrics}
    if config.baselines and test:
        file = run.path / "eval" / "test" / "baselines.json"
        results |= baselines.untrained(file, base, path, config, accelerator, test, lambda *a, **k: measure(*a, **k)[1])
    sample = continue_text(base, tokenizer, config.sample_prompt, accelerator, config.seed)
    if accelerator.is_main_process:
        if test:
            metrics |= origin(data.sources, "test", run.best)
            table = report.write_causal_lm(run.path / "eval" / "test", {**figures, **metrics}, results, "test",
                                           blocks=losses, units=units_of(test)[0], sample=sample)  # fmt: skip
            say(accelerator, f"\n{table}")
        say(accelerator, f"\nA sample: {sample}")
        draw_learning_curve(run.path, TASKS[CAUSAL_LM].curve)
        complete_card(run.path)
        run.finish()
        say(accelerator, f"\nRun folder: {run.path}\nEvaluate again: python evaluate.py --run {run.path}")
    loop.finish(accelerator, model, optimizer, last=last)
    return {**figures, **metrics}


def main() -> None:
    config = parse_config(Config)
    runs = configs_per_seed(config)
    sources = open_sources(config)
    if config.eval_strategy != "no" and "validation" not in sources and not config.validation_fraction:
        raise InputError("--eval_strategy needs validation text: set --validation_fraction, or --eval_strategy no.")
    path = resolve_model(config.model, config.revision)
    # What --init_adapter names is looked at before torch is imported, and again once all is known.
    initial_adapter(config, path, CAUSAL_LM)
    train_each(runs, config, partial(train, sources=sources, path=path))


if __name__ == "__main__":
    with cli_errors(RESUME_HINT):
        main()
