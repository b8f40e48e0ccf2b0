"""Training speed beside other trainers on the same rows: examples per second, memory, and whether the losses agree.

    python benchmarks/train_speed.py --train_file banking77/train.csv --label_column label_name --max_length 640
    python benchmarks/train_speed.py ... --rows_per_update 32 --load_in_4bit true --trainers plainlora trl_tuned
    python benchmarks/train_speed.py ... --device cuda --model meta-llama/Llama-3.2-1B
    python benchmarks/train_speed.py --task causal_lm --train_file wikitext2/train.txt
    python benchmarks/train_speed.py --task chat --train_file rasbt_instruct_1100/train.jsonl --max_length 512

Every measurement is a fresh process, trainers take turns, and the figure is the median of the rounds' ratios. All train
on the same tokens with the same LoRA, AdamW and constant learning rate; others take one of their own ways through the
rows for speed, and our order where losses are compared. Peers: the loop one writes first under PEFT, transformers'
Trainer, and TRL's SFTTrainer, as it comes and tuned. Needs requirements-dev.txt. `--trainers plainlora whole_logits`
shows what it saves that we never hold the logits of all tokens.

Losses are compared over 30 updates of the same rows in fp32, in a model cut to two layers, and on short rows: prompts
leave out the list of labels, and rows are cut to --check_max_length; blocks of text stay as they are. Others compute
the vocabulary's logits at every token of a prompt, which is four fifths of a two-layer model's time, and nothing that
the check is about. With --load_in_4bit they are compared unquantised all the same; TRL keeps its adapter in bf16 then.
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import turns  # noqa: E402
from common.errors import InputError, cli_errors  # noqa: E402
from common.options import CausalConfig, ClassificationConfig, DataConfig, InstructionConfig, option, parse_config  # noqa: E402

TRAINERS = ("plainlora", "plain_loop", "hf_trainer", "trl_default", "trl_tuned")  # and whole_logits
CHECKED = (1, 10, 30)  # updates at which losses are compared


@dataclass
class Config(DataConfig, ClassificationConfig, CausalConfig, InstructionConfig):
    """train_speed"""

    task: Literal["classification", "causal_lm", "chat"] = option("classification", "what is trained")
    model: str = option("smollm2-135m", "hub id or local folder")
    trainers: list[str] | None = option(
        None, f"the first is what others are compared with; unset: {' '.join(TRAINERS)}"
    )
    rows_per_update: int = option(8, "rows of an update", at_least=1)
    micro_batch: int = option(8, "rows of a pass of the others", at_least=1)
    own_micro_batch: int | None = option(None, "rows of a pass of ours; unset: all rows of an update", at_least=1)
    rounds: int = option(3, "measurements of each trainer", at_least=1)
    warmup: int = option(2, "updates that are not timed", at_least=1)
    updates: int = option(6, "updates that are timed", at_least=1)
    lora_r: int = option(8, "rank", at_least=1)
    lora_alpha: int = option(16, "alpha", at_least=1)
    learning_rate: float = option(5e-4, "constant", at_least=0)
    load_in_4bit: bool = option(False, "NF4 base")
    device: Literal["cpu", "cuda"] = option("cpu", "where to train")
    check_losses: bool = option(True, "compare losses first")
    check_max_length: int = option(128, "tokens of a row there, where the list of labels is left out", at_least=1)
    output_dir: str = option("benchmarks/results", "where table and picture go")
    worker: str | None = option(None, "internal: measure this trainer")


@dataclass
class Work:
    """What one process trains: token rows in the order of the updates."""

    config: Config
    path: str
    rows: list[tuple[list[int], list[int]]]
    updates: int
    checking: bool  # fp32, two layers, our order


def main() -> None:
    config = parse_config(Config)
    config.trainers = config.trainers or list(TRAINERS)
    config.validation_fraction = config.test_fraction = 0.0
    for name in ("micro_batch", "own_micro_batch"):
        size = min(getattr(config, name) or config.rows_per_update, config.rows_per_update)
        setattr(config, name, size)
        if config.rows_per_update % size:
            raise InputError(f"--rows_per_update {config.rows_per_update}: not a multiple of --{name} {size}.")
    turns.use_device(config.device)
    if config.worker:
        turns.hand_over(measure(config))
        return
    table, losses = [], {}
    if config.check_losses:
        losses = {name: turns.start(name, CHECKING=True)["losses"] for name in config.trainers}
        print("losses at updates " + ", ".join(map(str, CHECKED)) + f": {losses}", flush=True)
    base = turns.start("load", CHECKING=False)["memory"]
    rounds = turns.in_turns({name: {"CHECKING": False} for name in config.trainers}, config.rounds)
    ours = config.trainers[0]
    for name in config.trainers:
        speeds = [result["examples_per_second"] for result in rounds[name]]
        ratios = [a["examples_per_second"] / b for a, b in zip(rounds[ours], speeds, strict=True)]
        apart = max(abs(a - b) for a, b in zip(losses[ours], losses[name], strict=True)) if losses else None
        table.append(
            {
                "trainer": name,
                "examples_per_second": statistics.median(speeds),
                "all_rounds": speeds,
                f"ratio_of_{ours}": statistics.median(ratios) if not losses or apart <= 2e-4 else None,
                "memory_over_the_model_mb": statistics.median(r["memory"] - base for r in rounds[name]) / 2**20,
                "largest_loss_difference": apart,
            }
        )
    write(config, table)


def measure(config: Config) -> dict[str, Any]:
    """Runs one trainer here: examples per second, peak memory in bytes, losses at the checked updates."""
    import torch

    from common.log import peak_memory

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    checking = os.environ["CHECKING"] == "True"
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(config, checking, Path(folder))
        ticks, losses = WORKERS[config.worker](work, Path(folder))
    seconds = sum(ticks[config.warmup :])
    return {
        "examples_per_second": config.rows_per_update * len(ticks[config.warmup :]) / seconds if seconds else None,
        "memory": peak_memory(),
        "losses": [losses[i - 1] for i in CHECKED if i <= len(losses)] if checking else [],
    }


def prepare(config: Config, checking: bool, folder: Path) -> Work:
    """The rendered rows in the order of our updates, and the model's folder (two layers of it for the check)."""
    import transformers

    from common.hub import resolve_model
    from common.model import base_model
    from common.text.plan import Plan

    if checking:
        config.max_length = min(config.max_length, config.check_max_length)
    path = resolve_model(config.model, None)
    tokenizer = base_model.load_tokenizer(path, SimpleNamespace(revision=None, trust_remote_code=False))
    # A first look tells how many rows there are; all updates are full, as others would not scale a short one.
    read = len(ROWS[config.task](config, tokenizer, checking, folder))
    config.max_train_samples = read // config.rows_per_update * config.rows_per_update
    rows = ROWS[config.task](config, tokenizer, checking, folder)
    updates = max(CHECKED) if checking else config.warmup + config.updates
    plan = Plan([len(p) + len(a) for p, a in rows], config.rows_per_update, seed=0)
    ordered = [rows[i] for update in plan.updates(0, updates) for i in update]
    if checking:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, num_hidden_layers=2)
        model.save_pretrained(folder / "two_layers")
        tokenizer.save_pretrained(folder / "two_layers")
        path = str(folder / "two_layers")
    return Work(config, path, ordered, updates, checking)


def answers(config: Config, tokenizer: Any, checking: bool, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts and labels."""
    from common.data.classification import load_classification
    from common.model import classifier
    from common.text.prompts import read_template

    if checking:
        short = read_template(config.prompt_template, "generative").replace("{labels}", "one of the labels")
        (folder / "short.txt").write_text(short, encoding="utf-8")
        config.prompt_template = str(folder / "short.txt")
    data = load_classification(config)
    prompt = classifier.classification_prompt(
        tokenizer, False, labels=data.labels, multi_label=data.multi_label,
        template=read_template(config.prompt_template, "generative"), max_length=config.max_length,
    )  # fmt: skip
    prompt.reserve(data.splits["train"])
    return [(prompt.prompt(e.text).ids, prompt.answer(e.labels)) for e in data.splits["train"]]


def blocks(config: Config, tokenizer: Any, checking: bool, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Blocks of text, whose first token is not predicted."""
    from common.data.corpus import load_corpus, open_sources
    from common.model import base_model

    found = load_corpus(open_sources(config), config, tokenizer).splits["train"]
    start = base_model.start_ids(tokenizer)
    rows = [[*start, *block.tokens] for block in found]
    return [(row[:1], row[1:]) for row in rows]


def turns_of_chat(config: Config, tokenizer: Any, checking: bool, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of conversations of one exchange."""
    from common.data.conversations import load_conversations
    from common.text.chat import choose_template

    template = choose_template(tokenizer, config.chat_template)
    data = load_conversations(config)
    rows = [row for each in data.splits["train"] for row in template.rows(each, config.max_length)]
    return [(row.prompt, row.ids[len(row.prompt) :]) for row in rows]


ROWS = {"classification": answers, "causal_lm": blocks, "chat": turns_of_chat}


def plainlora(work: Work, folder: Path) -> tuple[list[float], list[float]]:
    """The script itself; its own record of what an update took."""
    import train_clm
    import train_cls
    import train_sft
    from common.data.classification import load_classification
    from common.data.conversations import load_conversations
    from common.data.corpus import open_sources
    from common.train import checkpoints

    script, load_data = {
        "classification": (train_cls, load_classification),
        "causal_lm": (train_clm, open_sources),
        "chat": (train_sft, load_conversations),
    }[work.config.task]
    config, ticks, losses = work.config, [], []
    own = {name: value for name, value in vars(config).items() if hasattr(script.Config, name)}
    own |= {"model": work.path, "seed": 0, "baselines": False, "max_steps": work.updates, "eval_strategy": "no"}
    own |= {"per_device_train_batch_size": config.own_micro_batch}
    own |= {"gradient_accumulation_steps": config.rows_per_update // config.own_micro_batch}
    own |= {"save_strategy": "no", "report_to": ["none"], "output_dir": str(folder / "run"), "warmup_ratio": 0.0}
    own |= {"lr_scheduler_type": "constant", "weight_decay": 0.0}
    own |= {"mixed_precision": "no", "load_in_4bit": False} if work.checking else {"mixed_precision": "bf16"}
    count, count_loss = checkpoints.State.count, checkpoints.State.count_loss

    def counted(self: Any, lengths: list[int], seconds: float) -> None:
        ticks.append(seconds + rest_of(work, len(ticks)))
        count(self, lengths, seconds)

    def loss_counted(self: Any, loss: float, targets: float) -> None:
        losses.append(loss)
        count_loss(self, loss, targets)

    settings = script.Config(**own)
    with mock.patch.multiple(checkpoints.State, count=counted, count_loss=loss_counted):
        script.train(settings, load_data(settings), work.path)
    return ticks, losses


def whole_logits(work: Work, folder: Path) -> tuple[list[float], list[float]]:
    """Our script with the logits of all targets at once, for what the chunks of common/model/token_losses.py save."""
    from common.model import token_losses

    with mock.patch.object(token_losses, "_head_gives_logits", lambda model: False):
        return plainlora(work, folder)


def load(work: Work, folder: Path) -> tuple[list[float], list[float]]:
    """The model and its adapter alone, for the memory that all share."""
    adapted(work)
    return [], []


def adapted(work: Work) -> Any:
    """The base with LoRA as people load it: transformers' attention, fp32 adapter weights."""
    import peft
    import torch
    import transformers

    config = work.config
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        work.path, dtype=torch.float32 if work.checking else torch.bfloat16,
        quantization_config=quantised if config.load_in_4bit and not work.checking else None,
        device_map={"": config.device},
    )  # fmt: skip
    model.config.use_cache = False
    lora = peft.LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    transformers.set_seed(0)
    return peft.get_peft_model(model, lora)


def plain_loop(work: Work, folder: Path) -> tuple[list[float], list[float]]:
    """The loop one writes first: padded batches, labels masked, the model's own loss."""
    import torch

    config, model, ticks, losses = work.config, adapted(work), [], []
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=config.learning_rate, weight_decay=0.0
    )
    model.train()
    for start in range(0, len(work.rows), config.rows_per_update):
        began = time.perf_counter()
        rows = work.rows[start : start + config.rows_per_update]
        targets, total = sum(len(answer) for _, answer in rows), 0.0
        for i in range(0, len(rows), config.micro_batch):
            batch = {
                name: tensor.to(config.device) for name, tensor in padded(rows[i : i + config.micro_batch]).items()
            }
            with torch.autocast(config.device, torch.bfloat16, enabled=not work.checking):
                loss = model(**batch, num_items_in_batch=targets).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ticks.append(time.perf_counter() - began + rest_of(work, len(ticks)))
        losses.append(total)
    return ticks, losses


def rest_of(work: Work, update: int) -> float:
    """Seconds that a GPU still works when the clock starts after the warm-up, and when it stops; else nothing waits."""
    import torch

    started = time.perf_counter()
    if work.config.device == "cuda" and update in (work.config.warmup - 1, work.updates - 1):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def padded(rows: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """A batch padded on the right, -100 where nothing is learnt."""
    import torch

    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels, mask = [], [], []
    for prompt, answer in rows:
        rest = longest - len(prompt) - len(answer)
        ids.append([*prompt, *answer, *[0] * rest])
        labels.append([-100] * len(prompt) + [*answer, *[-100] * rest])
        mask.append([1] * (longest - rest) + [0] * rest)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def trainer_options(work: Work, folder: Path) -> dict[str, Any]:
    """What transformers' and TRL's trainers have in common here."""
    config = work.config
    return {
        "output_dir": str(folder / "out"), "max_steps": work.updates, "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0,
        "logging_steps": 1 if work.checking else work.updates,  # reading a loss waits for the device
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.rows_per_update // config.micro_batch,
        "bf16": not work.checking, "use_cpu": config.device == "cpu", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": config.device == "cuda",
    }  # fmt: skip


def run_trainer(trainer: Any, work: Work) -> tuple[list[float], list[float]]:
    """Trains; the time from the end of one update to the end of the next, and the logged losses."""
    import transformers

    class Clock(transformers.TrainerCallback):
        ends: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            rest_of(work, len(self.ends) - 1)
            self.ends.append(time.perf_counter())

    trainer.add_callback(Clock)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return [after - before for before, after in zip(Clock.ends, Clock.ends[1:], strict=False)], losses


def dataset(work: Work) -> Any:
    import datasets

    return datasets.Dataset.from_list(
        [{"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer} for prompt, answer in work.rows]
    )


def hf_trainer(work: Work, folder: Path) -> tuple[list[float], list[float]]:
    """transformers' Trainer with the collator of its examples."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(work.path)
    options = trainer_options(work, folder)
    options["train_sampling_strategy"] = "sequential" if work.checking else "group_by_length"
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
    arguments = transformers.TrainingArguments(**options)
    trainer = transformers.Trainer(adapted(work), arguments, collator, dataset(work), processing_class=tokenizer)
    return run_trainer(trainer, work)


def trl(work: Work, folder: Path, **changes: Any) -> tuple[list[float], list[float]]:
    """TRL's SFTTrainer on the same tokens."""
    import transformers
    from trl import SFTConfig, SFTTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(work.path)
    options = {**trainer_options(work, folder), "max_length": work.config.max_length, **changes}
    if work.checking:
        options["train_sampling_strategy"] = "sequential"
    trainer = SFTTrainer(adapted(work), SFTConfig(**options), train_dataset=dataset(work), processing_class=tokenizer)
    return run_trainer(trainer, work)


def trl_default(work: Work, folder: Path) -> tuple[list[float], list[float]]:
    """As it comes: gradient checkpointing on, rows in random order."""
    return trl(work, folder)


def trl_tuned(work: Work, folder: Path) -> tuple[list[float], list[float]]:
    """Without checkpointing, rows of similar length together."""
    return trl(work, folder, gradient_checkpointing=False, train_sampling_strategy="group_by_length")


WORKERS = {"load": load, "plainlora": plainlora, "whole_logits": whole_logits, "plain_loop": plain_loop,
           "hf_trainer": hf_trainer, "trl_default": trl_default, "trl_tuned": trl_tuned}  # fmt: skip


def write(config: Config, table: list[dict[str, Any]]) -> None:
    """Markdown table and bar chart."""
    kind = "NF4" if config.load_in_4bit else "bf16"
    data = Path(config.train_file).parent.name if config.train_file else config.task
    name = f"train_{data}_{config.rows_per_update}_{kind.lower()}"
    rows, first = [], table[0]["trainer"]
    for entry in table:
        ratio = entry[f"ratio_of_{first}"]
        rows.append([
            entry["trainer"], f"{entry['examples_per_second']:.2f}",
            ", ".join(f"{value:.2f}" for value in entry["all_rounds"]),
            f"{ratio:.2f}" if ratio else "losses differ", f"{entry['memory_over_the_model_mb']:.0f}",
            "not compared" if entry["largest_loss_difference"] is None else f"{entry['largest_loss_difference']:.1e}",
        ])  # fmt: skip
    header = ["trainer", "examples/s", "rounds", f"{first} is faster by", "MB over the model", "loss difference"]
    label = f"examples/s, {config.rows_per_update} rows per update, {kind}, {config.device}"
    figure = turns.bars(config.trainers, [entry["examples_per_second"] for entry in table], label)
    turns.write(config, name, header, rows, table, figure)


if __name__ == "__main__":
    with cli_errors():
        main()
