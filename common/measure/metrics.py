"""The registry of metrics and tasks, and the metrics themselves, each counted from per-row results.

Imports numpy alone, so that the scripts can offer the metrics as values of an option.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.errors import InputError
from common.measure.intervals import Measure, bootstrap, point, sums_of, wilson
from common.measure.label_answer import Answer
from common.options import CAUSAL_LM, CHAT, CLASSIFICATION

LARGEST_EXPONENT = 700.0  # a float ends at e^709


@dataclass(frozen=True)
class Metric:
    """One number of metrics.json: its key there, its title in tables, and which way is better.

    point: a difference of one point, of a share 0.01; None: 1 % of the value.
    """

    name: str
    title: str
    higher_is_better: bool
    point: float | None = None


@dataclass(frozen=True)
class Task:
    """What a model is trained for (its name in task.json), and the names of the metrics that tell how well.

    headlines: what its tables show, in order. choosable: what may choose the best weights, on the validation split,
    the default first. curve: drawn over the updates. compared: what several runs are compared by.
    """

    name: str
    headlines: tuple[str, ...]
    choosable: tuple[str, ...]
    curve: str
    compared: str


METRICS: dict[str, Metric] = {}
TASKS: dict[str, Task] = {}


def register_metric(
    name: str, title: str, *, higher_is_better: bool, point: float | None = None, tasks: Sequence[str] = ()
) -> None:
    """Adds a metric. tasks: those whose tables show it where it was measured, and whose best weights it may choose."""
    METRICS[name] = Metric(name, title, higher_is_better, point)
    for task in tasks:
        if name not in choosable(task):
            old = TASKS[task]
            TASKS[task] = replace(old, headlines=(*old.headlines, name), choosable=(*old.choosable, name))


def register_task(task: Task) -> None:
    """Adds a task. Raises InputError where it names a metric that is not registered."""
    for name in (*task.headlines, *task.choosable, task.curve, task.compared):
        metric(name)
    TASKS[task.name] = task


def metric(name: str) -> Metric:
    """A registered metric. Raises InputError for any other."""
    if name not in METRICS:
        raise InputError(f"{name}: there is no such metric. Known are {', '.join(METRICS)}; register_metric adds one.")
    return METRICS[name]


def headlines(task: str) -> list[Metric]:
    """What the tables of a task show, in order; nothing for a task that is not registered."""
    return [METRICS[name] for name in TASKS[task].headlines] if task in TASKS else []


def choosable(task: str) -> tuple[str, ...]:
    """What may choose the best weights of a task, the default first. Raises InputError for an unknown task."""
    if task not in TASKS:
        raise InputError(f"{task}: there is no such task. Known are {', '.join(TASKS)}; register_task adds one.")
    return TASKS[task].choosable


register_metric("accuracy", "accuracy", higher_is_better=True, point=0.01)
register_metric("f1_micro", "micro-F1", higher_is_better=True, point=0.01)
register_metric("f1_macro", "macro-F1", higher_is_better=True, point=0.01)
register_metric("perplexity", "perplexity", higher_is_better=False)
register_metric("eval_loss", "nats per token", higher_is_better=False)
register_metric("bits_per_byte", "bits per byte", higher_is_better=False)
register_metric("word_perplexity", "perplexity per word", higher_is_better=False)
register_metric("rouge_l", "ROUGE-L", higher_is_better=True, point=1)
register_metric("chrf", "chrF", higher_is_better=True, point=1)
register_metric("bleu", "BLEU", higher_is_better=True, point=1)
register_metric("stopped", "ends by itself", higher_is_better=True, point=0.01)
register_metric("ece", "expected calibration error", higher_is_better=False)
register_metric("brier_score", "Brier score", higher_is_better=False)
register_metric("nll", "nats per row", higher_is_better=False)

LABELS, LOSSES = ("accuracy", "f1_micro", "f1_macro"), ("eval_loss", "perplexity")
CHOOSABLE = ("f1_macro", "f1_micro", "accuracy", "eval_loss")
TEXTS = ("perplexity", "eval_loss", "bits_per_byte", "word_perplexity")
ANSWERS = (*LOSSES, "rouge_l", "chrf", "bleu", "stopped")  # the losses alone where no answer was generated
register_task(Task(CLASSIFICATION, LABELS, CHOOSABLE, curve="f1_macro", compared="accuracy"))
register_task(Task(CAUSAL_LM, TEXTS, LOSSES, curve="perplexity", compared="perplexity"))
register_task(Task(CHAT, ANSWERS, LOSSES, curve="eval_loss", compared="perplexity"))


def label_measure(gold: Sequence[Sequence[int]], predicted: Sequence[Sequence[int] | None], labels: int) -> Measure:
    """Accuracy (all labels of a row right), micro-, macro- and weighted F1, as a function of the rows' weights.

    gold, predicted: label indices of each row; None is an answer outside the label set: wrong, and never dropped.
    Definitions are scikit-learn's with all labels listed and zero_division=0.
    """
    real, found, right = indicator(gold, labels), indicator(predicted, labels), rows_right(gold, predicted)
    hits, used = real & found, (real | found).any(0).mean()

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        tp, pred, true = weights @ hits, weights @ found, weights @ real
        per_label = _ratio(2 * tp, pred + true)
        # A label that a resample has drawn no row of says nothing there. As a 0, it would move all of them down.
        drawn = np.maximum((pred + true > 0).sum(1), 1)
        return {
            "accuracy": weights @ right / weights.sum(1),
            "f1_micro": _ratio(2 * tp.sum(1), pred.sum(1) + true.sum(1)),
            "f1_macro": per_label.sum(1) / drawn * used,
            "f1_weighted": _ratio((per_label * true).sum(1), true.sum(1)),
        }

    return measure


def rows_right(gold: Sequence[Sequence[int]], predicted: Sequence[Sequence[int] | None]) -> np.ndarray:
    """[rows], whether all labels of each are right."""
    return np.array([p is not None and tuple(g) == tuple(p) for g, p in zip(gold, predicted, strict=True)])


def classification_metrics(
    gold: Sequence[Sequence[int]], predicted: Sequence[Sequence[int] | None], labels: Sequence[str]
) -> dict[str, Any]:
    """The values of `label_measure`, each with a 95 % interval, and precision, recall and F1 of every label.

    Intervals: Wilson's of accuracy, and of micro-F1 where that is the same number; else percentiles of a bootstrap.
    """
    measure, rows = label_measure(gold, predicted, len(labels)), len(gold)
    intervals = bootstrap(measure, rows)
    intervals["accuracy"] = wilson(int(rows_right(gold, predicted).sum()), rows)
    if all(len(g) == 1 and p is not None and len(p) == 1 for g, p in zip(gold, predicted, strict=True)):
        intervals["f1_micro"] = intervals["accuracy"]
    real, found = indicator(gold, len(labels)), indicator(predicted, len(labels))
    tp, pred, true = (real & found).sum(0), found.sum(0), real.sum(0)
    per_label = zip(labels, _ratio(tp, pred), _ratio(tp, true), _ratio(2 * tp, pred + true), true, strict=True)
    return {
        **point(measure, rows),
        "intervals_95": intervals,
        "rows": rows,
        "outside_label_set": sum(row is None for row in predicted),
        "per_label": {
            label: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(support)}
            for label, precision, recall, f1, support in per_label
        },
    }


def summarize(answers: Sequence[Answer], gold: Sequence[Sequence[int]], labels: Sequence[str]) -> dict[str, Any]:
    """`classification_metrics` of the answers, and the loss that their likelihoods of the gold answers amount to.

    eval_loss: nats per target (a token of the answer; for a head a row, or a row's label); mean_token_accuracy: share
    of the targets that were the likeliest choice; perplexity: e to the eval_loss.
    """
    metrics = classification_metrics(gold, [answer.labels for answer in answers], labels)
    if targets := sum(answer.targets for answer in answers):
        metrics["eval_loss"] = sum(answer.nll for answer in answers) / targets
        metrics["perplexity"] = math.exp(min(metrics["eval_loss"], LARGEST_EXPONENT))
        metrics["mean_token_accuracy"] = sum(answer.correct for answer in answers) / targets
    return metrics


def loss_measure(nats: np.ndarray, tokens: np.ndarray, per_token: dict[str, float] | None = None) -> Measure:
    """Losses and perplexities of `perplexity_metrics` from the nats and predicted tokens of each unit, [units]."""

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        loss = weights @ nats / (weights @ tokens)
        values = {"eval_loss": loss, "perplexity": np.exp(np.minimum(loss, LARGEST_EXPONENT))}
        if per_token:
            per_word = loss / max(per_token["words"], 1e-9)
            values["bits_per_byte"] = loss / per_token["bytes"] / math.log(2)
            values["word_perplexity"] = np.exp(np.minimum(per_word, LARGEST_EXPONENT))
        return values

    return measure


def perplexity_metrics(
    rows: Sequence[tuple[float, int]],
    per_token: dict[str, float] | None = None,
    *,
    units: Sequence[int] | None = None,
    unit: str = "rows",
) -> dict[str, Any]:
    """Perplexity and related metrics from (nats, predicted tokens) of every row: sums over all, no means of means.

    eval_loss: nats per token; perplexity: e to that. bits_per_byte and word_perplexity divide by the split's UTF-8
    bytes and white-space words instead, so that models with different tokenizers compare.
    per_token: {bytes, words} per token; unset: without these two. 95 % intervals: percentiles of a bootstrap that draws
    units. units: of each row, numbered from 0; unset: each row is one. unit: what they are, in the plural.
    """
    sums = sums_of(rows, range(len(rows)) if units is None else units)
    measure = loss_measure(sums[:, 0], sums[:, 1], per_token)
    metrics: dict[str, Any] = {
        **point(measure, len(sums)),
        "intervals_95": bootstrap(measure, len(sums)),
        "rows": len(rows),
        "units": len(sums),
        "unit": unit,
        "predicted_tokens": int(sums[:, 1].sum()),
    }
    return metrics | ({"per_token": per_token} if per_token else {})


def require_overlap_packages() -> None:
    """Raises InputError if a package that `text_overlap` needs is not installed."""
    for package in ("sacrebleu", "rouge_score"):
        if not importlib.util.find_spec(package):
            raise InputError(f"{package} is not installed. Run `pip install sacrebleu rouge-score`.")


def overlap_measure(answers: Sequence[str], references: Sequence[str]) -> Measure:
    """rouge_l, chrf and bleu of `text_overlap` as a function of the rows' weights."""
    from rouge_score.rouge_scorer import RougeScorer  # these two are extras
    from sacrebleu.metrics import BLEU, CHRF

    scorer = RougeScorer(["rougeL"])
    shared = np.array([100 * scorer.score(r, a)["rougeL"].fmeasure for r, a in zip(references, answers, strict=True)])
    counted = {  # [rows, counts]: what sacrebleu adds up over the rows of a corpus
        name: (metric, np.array(metric._extract_corpus_statistics(list(answers), [list(references)])))
        for name, metric in (("chrf", CHRF()), ("bleu", BLEU()))
    }

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        values = {"rouge_l": weights @ shared / weights.sum(1)}
        for name, (metric, counts) in counted.items():
            sums = (weights @ counts).round().astype(int).tolist()
            values[name] = np.array([metric._compute_score_from_stats(row).score for row in sums])
        return values

    return measure


def text_overlap(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """How much generated answers share with their references, from 0 to 100, with 95 % bootstrap intervals.

    rouge_l: mean F1 of the longest common word sequence (Lin, 2004; of a-z and 0-9 alone, as the rouge-score package
    reads words); chrf: character n-grams (Popovic, 2015) and bleu: word n-grams (Papineni et al., 2002), over the
    corpus, by sacrebleu with its defaults.
    """
    measure, rows = overlap_measure(answers, references), len(answers)
    return {**point(measure, rows), "intervals_95": bootstrap(measure, rows)}


def chat_metrics(
    losses: Sequence[tuple[float, int]], units: Sequence[int], answers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """`perplexity_metrics` of the references, `text_overlap` of the answers, and the share that ended by itself.

    losses, units: of each row, and its conversation. answers: gold, prediction and stopped of each conversation.
    """
    metrics = perplexity_metrics(losses, units=units, unit="conversations")
    overlap = text_overlap([row["prediction"] for row in answers], [row["gold"] for row in answers])
    stopped = sum(row["stopped"] for row in answers)
    intervals = metrics["intervals_95"] | overlap["intervals_95"] | {"stopped": wilson(stopped, len(answers))}
    shares = {"stopped": stopped / len(answers), "answers": len(answers)}
    return {**metrics, **overlap, **shares, "intervals_95": intervals}


def confusion_matrix(
    gold: Sequence[Sequence[int]], predicted: Sequence[Sequence[int] | None], labels: int, multi_label: bool
) -> np.ndarray:
    """One label per row: [labels + 1, labels + 1], gold by prediction, where the last row and column are "no label".

    Several: [labels, 2, 2], for each label gold by prediction, no / yes.
    """
    if multi_label:
        real, found = indicator(gold, labels), indicator(predicted, labels)
        return np.stack([[((real == g) & (found == p)).sum(0) for p in (0, 1)] for g in (0, 1)]).transpose(2, 0, 1)
    matrix = np.zeros((labels + 1, labels + 1), dtype=np.int64)
    for g, p in zip(gold, predicted, strict=True):
        matrix[g[0] if g else labels, p[0] if p else labels] += 1
    return matrix


def interval(metrics: dict[str, Any], name: str) -> list[float] | None:
    """The 95 % interval of a metric, [low, high], if it has one."""
    return metrics.get("intervals_95", {}).get(name)


def indicator(rows: Sequence[Sequence[int] | None], labels: int) -> np.ndarray:
    """[rows, labels] of 0/1 from the label indices of each row; None has none."""
    matrix = np.zeros((len(rows), labels), dtype=np.int64)
    for i, row in enumerate(rows):
        matrix[i, list(row or ())] = 1
    return matrix


def _ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """The quotient, 0 where the denominator is 0."""
    denominator = np.asarray(denominator, dtype=float)
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)
