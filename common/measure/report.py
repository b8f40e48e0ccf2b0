"""Tables, pictures and files that people look at; `python -m common.report table outputs/...` compares runs."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.data.classification import SEPARATOR, Example
from common.data.report import table
from common.measure.figures import can_draw, draw_bars, draw_confusion
from common.measure.metrics import confusion_matrix
from common.measure.scoring import Answer
from common.model.classifier import Classifier

CLASSIFICATION = {"accuracy": "accuracy", "f1_micro": "micro-F1", "f1_macro": "macro-F1"}
PERPLEXITY = {
    "perplexity": "perplexity", "eval_loss": "nats a token", "bits_per_byte": "bits a byte",
    "word_perplexity": "perplexity a word",
}  # fmt: skip
ANSWER_LOSS = {"eval_loss": "nats a token", "perplexity": "perplexity"}  # of answers
ANSWERS = {**ANSWER_LOSS, "rouge_l": "ROUGE-L", "chrf": "chrF", "bleu": "BLEU", "stopped": "ends by itself"}
SAMPLES = 10  # answers shown in a report


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
