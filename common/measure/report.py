"""The results of an evaluation as files: metrics.json, predictions, pictures and report.md."""

import contextlib
import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data.classification import SEPARATOR, Example
from common.data.report import markdown, table
from common.disk import SUSPECTS, named, to_json, write_json, write_text
from common.errors import printable
from common.measure import figures
from common.measure.decisions import calibration
from common.measure.gain import gain_over_best, gain_sentence
from common.measure.intervals import wilson
from common.measure.label_answer import Answer
from common.measure.metrics import METRICS, Metric, confusion_matrix, headlines, indicator, interval, rows_right
from common.options import CAUSAL_LM, CHAT, CLASSIFICATION

if TYPE_CHECKING:
    from common.model.classifier import Classifier

Metrics = dict[str, Any]  # the content of a metrics.json
Results = Mapping[str, Metrics | str]  # method -> its metrics, or a text in their place
SAMPLES = 10  # answers shown in a report
SHARES = {"accuracy": "accuracy and a micro-F1 that equals it", "stopped": "the share that ends by itself"}
PAIRS = 10  # of labels that are confused most, shown in a report


def results_table(results: Results, split: str, columns: Sequence[Metric]) -> str:
    """One row per method: these metrics with their 95 % intervals. A metric that no method has is left out."""
    measured = [entry for entry in results.values() if isinstance(entry, dict)]
    columns = [column for column in columns if any(column.name in metrics for metrics in measured)]
    rows = []
    for method, entry in results.items():
        rows.append([method, *(entry if isinstance(entry, str) else value_text(entry, c.name) for c in columns)])
    return table([f"{split} split", *(column.title for column in columns)], rows)


def value_text(metrics: Metrics, name: str) -> str:
    """A metric with its 95 % interval, if it has one; - where it was not measured."""
    if name not in metrics:
        return "-"
    bounds = interval(metrics, name)
    return f"{metrics[name]:.3f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")


def census_table(census: dict[str, Any], mixed_precision: str) -> str:
    """Parameters by group and dtype (`base_model.census`), and what is computed in which dtype."""
    rows = [[entry["group"], entry["dtype"], f"{entry['parameters']:,}"] for entry in census["groups"]]
    share = census["trainable"] / census["total"]
    compute = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[mixed_precision]
    text = f"Trained: {census['trainable']:,} of {census['total']:,} parameters ({share:.2%}); computed in {compute}."
    return table(["weights", "dtype", "parameters"], rows) + f"\n{text}"


def write_classification(
    folder: Path,
    metrics: Metrics,
    results: Results,
    split: str,
    *,
    classifier: "Classifier",
    examples: Sequence[Example],
    answers: Sequence[Answer],
    decode: str = "score",
) -> str:
    """predictions.jsonl and .csv, wrong.csv, metrics.json, confusion_matrix.png and report.md; returns what is first.

    That is the gain over the best baseline whose predictions are in the folder (`gain_over_best`), and the results
    table. results: the rows of that table, baselines included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels, multi_label = classifier.prompt.labels, classifier.prompt.multi_label
    rows = [
        [label, *(f"{entry[name]:.3f}" for name in ("precision", "recall", "f1")), str(entry["support"])]
        for label, entry in metrics["per_label"].items()
    ]
    per_label = table(["label", "precision", "recall", "F1", "rows"], rows)
    parts = [per_label, f"Answers outside the label set: {metrics['outside_label_set']} of {metrics['rows']}."]
    gold, predicted = [example.labels for example in examples], [answer.labels for answer in answers]
    matrix = confusion_matrix(gold, predicted, len(labels), multi_label)
    if figures.can_draw():
        figures.draw_confusion(folder / "confusion_matrix.png", matrix, labels, multi_label)
        parts.append("![confusion matrix](confusion_matrix.png)")
    _write_predictions(folder, _predictions(classifier, examples, answers))
    wrong = _wrong(labels, multi_label, examples, answers)
    write_sheet(folder / "wrong.csv", wrong, ["id", "gold", "prediction", "p(prediction)", "p(gold)", "text"])
    if wrong and not multi_label:
        pairs = Counter((row["gold"], row["prediction"] or "none of the labels") for row in wrong)
        most = [[gold, found, str(count)] for (gold, found), count in pairs.most_common(PAIRS)]
        parts += ["Most confused, of all errors (wrong.csv):", table(["label", "answered", "rows"], most)]
    if suspects := sum(entry.get("suspects", 0) for entry in results.values() if isinstance(entry, dict)):
        parts.append(f"The labels of {suspects} training rows may be wrong: see {SUSPECTS} in the run folder.")
    metrics = {**metrics, "decode": "head" if classifier.head else decode, "confusion_matrix": matrix.tolist()}
    if answers and answers[0].probabilities:
        found, said = _certainties(folder, gold, answers, multi_label)
        metrics, parts = metrics | found, [*parts, *said]
    if gain := gain_over_best(folder, list(results), examples, predicted, labels):
        metrics["gain_over_best_baseline"] = gain
    first = gain_sentence(gain, len(examples), multi_label) if gain else ""
    return write(folder, metrics, results, split, CLASSIFICATION, *parts, first=first)


def _wrong(
    labels: Sequence[str], multi_label: bool, examples: Sequence[Example], answers: Sequence[Answer]
) -> list[dict[str, Any]]:
    """The rows of wrong.csv: errors, the most certain ones first.

    Of several labels per row, p(prediction) is of the least certain decision of the answer, p(gold) of the least
    probable one of the right answer.
    """

    def probability(answer: Answer, indices: Sequence[int] | None) -> float | None:
        if indices is None or not answer.probabilities:
            return None
        if not multi_label:
            return answer.probabilities[indices[0]] if indices else None
        return min(p if k in indices else 1 - p for k, p in enumerate(answer.probabilities))

    def named(indices: Sequence[int] | None) -> str | None:
        return None if indices is None else SEPARATOR.join(labels[k] for k in indices)

    rows = [
        {"id": example.id, "gold": named(example.labels), "prediction": named(answer.labels),
         "p(prediction)": probability(answer, answer.labels), "p(gold)": probability(answer, example.labels),
         "text": example.text}
        for example, answer in zip(examples, answers, strict=True) if answer.labels != tuple(example.labels)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -(row["p(prediction)"] or 0))


def _certainties(
    folder: Path, gold: Sequence[Sequence[int]], answers: Sequence[Answer], multi_label: bool
) -> tuple[Metrics, list[str]]:
    """What the probabilities are worth: metrics and, for report.md, sentences and pictures."""
    p = np.array([answer.probabilities for answer in answers])
    right = rows_right(gold, [answer.labels for answer in answers])
    metrics = calibration(p, indicator(gold, p.shape[1]), multi_label)
    shown = ", ".join(f"{METRICS[name].title} {metrics[name]:.3f}" for name in ("ece", "brier_score", "nll"))
    parts = [f"Probabilities: {shown}."]
    accepted = np.array([answer.accepted for answer in answers])
    if not accepted.all():
        metrics["accepted"] = float(accepted.mean())
        parts.append(f"Of {len(answers)} answers {accepted.sum()} are certain enough to be given.")
        if accepted.any():
            hits, rows = int(right[accepted].sum()), int(accepted.sum())
            metrics["accuracy_accepted"] = hits / rows
            metrics["accuracy_accepted_interval_95"] = low, high = wilson(hits, rows)
            parts[-1] += f" Of these {hits / rows:.3f} [{low:.3f}, {high:.3f}] are right."
    if figures.can_draw():
        figures.draw_reliability(folder / "reliability.png", metrics["calibration_bins"])
        figures.draw_risk_coverage(folder / "risk_coverage.png", np.array([x.certainty for x in answers]), right)
        parts += ["![reliability](reliability.png)", "![errors by coverage](risk_coverage.png)"]
    return metrics, parts


def write_causal_lm(
    folder: Path,
    metrics: Metrics,
    results: Results,
    split: str,
    *,
    blocks: Sequence[tuple[float, int]],
    units: Sequence[int],
    sample: str,
) -> str:
    """metrics.json, blocks.jsonl, perplexity.png and report.md; returns the results table.

    blocks: nats and predicted tokens of each. units: of each (`units_of`). sample: a prompt and how the model continued
    it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with named(folder), open(folder / "blocks.jsonl", "w", encoding="utf-8") as file:
        for number, ((nats, tokens), unit) in enumerate(zip(blocks, units, strict=True)):
            row = {"block": number, "unit": unit, "nats": nats, "predicted_tokens": tokens}
            file.write(to_json(row) + "\n")
    picture = ["![perplexity](perplexity.png)"] if figures.can_draw() else []
    if picture:
        figures.draw_bars(folder / "perplexity.png", results, "perplexity")
    sampled = ["A sample, the prompt included:", _quoted(sample)] if sample else []
    return write(folder, metrics, results, split, CAUSAL_LM, *picture, *sampled, unit=metrics.get("unit", "blocks"))


def write_chat(
    folder: Path, metrics: Metrics, results: Results, split: str, *, answers: Sequence[dict[str, Any]] = ()
) -> str:
    """metrics.json and report.md; of generated answers predictions.jsonl and .csv too; returns the results table.

    answers: id, prompt (as text), gold, prediction, stopped, truncated; SAMPLES of them are shown in the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    if answers:
        _write_predictions(folder, ((row, row) for row in answers))
        parts = ["ROUGE-L, chrF and BLEU compare greedy answers with references.", "## Samples"]
        for row in answers[:: -(-len(answers) // SAMPLES)]:
            prompt, gold, prediction = (_quoted(row[name]) for name in ("prompt", "gold", "prediction"))
            parts += [f"### {markdown(row['id'])}", prompt, "reference:", gold, "answer:", prediction]
    return write(folder, metrics, results, split, CHAT, *parts, unit=metrics.get("unit", "rows"))


def write(
    folder: Path,
    metrics: Metrics,
    results: Results,
    split: str,
    task: str,
    *parts: str,
    unit: str = "rows",
    first: str = "",
) -> str:
    """metrics.json, and report.md: the table of the task's headline metrics (returned), and below it the parts.

    unit: what the bootstrap of the intervals draws. first: a sentence before the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = "\n\n".join(filter(None, [first, results_table(results, split, headlines(task))]))
    write_json(folder / "metrics.json", metrics)
    shares = [f"Wilson's for {said}, else " for name, said in SHARES.items() if name in metrics]
    text = ["# Evaluation", shown, f"95 % intervals: {''.join(shares)}bootstrap over the {unit}.", *parts]
    write_text(folder / "report.md", printable("\n\n".join(text) + "\n"))
    return shown


def write_sheet(file: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A CSV file. rows: column -> cell, in the order of the columns."""
    with open(file, "w", encoding="utf-8", newline="") as sheet:
        writer = csv.writer(sheet)
        writer.writerow(map(_cell, columns))
        writer.writerows(map(_cell, row.values()) for row in rows)


def _write_predictions(folder: Path, rows: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """predictions.jsonl from the first of each pair, predictions.csv from the second."""
    with (
        named(folder),
        open(folder / "predictions.jsonl", "w", encoding="utf-8") as lines,
        open(folder / "predictions.csv", "w", encoding="utf-8", newline="") as sheet,
    ):
        writer = csv.writer(sheet)
        for number, (row, cells) in enumerate(rows):
            if number == 0:
                writer.writerow(map(_cell, cells))
            lines.write(to_json(row) + "\n")
            writer.writerow(map(_cell, cells.values()))


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: a text that would begin one gets an apostrophe before it."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        with contextlib.suppress(ValueError):
            float(value)
            return value
        return f"'{value}"
    return value


def _predictions(
    classifier: "Classifier", examples: Sequence[Example], answers: Sequence[Answer]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row for predictions.jsonl and for predictions.csv, which holds the prompt too."""
    prompt, all_accepted = classifier.prompt, all(answer.accepted for answer in answers)
    for example, answer in zip(examples, answers, strict=True):
        rendered = prompt.prompt(example.text)
        named: dict[str, Any] = {"gold": example.labels, "prediction": answer.labels}
        for key, indices in named.items():
            names = None if indices is None else [prompt.labels[k] for k in indices]
            named[key] = names if names is None or prompt.multi_label else names[0]
        p = dict(zip(prompt.labels if answer.probabilities else (), answer.probabilities, strict=True))
        written = {} if answer.text is None else {"answer": answer.text}
        abstained = {} if all_accepted else {"abstained": not answer.accepted}
        joined = {key: SEPARATOR.join(names) if isinstance(names, list) else names for key, names in named.items()}
        columns = {f"p({label})": value for label, value in p.items()}
        shortened, text = str(rendered.truncated).lower(), classifier.tokenizer.decode(rendered.ids)
        yield (
            {"id": example.id, **named, "probabilities": p, "truncated": rendered.truncated, **written, **abstained},
            {"id": example.id, **joined, **columns, **written, **abstained, "truncated": shortened, "prompt": text},
        )


def _quoted(text: str) -> str:
    return "\n".join(f"> {markdown(line)}" for line in text.splitlines() or [""])
