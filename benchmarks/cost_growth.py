"""How cost grows with the number of labels, the length of the texts, and the rows of an update: examples per second.

    python benchmarks/cost_growth.py
    python benchmarks/cost_growth.py --device cuda --repeats 10 --labels 5 20 77 300 --rows 1 8 32 128

One of the three grows while the others stand at the second value of their list. Texts are random tokens, from half of
--text_tokens to all of it, after the instruction, which lists the labels. An update of a LoRA on all linear layers:
`pack`, our shared-prefix pack of all its rows; `padded`, our padded batches, with logits at the answers alone; `plain
loop`, transformers and PEFT as they come. Scoring as many rows: `scoring`, ours, and greedy `generate`. The adapter is
untrained, so that `generate` rarely ends before the longest label's length, and our search looks at more labels than
after a trained one. All in one process, in turns, after a warm-up each; the median of --repeats.
"""

import contextlib
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import train_speed, turns  # noqa: E402
from common.errors import cli_errors  # noqa: E402
from common.hub import resolve_model  # noqa: E402
from common.options import LoraArguments, ModelConfig, option, parse_config  # noqa: E402

TRAINING = ("pack", "padded", "plain loop")
WAYS = (*TRAINING, "scoring", "generate")
FIRST = (
    "lost stolen new old virtual physical foreign local pending failed late early top cash gold open free big red odd"
)
SECOND = "card transfer payment account refund limit fee rate code balance cheque loan order phone name"


@dataclass
class Config(ModelConfig, LoraArguments):
    """cost_growth"""

    labels: list[int] | None = option(None, "numbers of labels; unset: 5 20 77 300", at_least=2, at_most=300)
    text_tokens: list[int] | None = option(None, "lengths of the longest text; unset: 20 100 500", at_least=2)
    rows: list[int] | None = option(None, "rows of an update; unset: 1 8 32", at_least=1)
    micro_batch: int = option(8, "rows of a pass in `padded` and `plain loop`", at_least=1)
    repeats: int = option(2, "timed measurements of each", at_least=1)
    load_in_4bit: bool = option(False, "NF4 base")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "unset: bf16 where the device has it")
    device: Literal["cpu", "cuda"] = option("cpu", "where to compute")
    output_dir: str = option("benchmarks/results", "where table and picture go")


def main() -> None:
    config = parse_config(Config)
    config.approach = "generative"
    grid = {"labels": config.labels or [5, 20, 77, 300], "text_tokens": config.text_tokens or [20, 100, 500],
            "rows": config.rows or [1, 8, 32]}  # fmt: skip
    middle = {name: values[min(1, len(values) - 1)] for name, values in grid.items()}
    model, tokenizer = load(config)
    table: list[dict[str, Any]] = []
    for name, values in grid.items():
        for value in values:
            point = {**middle, name: value}
            known = [entry for entry in table if all(entry[key] == point[key] for key in point)]
            results = known[0] if known else measure(model, tokenizer, config, **point)
            table.append({**results, "grows": name, **point})
            print(table[-1], flush=True)
    write(config, grid, table)


def load(config: Config) -> tuple[Any, Any]:
    """The model with an adapter, and its tokenizer."""
    from common.model import base_model, lora

    path = resolve_model(config.model, config.revision)
    base_model.resolve_options(config, False)
    base, _ = base_model.load_base(path, config, device=config.device)
    return lora.add_lora(base, config, [], head=False), base_model.load_tokenizer(path, config)


def measure(model: Any, tokenizer: Any, config: Config, labels: int, text_tokens: int, rows: int) -> dict[str, Any]:
    """speeds: {way: examples per second of every repetition}; losses: {way: loss of the update}."""
    import torch

    from common.measure import scoring
    from common.model import base_model, classifier
    from common.model.losses import token_losses
    from common.model.token_losses import TokenLosses
    from common.text import batches
    from common.text.prompts import GENERATIVE_TEMPLATE, AnswerRow

    names = [f"{first} {second}" for second in SECOND.split() for first in FIRST.split()][:labels]
    prompt = classifier.classification_prompt(
        tokenizer, False, labels=names, multi_label=False, template=GENERATIVE_TEMPLATE, max_length=10**6
    )
    draw, pad_id = random.Random(0), tokenizer.pad_token_id
    lengths = [draw.randint(-(-text_tokens // 2), text_tokens) for _ in range(rows)]
    prompts = [
        prompt.instruction_ids + draw.choices(range(tokenizer.vocab_size), k=length) + prompt.cue_ids
        for length in lengths
    ]
    data = [AnswerRow(ids, prompt.answer([draw.randrange(labels)])) for ids in prompts]
    targets = sum(len(row.answer) for row in data)
    losses = TokenLosses(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0)  # all ways are measured with the same weights
    options = {"batch_size": rows, "device": config.device}
    labeler = classifier.Classifier(model, prompt, tokenizer)

    def autocast() -> Any:
        return torch.autocast(config.device, base_model.DTYPES[config.mixed_precision], config.mixed_precision != "no")

    def loss(numbers: Sequence[int], way: str) -> Any:
        if way == "plain loop":
            inputs = train_speed.padded([(data[i].prompt, data[i].answer) for i in numbers])
            inputs = {name: tensor.to(config.device) for name, tensor in inputs.items()}
            return model(**inputs, num_items_in_batch=targets).loss
        shared_prefix, pairs = "on" if way == "pack" else "off", [(data[i], True) for i in numbers]
        batch = batches.collate_rows(pairs, pad_id=pad_id, shared_prefix=shared_prefix).to(config.device)
        return token_losses(losses, batch).sum() / targets

    def update(way: str) -> float:
        size, total = rows if way == "pack" else config.micro_batch, 0.0
        for i in range(0, rows, size):
            with autocast():
                part = loss(range(i, min(i + size, rows)), way)
            part.backward()
            total += part.item()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    def answer(way: str) -> None:
        with autocast():
            if way == "scoring":
                scoring.score_labels(labeler, prompts, **options)
            else:
                scoring.generate_answers(labeler, prompts, **options)

    results: dict[str, Any] = {"losses": {}, "speeds": {way: [] for way in WAYS}}
    for number in range(1 + config.repeats):
        for way in WAYS:
            with turns.as_others(model) if way in ("plain loop", "generate") else contextlib.nullcontext():
                started = time.perf_counter()
                if way in TRAINING:
                    results["losses"][way] = update(way)
                else:
                    answer(way)
                if config.device == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - started
            if number:  # the first warms up
                results["speeds"][way].append(rows / seconds)
    return results


def write(config: Config, grid: dict[str, list[int]], table: list[dict[str, Any]]) -> None:
    """Markdown table, and a picture with a panel for each of the three."""
    from common.measure.figures import pyplot

    for entry in table:
        entry |= {way: statistics.median(speeds) for way, speeds in entry["speeds"].items()}
    cells = [[entry["grows"], *(str(entry[name]) for name in grid), *(f"{entry[way]:.3g}" for way in WAYS)]
             for entry in table]  # fmt: skip
    figure, panels = pyplot().subplots(1, len(grid), figsize=(12, 4), sharey=True)
    for axes, (name, values) in zip(panels, grid.items(), strict=True):
        for way in WAYS:
            axes.plot(values, [entry[way] for entry in table if entry["grows"] == name], marker="o", label=way)
        axes.set(xscale="log", yscale="log", xlabel=name.replace("_", " "))
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_xticks([], minor=True)
    panels[0].set_ylabel(f"examples/s, {config.device}")
    panels[0].legend()
    figure.tight_layout()
    turns.write(config, "cost_growth", ["grows", *grid, *WAYS], cells, table, figure)


if __name__ == "__main__":
    with cli_errors():
        main()
