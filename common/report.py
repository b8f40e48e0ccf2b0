"""Tables, pictures and files that people look at; `python -m common.report table outputs/...` compares runs."""

import argparse
import csv
import importlib.util
import json
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.config import cli_errors
from common.data import SEPARATOR, Example
from common.metrics import confusion_matrix
from common.runlog import say
from common.scoring import Answer, Classifier

CLASSIFICATION = {"accuracy": "accuracy", "f1_micro": "micro-F1", "f1_macro": "macro-F1"}
PERPLEXITY = {
    "perplexity": "perplexity", "eval_loss": "nats a token", "bits_per_byte": "bits a byte",
    "word_perplexity": "perplexity a word",
}  # fmt: skip
SEED_COLUMNS = {
    "epochs": "epochs", "train_loss": "train loss", "eval_loss": "eval loss", "accuracy": "accuracy",
    "f1_micro": "micro-F1", "f1_macro": "macro-F1", "perplexity": "perplexity",
    "train_runtime": "train s", "eval_runtime": "eval s",
    "train_steps_per_second": "steps/s", "train_samples_per_second": "samples/s",
}  # fmt: skip


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def say_what_is_missing(accelerator: Any, report_to: list[str] | None) -> None:
    """Says which optional packages are not installed, and the command that adds them."""
    missing = [] if can_draw() else ["matplotlib"]
    if report_to is None and not importlib.util.find_spec("tensorboard"):
        missing.append("tensorboard")
    if missing:
        later = "" if can_draw() else " `evaluate.py --run RUN` can draw the confusion matrix later."
        command = f"`pip install {' '.join(missing)}`"
        say(accelerator, f"Not installed: {', '.join(missing)}. {command} adds what it draws or logs.{later}\n")


ANSWER_LOSS = {"eval_loss": "nats a token", "perplexity": "perplexity"}  # of answers
ANSWERS = {**ANSWER_LOSS, "rouge_l": "ROUGE-L", "chrf": "chrF", "bleu": "BLEU", "stopped": "ends by itself"}
SAMPLES = 10  # answers shown in a report


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    header, *rows = [[str(cell).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def results_table(
    results: dict[str, dict[str, Any] | str], split: str = "test", headlines: dict[str, str] = CLASSIFICATION
) -> str:
    """One row a method: its headline figures with their 95 % intervals; a text stands for missing figures."""
    rows = []
    for name, metrics in results.items():
        if isinstance(metrics, str):
            rows.append([name, *[metrics] * len(headlines)])
        else:
            bounds = metrics["intervals_95"]
            cells = (f"{metrics[k]:.3f}" if k in metrics else "-" for k in headlines)
            ranges = (f" [{bounds[k][0]:.3f}, {bounds[k][1]:.3f}]" if k in bounds else "" for k in headlines)
            rows.append([name, *map("".join, zip(cells, ranges, strict=True))])
    return table([f"{split} split", *headlines.values()], rows)


def data_report(report: dict[str, Any], example: str) -> str:
    """The data report as Markdown: what was kept, shortened, dropped and why, and one row as the model sees it."""
    lines = ["# Data report", ""]
    for split, source in report["files"].items():
        lines.append(f"- {split}: {source['name']} (sha256 {source['sha256'][:12]})")
    drawn = ", stratified" if "labels" in report else ""
    for split, count in report.get("cut_from_train", {}).items():
        lines.append(f"- {split}: {count} rows cut from the training file{drawn}; row ids in splits.json")
    for split, shapes in report.get("shapes", {}).items():
        lines.append(f"- {split}: shape {', '.join(f'{name} ({count} rows)' for name, count in shapes.items())}")
    if template := report.get("chat_template"):
        lines.append(f"- {template['source']} (sha256 {template['sha256'][:12]}); answers end with {template['end']}")
        lines += [f"- {note}" for note in template["notes"]]
    columns = {
        "read": "read", "dropped_empty_text": "dropped: no text", "few_shot": "in the prompt",
        "dropped_unanswered": "turns dropped: no answer", "with_tools": "with tools, in the system turn",
        "used": "used", "answers": "answers", "in_several_rows": "too long for one row",
        "without_early_turns": "rows without early turns", "shortened": "shortened", "cut_answers": "answers cut",
        "duplicates": "duplicate texts", "also_in_train": "also in train",
    }  # fmt: skip
    columns = {key: name for key, name in columns.items() if any(key in entry for entry in report["rows"].values())}
    rows = [[split, *(str(entry.get(key, "-")) for key in columns)] for split, entry in report["rows"].items()]
    lines += ["", table(["rows", *columns.values()], rows), ""]
    if "labels" in report:
        splits, entries = list(report["rows"]), report["rows"].values()
        counts = [[label, *(str(entry["label_counts"][label]) for entry in entries)] for label in report["labels"]]
        lines += [table(["label", *splits], counts), ""]
    lines += ["One training row; what is trained on stands in [[ ]]:", ""]
    return "\n".join([*lines, *(f"    {line}" for line in example.splitlines()), ""])


def corpus_report(report: dict[str, Any], start: str, wrapped: bool, block: str) -> str:
    """The data report of a corpus as Markdown: text and blocks of each split, what the blocks are, and one of them.

    start: the text of the ids in front of every block. wrapped: whether tokens see earlier documents of their block.
    """
    lines = ["# Data report", ""]
    for split, source in report["files"].items():
        lines.append(f"- {split}: {source['name']} (sha256 {source['sha256'][:12]})")
    for split in report["splits"].keys() - report["files"].keys():
        lines.append(f"- {split}: cut from the training text; the numbers of its pieces are in splits.json")
    columns = ("documents", "bytes", "words", "tokens", "blocks", "used")
    rows = [[split, *(f"{entry[name]:,}" for name in columns)] for split, entry in report["splits"].items()]
    lines += ["", table(["split", *columns], rows), ""]
    lines.append(f"Every block begins with {start}." if start else "Blocks begin without a BOS token.")
    lines.append(
        "Blocks are windows of the text: a token sees the end of the document before its own (wrapped packing)."
        if wrapped
        else "No token sees another document of its block (document masking)."
    )
    return "\n".join([*lines, "", "One training block:", "", *(f"    {line}" for line in block.splitlines()), ""])


def write_perplexity(
    folder: Path,
    blocks: Sequence[tuple[float, int]],
    metrics: dict[str, Any],
    results: dict[str, Any],
    split: str,
    sample: str,
) -> None:
    """metrics.json, blocks.jsonl (nats and predicted tokens of each), perplexity.png and report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    with open(folder / "blocks.jsonl", "w", encoding="utf-8") as file:
        for number, (nats, tokens) in enumerate(blocks):
            file.write(json.dumps({"block": number, "nats": nats, "predicted_tokens": tokens}) + "\n")
    text = ["# Evaluation", results_table(results, split, PERPLEXITY), "95 % intervals: bootstrap over the blocks."]
    if can_draw():
        draw_bars(folder / "perplexity.png", results, "perplexity")
        text.append("![perplexity](perplexity.png)")
    if sample:
        text += ["A sample, the prompt included:", "\n".join(f"> {line}" for line in sample.splitlines())]
    (folder / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def write_losses(folder: Path, metrics: dict[str, Any], results: dict[str, Any], split: str = "test") -> None:
    """metrics.json, and report.md with the loss of the answers beside the untrained base's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    text = ["# Evaluation", results_table(results, split, ANSWER_LOSS), "95 % intervals: bootstrap over the rows."]
    (folder / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def write_answers(
    folder: Path, rows: Sequence[dict[str, Any]], metrics: dict[str, Any], results: dict[str, Any], split: str
) -> None:
    """metrics.json, predictions.jsonl and .csv, and report.md with SAMPLES of the answers.

    rows: id, prompt (as text), gold, prediction, stopped, truncated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    with (
        open(folder / "predictions.jsonl", "w", encoding="utf-8") as lines,
        open(folder / "predictions.csv", "w", encoding="utf-8", newline="") as sheet,
    ):
        writer = csv.DictWriter(sheet, list(rows[0]))
        writer.writeheader()
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            writer.writerow(row)
    shown = [rows[i] for i in range(0, len(rows), -(-len(rows) // SAMPLES))]
    samples = "\n\n".join(
        f"### {row['id']}\n\n{_quoted(row['prompt'])}\n\nreference:\n\n{_quoted(row['gold'])}\n\nanswer:\n\n"
        f"{_quoted(row['prediction'])}"
        for row in shown
    )
    figures = results_table(results, split, ANSWERS)
    notes = "95 % intervals: bootstrap over the rows. ROUGE-L, chrF and BLEU compare greedy answers with references."
    text = ["# Evaluation", figures, notes, "## Samples"]
    (folder / "report.md").write_text("\n\n".join([*text, samples]) + "\n", encoding="utf-8")


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def draw_bars(path: Path, results: dict[str, dict[str, Any]], metric: str) -> None:
    """One bar a method, with its 95 % interval."""
    plt = pyplot()
    values = [entry[metric] for entry in results.values()]
    bounds = [entry["intervals_95"][metric] for entry in results.values()]
    errors = np.array([[v - low, high - v] for v, (low, high) in zip(values, bounds, strict=True)]).T.clip(min=0)
    figure, axes = plt.subplots(figsize=(6, 1 + 0.5 * len(values)), layout="constrained")
    axes.barh(list(results), values, xerr=errors, color="tab:blue", capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel=metric)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def census_table(census: dict[str, Any], config: Any) -> str:
    """Parameters by group and dtype, and what is computed in which dtype."""
    rows = [[entry["group"], entry["dtype"], f"{entry['parameters']:,}"] for entry in census["groups"]]
    share = census["trainable"] / census["total"]
    compute = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.mixed_precision]
    text = f"Trained: {census['trainable']:,} of {census['total']:,} parameters ({share:.2%}); computed in {compute}."
    return table(["weights", "dtype", "parameters"], rows) + f"\n{text}"


def write_evaluation(
    folder: Path,
    classifier: Classifier,
    examples: Sequence[Example],
    answers: Sequence[Answer],
    metrics: dict[str, Any],
    results: dict[str, Any],
    split: str = "test",
) -> None:
    """predictions.jsonl and .csv, metrics.json, confusion_matrix.png and report.md.

    results: the rows of the results table, baselines included. split: its name there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels, multi_label = classifier.prompt.labels, classifier.prompt.multi_label
    _write_predictions(folder, classifier, examples, answers)
    gold, predicted = [example.labels for example in examples], [answer.labels for answer in answers]
    matrix = confusion_matrix(gold, predicted, len(labels), multi_label)
    (folder / "metrics.json").write_text(json.dumps({**metrics, "confusion_matrix": matrix.tolist()}, indent=2))
    rows = [
        [label, *(f"{entry[key]:.3f}" for key in ("precision", "recall", "f1")), str(entry["support"])]
        for label, entry in metrics["per_label"].items()
    ]
    outside = f"Answers outside the label set: {metrics['outside_label_set']} of {metrics['rows']}."
    per_label = table(["label", "precision", "recall", "F1", "rows"], rows)
    text = [
        "# Evaluation",
        results_table(results, split),
        "95 % intervals: bootstrap over the rows.",
        per_label,
        outside,
    ]
    if can_draw():
        draw_confusion(folder / "confusion_matrix.png", matrix, labels, multi_label)
        text.append("![confusion matrix](confusion_matrix.png)")
    (folder / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def _write_predictions(
    folder: Path, classifier: Classifier, examples: Sequence[Example], answers: Sequence[Answer]
) -> None:
    prompt, decode = classifier.prompt, classifier.tokenizer.decode

    def named(indices: Sequence[int] | None) -> Any:
        if indices is None:
            return None
        names = [prompt.labels[k] for k in indices]
        return names if prompt.multi_label else names[0]

    with (
        open(folder / "predictions.jsonl", "w", encoding="utf-8") as lines,
        open(folder / "predictions.csv", "w", encoding="utf-8", newline="") as sheet,
    ):
        writer = csv.writer(sheet)
        scored = prompt.labels if answers[0].probabilities else []
        written = ["answer"] if answers[0].text is not None else []
        columns = ["id", "gold", "prediction", *(f"p({label})" for label in scored), *written, "truncated", "prompt"]
        writer.writerow(columns)
        for example, answer in zip(examples, answers, strict=True):
            rendered = prompt.prompt(example.text)
            row = {"id": example.id, "gold": named(example.labels), "prediction": named(answer.labels)}
            row["probabilities"] = dict(zip(scored, answer.probabilities, strict=True))
            row["truncated"] = rendered.truncated
            if written:
                row["answer"] = answer.text
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            cells = [SEPARATOR.join(x) if isinstance(x, list) else x for x in (row["gold"], row["prediction"])]
            cells += [*answer.probabilities, *([answer.text] if written else []), str(rendered.truncated).lower()]
            writer.writerow([example.id, *cells, decode(rendered.ids)])


def draw_confusion(path: Path, matrix: np.ndarray, labels: Sequence[str], multi_label: bool) -> None:
    """Gold by prediction, shares of each gold row; for several labels, each label's right and wrong decisions."""
    plt = pyplot()
    labels = [label.replace("$", r"\$") for label in labels]  # no formulas
    if multi_label:
        shown = matrix.reshape(len(labels), 4).astype(float)
        columns, rows, title = ["true no", "false yes", "false no", "true yes"], list(labels), "decisions by label"
    else:
        used = len(labels) + bool(matrix[-1].sum() or matrix[:, -1].sum())
        shown = matrix[:used, :used].astype(float)
        rows = columns = [*labels, "(no label)"][:used]
        title = "gold by prediction"
    share = shown / np.maximum(shown.sum(1, keepdims=True), 1)
    size = min(30, 3 + 0.35 * max(len(columns), 6)), min(30, 2.5 + 0.35 * max(len(rows), 6))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="prediction", ylabel="gold" if not multi_label else "label", title=title)
    if len(rows) <= 30:
        for i, j in np.ndindex(shown.shape):
            color = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, f"{shown[i, j]:.0f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, label="share of the row")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label in a script that the font lacks
        figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_learning_curve(path: Path, metrics_file: Path, metric: str) -> None:
    """Training loss, and the validation metric, over the updates."""
    if not can_draw():
        return
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    train = [(line["update"], line["loss"]) for line in lines if "loss" in line]
    evaluated = [(line["update"], line[metric]) for line in lines if metric in line]
    if not train and not evaluated:  # fewer updates than --logging_steps
        return
    plt = pyplot()
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    if train:
        left.plot(*zip(*train, strict=True), color="tab:gray", label="training loss")
    left.set(xlabel="update", ylabel="loss per target")
    if evaluated:
        right = left.twinx()
        right.plot(*zip(*evaluated, strict=True), "o-", color="tab:blue", label=f"validation {metric}")
        right.set_ylabel(metric)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_seed_table(file: Path, runs: dict[int, dict[str, Any] | str]) -> None:
    """Prints and writes one row a seed (a text: why it failed), then mean and standard deviation."""
    done = [metrics for metrics in runs.values() if not isinstance(metrics, str)]
    columns = [key for key in SEED_COLUMNS if any(key in metrics for metrics in done)]
    rows, notes = [], []
    for seed, metrics in runs.items():
        if isinstance(metrics, str):
            notes.append(f"Seed {seed} {metrics}")
            metrics = {}
        rows.append([str(seed), *(f"{metrics[key]:.4g}" if key in metrics else "failed" for key in columns)])
    if len(done) > 1:
        spread = [[metrics[key] for metrics in done] for key in columns]
        rows.append(["mean ± sd", *(f"{statistics.mean(v):.4g} ± {statistics.stdev(v):.2g}" for v in spread)])
    text = "\n".join([table(["seed", *(SEED_COLUMNS[key] for key in columns)], rows), *notes])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nWritten to {file}")


def pyplot() -> Any:
    """matplotlib's, for files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m common.report table RUN...`: runs, or folders of runs, side by side."""
    from common.run_table import write_table

    parser = argparse.ArgumentParser(prog="python -m common.report", allow_abbrev=False)
    parser.add_argument("what", choices=["table"], help="table: runs of one task side by side, as Markdown, CSV, PNG")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="run folder, or a folder of runs")
    parser.add_argument("--output_dir", type=Path, help="unset: the first folder given")
    options = parser.parse_args(argv)
    target = options.output_dir or options.folders[0]
    print(f"{write_table(options.folders, target)}\n\nWritten to {target}")


if __name__ == "__main__":
    with cli_errors():
        main()
