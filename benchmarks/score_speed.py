"""Speed of label scoring beside what others do, on the same rows: examples per second, memory, and who answers what.

    python benchmarks/score_speed.py --run outputs/smollm2-135m/banking77/run_1 --rows 200 --slow_rows 4
    python benchmarks/score_speed.py --model smollm2-135m --train_file banking77/train.csv \
        --test_file banking77/test.csv --label_column label_name --max_length 640 --load_in_4bit false
    python benchmarks/score_speed.py --run RUN --device cuda --rows 2000 --slow_rows 100 --warmup_rows 64 \
        --batch_sizes 16 64 256

plainlora: our scoring (common/measure/scoring.py), the probability of every label to 1e-6; plainlora_answers: the
likeliest label alone, which is what the others give. pipeline: transformers' text-generation pipeline, greedy, row by
row; the label is looked for in what it wrote. generate: greedy too, in padded batches of similar length. per_label: the
log-likelihood of every label, each after its full prompt, in batches; ours should answer as its argmax does.
All get the same prompts. Peers run with transformers' own attention, and with the adapter merged into a base that is
not quantized; those in batches, and ours, take the fastest of --batch_sizes, tried on as many rows as the largest
holds.

Every measurement is a fresh process and the scorers take turns. Times are from texts to answers: without loading, after
a warm-up; CPU seconds tell more on a shared machine. Memory is what was needed beyond the loaded model. The ratio is
that of the median speeds; it is withheld where, on the rows both answered, our accuracy is more than a point below this
scorer's, or per_label's or generate's. For one label per row, answered in text. Options of data and model are those of
evaluate.py.
"""

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
from benchmarks import turns  # noqa: E402
from common.data.classification import Example, draw_few_shot, load_classification  # noqa: E402
from common.data.splits import stratified_sample  # noqa: E402
from common.errors import InputError, cli_errors  # noqa: E402
from common.hub import EMBEDDED  # noqa: E402
from common.log import peak_memory  # noqa: E402
from common.options import CLASSIFICATION, check, option, parse_given  # noqa: E402
from common.use.runs import Run, open_run  # noqa: E402

if TYPE_CHECKING:
    from common.use.label_models import LabelModel

Answers = list[int | None]  # the index of the label that was answered; None: none of the set
SLOW = ("pipeline", "per_label")  # answer --slow_rows
REFERENCES = ("per_label", "generate")
GATE = 0.01  # of accuracy


@dataclass
class Config(evaluate.Config):
    """score_speed"""

    scorers: list[str] | None = option(None, "the first is what others are compared with; unset: all")
    rows: int = option(200, "rows to answer, drawn stratified", at_least=1)
    slow_rows: int = option(8, f"how many of them {' and '.join(SLOW)} answer", at_least=1)
    rounds: int = option(3, "measurements of each scorer", at_least=1)
    warmup_rows: int = option(2, "rows answered before the clock starts", at_least=1)
    batch_sizes: list[int] | None = option(None, "sequences of a pass to choose from; unset: 8 32", at_least=1)
    device: Literal["cpu", "cuda"] = option("cpu", "where to score")
    output_dir: str = option("benchmarks/results", "where table and picture go")
    worker: str | None = option(None, "internal: measure this scorer")


def main() -> None:
    given = parse_given(Config)
    run = open_run(given.pop("run", None) or given.pop("model", EMBEDDED), CLASSIFICATION)
    config = run.configure(Config, given, run.options_for_rows(given))
    check(config)
    turns.use_device(config.device)
    config.scorers, config.batch_sizes = config.scorers or list(SCORERS), config.batch_sizes or [8, 32]
    if unknown := set(config.scorers) - set(SCORERS):
        raise InputError(f"--scorers {' '.join(unknown)}: there are {', '.join(SCORERS)}.")
    if config.worker:
        turns.hand_over(measure(config, run))
        return
    sizes = {name: {"BATCH_SIZE": fastest_size(config, name)} for name in config.scorers}
    rounds = turns.in_turns(sizes, config.rounds)
    table = summarize(rounds, sizes)
    write(config, table, rounds[config.scorers[0]][-1]["precision"])


def summarize(rounds: dict[str, list[dict[str, Any]]], sizes: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """One entry per scorer; the first is what the others are compared with."""
    last = {name: results[-1] for name, results in rounds.items()}  # every round gives the same answers
    ours = next(iter(rounds))
    table: list[dict[str, Any]] = []
    for name, results in rounds.items():
        speeds = [result["examples_per_second"] for result in results]
        entry: dict[str, Any] = {"scorer": name, "examples_per_second": statistics.median(speeds), "all_rounds": speeds}
        lost = max(lost_accuracy(last[ours], last[other]) for other in {name, *REFERENCES} & set(rounds))
        faster = table[0]["examples_per_second"] / entry["examples_per_second"] if table else 1.0
        entry[f"ratio_of_{ours}"] = faster if lost <= GATE else None
        entry["cpu_seconds"] = statistics.median(result["cpu_seconds_per_example"] for result in results)
        entry["memory_over_the_model_mb"] = statistics.median(result["memory"] for result in results) / 2**20
        pairs = list(last[name]["answers"].values())
        entry |= {"batch_size": sizes[name]["BATCH_SIZE"], "rows": len(pairs)}
        entry["accuracy"] = statistics.mean(answer == gold for answer, gold in pairs)
        entry["outside_label_set"] = sum(answer is None for answer, _ in pairs)
        same = [a == b for a, b, _ in answered_by_both(last[name], last.get("per_label", {"answers": {}}))]
        entry["agreement_with_per_label"] = statistics.mean(same) if same else None
        table.append(entry)
    return table


def answered_by_both(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[int | None, int | None, int]]:
    """(one's answer, the other's, the right one) of the rows that both answered."""
    one, other = one["answers"], other["answers"]
    return [(one[row][0], *other[row]) for row in one if row in other]


def lost_accuracy(ours: dict[str, Any], other: dict[str, Any]) -> float:
    """How much better than ours the other's answers are, on the rows that both answered."""
    return statistics.mean((b == gold) - (a == gold) for a, b, gold in answered_by_both(ours, other))


def fastest_size(config: Config, name: str) -> int:
    """Of --batch_sizes, on few rows; a size that does not fit the device's memory loses."""
    if name == "pipeline":
        return 1
    if len(config.batch_sizes) == 1:
        return config.batch_sizes[0]
    speeds = turns.start(name, BATCH_SIZE=0)["sizes"]
    print(f"{name}, examples/s by batch size: {speeds}", flush=True)
    return int(max(speeds, key=speeds.__getitem__))


def measure(config: Config, run: Run) -> dict[str, Any]:
    """Runs one scorer here: examples per second, memory in bytes, {row: (answer, gold)}; for size 0, speed by size."""
    import peft
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, examples = load(config, run)
    classifier, size = model.classifier, int(os.environ["BATCH_SIZE"])
    rows = stratified_sample([row.labels for row in examples], min(config.rows, len(examples)), config.split_seed)
    if config.worker in SLOW:
        labels = [examples[i].labels for i in rows]
        rows = [rows[i] for i in stratified_sample(labels, min(config.slow_rows, len(rows)), config.split_seed)]
    examples = [examples[i] for i in rows]
    peer = not config.worker.startswith("plainlora")
    quantized = getattr(classifier.model.config, "quantization_config", None)
    if peer and isinstance(classifier.model, peft.PeftModel) and not quantized:
        classifier.model = classifier.model.merge_and_unload()
    classifier.model.config.use_cache = peer

    def timed(some: Sequence[Example], size: int) -> tuple[float, Answers]:
        with turns.as_others(classifier.model) if peer else contextlib.nullcontext():
            started = time.perf_counter()
            answers = SCORERS[config.worker](model, some, size)
            return len(some) / (time.perf_counter() - started), answers

    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated() if on_gpu else peak_memory()
    timed(examples[: config.warmup_rows], max(1, size))
    if not size:
        sequences = len(classifier.prompt.labels) if config.worker == "per_label" else 1
        few, speeds = examples[: -(-max(config.batch_sizes) // sequences)], {}
        for size in config.batch_sizes:
            try:
                speeds[size], _ = timed(few, size)
            except torch.OutOfMemoryError:
                speeds[size] = 0.0
        return {"sizes": speeds}
    began = time.process_time()
    speed, answers = timed(examples, size)
    cpu = (time.process_time() - began) / len(examples)
    pairs = {row: (answer, example.labels[0]) for row, answer, example in zip(rows, answers, examples, strict=True)}
    precision = "NF4" if config.load_in_4bit else model.precision
    return {"examples_per_second": speed, "cpu_seconds_per_example": cpu, "memory": peak_memory() - loaded,
            "answers": pairs, "precision": precision}  # fmt: skip


def load(config: Config, run: Run) -> "tuple[LabelModel, list[Example]]":
    """The classifier as evaluate.py loads it, and the rows."""
    import torch

    data = load_classification(config, training=False)
    examples = data.splits[config.split]
    if run.folder is None:
        config.labels = data.labels
    else:
        run.check_labels(data.labels, data.multi_label)
    if data.multi_label or config.approach == "head" or not examples:
        raise InputError(
            f"This benchmark needs {config.split} rows of one label each, and a model that answers in text."
        )
    run.resolve(config)
    shots, _ = draw_few_shot(data, config) if run.folder is None else ([], [])
    return run.load_classifier(config, torch.device(config.device), False, examples, shots), examples


def plainlora(model: "LabelModel", examples: Sequence[Example], size: int, probabilities: bool = True) -> Answers:
    from common.measure.scoring import classify
    from common.model.base_model import precision

    with precision(model.device, model.precision):
        answers = classify(
            model.classifier,
            examples,
            device=model.device,
            batch_size=size,
            labeled=False,
            probabilities=probabilities,
        )
    return [answer.labels[0] for answer in answers]


def plainlora_answers(model: "LabelModel", examples: Sequence[Example], size: int) -> Answers:
    return plainlora(model, examples, size, probabilities=False)


def pipeline(model: "LabelModel", examples: Sequence[Example], size: int) -> Answers:
    """The first label in the text is the answer, the longest one if several begin there."""
    import transformers

    prompt, tokenizer, answers = model.classifier.prompt, model.classifier.tokenizer, []
    write = transformers.pipeline("text-generation", model=model.classifier.model, tokenizer=tokenizer)
    for example in examples:
        ids = prompt.prompt(example.text).ids
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        options = {"max_new_tokens": prompt.answer_tokens, "do_sample": False, "return_full_text": False}
        written = write(text, pad_token_id=tokenizer.pad_token_id, **options)[0]["generated_text"]
        found = [(written.find(label), -len(label), k) for k, label in enumerate(prompt.labels) if label in written]
        answers.append(min(found)[2] if found else None)
    return answers


def generate(model: "LabelModel", examples: Sequence[Example], size: int) -> Answers:
    from common.measure.scoring import generate_answers

    prompts = [model.classifier.prompt.prompt(example.text).ids for example in examples]
    answers = generate_answers(model.classifier, prompts, batch_size=size, device=model.device)
    return [answer.labels[0] if answer.labels else None for answer in answers]


def per_label(model: "LabelModel", examples: Sequence[Example], size: int) -> Answers:
    """Logits of the answers' tokens alone: otherwise a pass would hold the entire vocabulary at every token."""
    import torch

    from common.text.batches import pad_left

    prompt, pad_id, device = model.classifier.prompt, model.classifier.tokenizer.pad_token_id, model.device
    prompts = [prompt.prompt(example.text).ids for example in examples]
    answers = [prompt.answer([k]) for k in range(len(prompt.labels))]
    pairs = [(i, k) for i in range(len(prompts)) for k in range(len(answers))]
    pairs.sort(key=lambda pair: -len(prompts[pair[0]]) - len(answers[pair[1]]))
    scores = torch.zeros(len(prompts), len(answers))
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        longest = max(len(answers[k]) for _, k in some)
        targets = pad_left([answers[k] for _, k in some], pad_id)
        ids, counts = (targets[name].to(device) for name in ("input_ids", "attention_mask"))
        inputs = pad_left([prompts[i] + answers[k] for i, k in some], pad_id)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        with torch.inference_mode():
            logits = model.classifier.model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
            logs = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0]
        rows, columns = zip(*some, strict=True)
        scores[list(rows), list(columns)] = (logs * counts).sum(1).cpu()
    return scores.argmax(1).tolist()


SCORERS = {
    "plainlora": plainlora,
    "plainlora_answers": plainlora_answers,
    "pipeline": pipeline,
    "generate": generate,
    "per_label": per_label,
}


def write(config: Config, table: list[dict[str, Any]], precision: str) -> None:
    """Markdown table and bar chart."""
    name = f"score_{Path(config.test_file or config.run).parent.name}_{precision.lower()}"
    rows: list[list[str]] = []
    first = table[0]["scorer"]
    for entry in table:
        ratio, agreement = entry[f"ratio_of_{first}"], entry["agreement_with_per_label"]
        rows.append([
            entry["scorer"], f"{entry['examples_per_second']:.3g}",
            ", ".join(f"{value:.3g}" for value in entry["all_rounds"]),
            f"{ratio:.2f}" if ratio else "accuracy lost", f"{entry['cpu_seconds']:.3g}",
            f"{entry['memory_over_the_model_mb']:.0f}", str(entry["batch_size"]), str(entry["rows"]),
            f"{entry['accuracy']:.3f}", str(entry["outside_label_set"]),
            "" if agreement is None else f"{agreement:.3f}",
        ])  # fmt: skip
    header = ["scorer", "examples/s", "rounds", f"{first} is faster by", "CPU s per example"]
    header += ["MB over the model", "batch", "rows", "accuracy", "outside the set", "agrees with per_label"]
    speeds, label = [entry["examples_per_second"] for entry in table], f"examples/s, {precision}, {config.device}"
    figure = turns.bars([entry["scorer"] for entry in table], speeds, label)
    turns.write(config, name, header, rows, table, figure)


if __name__ == "__main__":
    with cli_errors():
        main()
