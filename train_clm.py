"""Trains a causal language model on running text: the next token of blocks of a corpus.

    accelerate launch train_clm.py                                  # the embedded model on Python's documentation
    accelerate launch train_clm.py --train_file train.txt --validation_file valid.txt --test_file test.txt
    accelerate launch train_clm.py --train_file posts.jsonl --text_fields title body --document_masking true
    accelerate launch train_clm.py --dataset_name Salesforce/wikitext --dataset_config wikitext-2-raw-v1

LoRA on a 4-bit NF4 base by default; `--help` lists the options. Not supported: encoders, encoder-decoder models.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from common import disk
from common.data.corpus import Source, load_corpus_once, open_sources
from common.errors import InputError, cli_errors
from common.hub import resolve_model
from common.log import RunLog, chosen_trackers, say
from common.options import (
    RESUME,
    CausalConfig,
    DataConfig,
    LoopConfig,
    LoraArguments,
    ModelConfig,
    check_causal,
    check_loop,
    option,
    parse_config,
)
from common.train import run_folder
from common.train.seeds import finish as finish_seeds
from common.train.seeds import keep_others, runs_of

# torch and what stands on it is imported inside the functions: options and data are checked before, in a moment.


@dataclass
class Config(ModelConfig, LoraArguments, LoopConfig, DataConfig, CausalConfig):
    """train_clm"""

    learning_rate: float = option(2e-4, "peak learning rate", at_least=0)
    gradient_accumulation_steps: int = option(8, "forward passes per update", at_least=1)
    num_train_epochs: float = option(1, "passes over the training blocks", at_least=0)
    metric_for_best_model: Literal["eval_loss", "perplexity"] = option(
        "eval_loss", "validation metric that chooses the best weights"
    )


def loss_of(model: Any, batch: dict[str, Any]) -> Any:
    """The SUM of weight x loss over the targets of one micro-batch. Change this one first."""
    return (model(**batch["inputs"]) * batch["weights"]).sum()


def evaluate(
    model: Any, blocks: Any, per_token: dict[str, float], accelerator: Any, batch_size: int, collator: Any, what: str
) -> tuple[list[tuple[float, int]], dict[str, Any]]:
    """Nats and predicted tokens of every block, and their metrics: sums and counts over all ranks."""
    from common.measure.metrics import perplexity_metrics
    from common.measure.perplexity import row_losses
    from common.train.loop import evaluation_cost

    started = time.perf_counter()
    losses = row_losses(model, blocks.lengths, accelerator, batch_size, collator, what)
    return losses, perplexity_metrics(losses, per_token) | evaluation_cost(len(blocks), started, accelerator.device)


def train(config: Config, sources: dict[str, Source], path: str, another: bool = False) -> dict[str, Any]:
    """One run from the base model to its evaluated weights; returns its figures. another: a further run follows."""
    import torch
    from accelerate.utils import broadcast_object_list, set_seed

    from common.data.report import corpus_report
    from common.measure import report
    from common.measure.figures import draw_learning_curve, say_what_is_missing
    from common.measure.perplexity import UNTRAINED, continue_text
    from common.model import attention, base_model, lora, storage
    from common.model.token_losses import TokenLosses
    from common.text import batches
    from common.text.plan import Plan
    from common.train import loop
    from common.train.checkpoints import State, load_checkpoint, register_hooks, save_best, save_checkpoint

    given = run_folder.options_hash(config)
    resume = run_folder.find_resume(config) if config.resume_from_checkpoint else None
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
    data_report = corpus_report(
        data.report, tokenizer.decode(start), not config.document_masking, tokenizer.decode(rows[0].tokens)
    )
    say(accelerator, data_report)

    # --- model
    set_seed(config.seed)  # the adapter's first weights depend on the seed alone
    model, missing = base_model.load_base(path, config, device=accelerator.device)
    if config.document_masking:
        attention.check_masks(model, config, "document_masking", config.block_size)
    if not config.full_finetuning:
        model = lora.add_lora(model, config, missing, head=False)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = TokenLosses(model)
    if config.torch_compile:
        model.compile(dynamic=True)
    census = base_model.census(model)
    say(accelerator, report.census_table(census, config))

    # --- optimizer, scheduler
    batch_size = config.per_device_train_batch_size
    rows_per_update = batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    plan = Plan(rows.lengths, rows_per_update, config.seed)
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
    inner = accelerator.unwrap_model(model).model
    say(accelerator, f"{total} updates of {rows_per_update} blocks; {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, {torch.get_num_threads()} thread(s) each")  # fmt: skip
    if config.dry_run:
        loop.finish(accelerator, model, optimizer, another=another)
        return {}

    # --- run folder, baseline, resume
    where = [resume[0] if resume else run_folder.new_run_folder(config) if accelerator.is_main_process else None]
    run_dir = Path(broadcast_object_list(where)[0])
    best = run_dir / ("model" if config.full_finetuning else "adapter")
    mark = {
        **run_folder.binding_options(config),
        **{f"content of {source['name']}": source["sha256"][:12] for source in data.sources.values()},
        "rows_per_update": rows_per_update,
    }
    if resume:
        say(accelerator, f"Resumes {run_dir} from {resume[1].name if resume[1] else 'its start: no checkpoint yet'}")
    if accelerator.is_main_process:
        disk.recover(best)
        if not (resume and resume[1]):
            splits = {"pieces cut from train": data.cut}
            run_folder.write_start(run_dir, config, given, data, splits, data_report, accelerator.num_processes, census)
    accelerator.wait_for_everyone()
    collate_blocks = partial(batches.collate_numbered, batches.collate_blocks, start=start,
                             end_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
                             document_masking=config.document_masking)  # fmt: skip

    def measure(split: str, what: str) -> tuple[list[tuple[float, int]], dict[str, Any]]:
        blocks = data.splits[split]
        batch = config.per_device_eval_batch_size
        return evaluate(model, blocks, data.per_token[split], accelerator, batch, partial(collate_blocks, blocks), what)

    results = {}
    if config.baselines and test:
        file = run_dir / "eval" / "test" / "baselines.json"
        if not file.exists():
            # Before the first update the adapter changes nothing; where it starts as a part of the base, it must be on.
            changed = config.init_lora_weights in lora.BASE_CHANGING_INITS
            with nullcontext() if changed else lora.without_adapter(inner):
                results = {UNTRAINED: measure("test", UNTRAINED)[1]}
            if accelerator.is_main_process:
                disk.write_json(file, results)
            accelerator.wait_for_everyone()
        results = disk.read_json(file)
    set_seed(config.seed, device_specific=True)  # dropout differs between ranks, and a baseline changes nothing
    state = load_checkpoint(accelerator, resume[1], mark) if resume and resume[1] else State()
    log = RunLog(run_dir, accelerator, config, total, state.update)
    collator = partial(collate_blocks, rows)

    def validate() -> dict[str, Any]:
        return measure("validation", "validation")[1]

    def keep_best() -> None:
        save_best(accelerator, best, partial(storage.save_language_model, model=inner, tokenizer=tokenizer,
                                             start=start, config=config))  # fmt: skip

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
    storage.load_weights(inner, best)  # what was saved is what is measured
    figures = {"epochs": state.update / plan.updates_per_epoch, **state.summary(flops)}
    log.write(state.update, figures)
    losses, metrics = measure("test", "test") if test else ([], {})
    sample = continue_text(inner, tokenizer, config.sample_prompt, accelerator, config.seed)
    if accelerator.is_main_process:
        if test:
            results = {"this run": metrics, **results}
            metrics = {**figures, **metrics}
            report.write_perplexity(run_dir / "eval" / "test", losses, metrics, results, "test", sample)
            say(accelerator, "\n" + report.results_table(results, "test", report.PERPLEXITY))
        say(accelerator, f"\nA sample: {sample}")
        draw_learning_curve(run_dir / "learning_curve.png", run_dir / "metrics.jsonl", "perplexity")
        run_folder.mark_finished(run_dir)
        say(accelerator, f"\nRun folder: {run_dir}\nEvaluate again: python evaluate.py --run {run_dir}")
    loop.finish(accelerator, model, optimizer, another=another)
    return {**figures, **metrics}


def main() -> None:
    config = parse_config(Config)
    check_loop(config)
    check_causal(config)
    runs = runs_of(config)
    chosen_trackers(config.report_to)
    sources = open_sources(config)
    if "train" not in sources:
        raise InputError(f"{config.dataset_name or 'The data'}: there is no training text; give --train_file.")
    if config.eval_strategy != "no" and "validation" not in sources and not config.validation_fraction:
        raise InputError("--eval_strategy needs validation text: set --validation_fraction, or --eval_strategy no.")
    path = resolve_model(config.model, config.revision)
    results: dict[int, Any] = {}
    for run in runs:
        with keep_others(results, run, config):
            results[run.seed] = train(run, sources, path, another=run is not runs[-1])
    finish_seeds(results, config)


if __name__ == "__main__":
    with cli_errors(RESUME):
        main()
