"""Tunes a language model on instructions and conversations: the loss is on the assistant's answers.

    accelerate launch train_sft.py                                  # the embedded model on the demo conversations
    accelerate launch train_sft.py --train_file alpaca.json --num_train_epochs 3
    accelerate launch train_sft.py --train_file faq.csv --columns instruction=question response=answer
    accelerate launch train_sft.py --model meta-llama/Llama-3.2-1B --chat_template plain --train_file chats.jsonl

Rows are instruction + response, Alpaca, prompt + completion, `messages`, or ShareGPT `conversations`. LoRA on a 4-bit
NF4 base by default; `--help` lists the options. Not supported: encoders, encoder-decoder models, pictures.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from common.data.conversations import ChatData, load_conversations
from common.data.report import data_report
from common.data.splits import origin
from common.errors import RESUME_HINT, InputError, cli_errors
from common.hub import resolve_model
from common.log import RunLog, chosen_trackers, evaluation_cost, say
from common.measure.metrics import TASKS, choosable, perplexity_metrics
from common.model.initial import initial_adapter
from common.model.losses import token_losses
from common.options import CHAT, CHAT_LENGTH, ChatDataConfig, PackConfig, RunConfig, option, parse_config
from common.text.chat import ChatRow, chat_rows, choose_template, conversation_numbers, show_chat_row
from common.train.run_folder import RunFolder
from common.train.seeds import configs_per_seed, train_each

if TYPE_CHECKING:
    import torch

    from common.text.batches import Batch

# torch and what needs it is imported by `train`: options and data are checked before, in a moment.


@dataclass
class Config(RunConfig, PackConfig, ChatDataConfig):
    """train_sft"""

    max_length: int = option(CHAT_LENGTH, "tokens of a conversation", at_least=2, kept=True, settled=True)
    num_train_epochs: float = option(3, "passes over the training rows", at_least=0)
    packing: bool = option(
        False, "experimental: rows of a micro-batch one after another in one sequence, without padding"
    )
    metric_for_best_model: str = option(
        "eval_loss", "validation metric that chooses the best weights", choices=choosable(CHAT)
    )

    def broken_rules(self) -> Iterator[str]:
        if self.packing and self.shared_prefix == "on":
            yield "--packing true and --shared_prefix on exclude each other: drop one"


def loss_of(model: "torch.nn.Module", batch: "Batch") -> "torch.Tensor":
    """The SUM of weight x loss over the targets of one micro-batch. Change this one first."""
    losses = token_losses(model, batch)  # [targets]
    return (losses * batch.weights).sum()


def evaluate(row_losses: Callable[..., list[tuple[float, int]]], rows: Sequence[ChatRow], what: str) -> dict[str, Any]:
    """Loss and perplexity of the answers, given all that comes before them: sums and counts over all ranks.

    row_losses: `common.measure.perplexity.row_losses` of the model.
    """
    started = time.perf_counter()
    losses = row_losses(rows, what=what)
    metrics = perplexity_metrics(losses, units=conversation_numbers(rows), unit="conversations")
    return metrics | evaluation_cost(len(rows), started)


def train(config: Config, data: ChatData, path: str, last: bool = True) -> dict[str, Any]:
    """One run from the base model to its evaluated weights; returns its figures. last: no further run follows."""
    import torch
    from accelerate.utils import set_seed

    from common.measure import baselines, report
    from common.measure.figures import draw_learning_curve, say_what_is_missing
    from common.measure.model_card import complete_card
    from common.measure.perplexity import row_losses
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
    base_model.check_length(path, config, config.max_length, "--max_length")
    tokenizer = base_model.load_tokenizer(path, config)
    template = choose_template(tokenizer, config.chat_template)
    splits = chat_rows(data, template, config.max_length, config.loss_on)
    rows = examples = splits["train"]
    test = splits["test"]
    report_text = data_report(data.report, show_chat_row(rows[0], tokenizer))
    say(accelerator, report_text)
    begin_with = initial_adapter(config, path, CHAT, chat_template_hash=template.hash)

    # --- model
    set_seed(config.seed)  # the adapter's first weights depend on the seed alone
    base, missing = base_model.load_base(path, config, device=accelerator.device)
    if config.packing:
        attention.check_masks(base, config, "packing", config.max_length)
    shared_prefix = "off" if config.packing else attention.resolve_shared_prefix(base, config, encoder=False)
    base = begin_with(lora.make_trainable(base, config, missing))
    module = TokenLosses(base)
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
    prefix = batches.describe_prefix([row.prompt for row in rows], lengths, batch_size, shared_prefix)
    say(accelerator, f"{loop.describe_plan(accelerator, total, rows_per_update)}; {prefix}"
        f"{'; batches without padding' if config.packing else ''}")  # fmt: skip

    # --- run folder, resume
    run.start(
        accelerator,
        data,
        path,
        splits={"ids": {split: [row.id for row in rows] for split, rows in data.splits.items()}},
        data_report=report_text,
        census=census,
        fingerprint={"rows_per_update": rows_per_update, "chat template": template.hash},
    )
    collate = partial(
        batches.collate_chat, pad_id=tokenizer.pad_token_id, shared_prefix=shared_prefix, packing=config.packing
    )
    set_seed(config.seed, device_specific=True)  # dropout differs between ranks
    state = load_state(accelerator, run)

    def measure(rows: Sequence[ChatRow], what: str, model: torch.nn.Module = model) -> dict[str, Any]:
        losses_of = partial(row_losses, model, collate=collate, accelerator=accelerator,
                            batch_size=config.per_device_eval_batch_size)  # fmt: skip
        return evaluate(losses_of, rows, what)

    def validate() -> dict[str, Any]:
        return measure(splits["validation"], "validation")

    write = partial(storage.save_chat_model, model=base, tokenizer=tokenizer, template=template, config=config)
    keep_best = partial(save_best, accelerator, run, write)
    if config.dry_run:
        return dry_run.predict(
            run, accelerator, plan, total, rows, model=model, optimizer=optimizer, collate=collate, loss_of=loss_of,
            validation=dry_run.Evaluation(splits["validation"], partial(measure, what="validation")),
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
    # In a shared-prefix pack: input_ids [1, prefix + R x row]. Without padding: input_ids [1, tokens].
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
    metrics = measure(test, "test") if test else {}
    results = {"this run": metrics}
    if config.baselines and test:
        file = run.path / "eval" / "test" / "baselines.json"
        results |= baselines.untrained(file, base, path, config, accelerator, test, measure)
    if accelerator.is_main_process:
        if test:
            metrics |= origin(data.sources, "test", run.best)
            table = report.write_chat(run.path / "eval" / "test", {**figures, **metrics}, results, "test")
            say(accelerator, f"\n{table}")
        draw_learning_curve(run.path, TASKS[CHAT].curve)
        complete_card(run.path)
        run.finish()
        say(accelerator, f"\nRun folder: {run.path}\nCompare its answers: python evaluate.py --run {run.path}\n"
            f"Chat with it: python inference.py --run {run.path}")  # fmt: skip
    loop.finish(accelerator, model, optimizer, last=last)
    return {**figures, **metrics}


def main() -> None:
    config = parse_config(Config)
    runs = configs_per_seed(config)
    data = load_conversations(config)
    if config.eval_strategy != "no" and not data.splits["validation"]:
        raise InputError("--eval_strategy needs validation rows: set --validation_fraction, or --eval_strategy no.")
    path = resolve_model(config.model, config.revision)
    # What --init_adapter names is looked at before torch is imported, and again once all is known.
    initial_adapter(config, path, CHAT)
    train_each(runs, config, partial(train, data=data, path=path))


if __name__ == "__main__":
    with cli_errors(RESUME_HINT):
        main()
