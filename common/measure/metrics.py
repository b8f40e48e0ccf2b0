"""Honest figures: classification metrics with bootstrap intervals, counted from per-row results."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000


def indicator(rows: Sequence[Sequence[int]], labels: int) -> np.ndarray:
    """[rows, labels] of 0/1 from the label indices of each row."""
    matrix = np.zeros((len(rows), labels), dtype=np.int64)
    for i, row in enumerate(rows):
        matrix[i, list(row)] = 1
    return matrix


def classification_metrics(
    gold: Sequence[Sequence[int]], predicted: Sequence[Sequence[int] | None], labels: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Accuracy (all labels of a row right), micro-, macro- and weighted F1, each with a 95 % interval, and per label.

    gold, predicted: label indices of each row; None is an answer outside the label set: wrong, and never dropped.
    Definitions are scikit-learn's with all labels listed and zero_division=0. Intervals are percentiles of RESAMPLES
    bootstrap resamples of the rows (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
    """
    truth = indicator(gold, len(labels))
    answer = indicator([row or () for row in predicted], len(labels))
    exact = np.array(
        [p is not None and tuple(g) == tuple(p) for g, p in zip(gold, predicted, strict=True)], dtype=float
    )
    hits, found, real = truth & answer, answer, truth

    def headline(weight: np.ndarray) -> dict[str, np.ndarray]:
        """weight: [resamples, rows], how often each row occurs -> values of [resamples]."""
        tp, pred, true = weight @ hits, weight @ found, weight @ real
        per_label = _ratio(2 * tp, pred + true)
        return {
            "accuracy": weight @ exact / weight.sum(1),
            "f1_micro": _ratio(2 * tp.sum(1), pred.sum(1) + true.sum(1)),
            "f1_macro": per_label.mean(1),
            "f1_weighted": _ratio((per_label * true).sum(1), true.sum(1)),
        }

    once = np.ones((1, len(exact)))
    values = {name: float(value[0]) for name, value in headline(once).items()}
    rng = np.random.default_rng(seed)
    shares, at_once = np.full(len(exact), 1 / len(exact)), max(1, 10**7 // len(exact))  # so 80 MB, however many rows
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    parts = [headline(rng.multinomial(len(exact), shares, size=size).astype(float)) for size in sizes]
    resampled = {name: np.concatenate([part[name] for part in parts]) for name in values}
    intervals = {name: np.percentile(value, [2.5, 97.5]).tolist() for name, value in resampled.items()}
    tp, pred, true = hits.sum(0), found.sum(0), real.sum(0)
    per_label = {
        label: {
            "precision": float(_ratio(tp[k], pred[k])),
            "recall": float(_ratio(tp[k], true[k])),
            "f1": float(_ratio(2 * tp[k], pred[k] + true[k])),
            "support": int(true[k]),
        }
        for k, label in enumerate(labels)
    }
    return {
        **values,
        "intervals_95": intervals,
        "rows": len(exact),
        "outside_label_set": sum(row is None for row in predicted),
        "per_label": per_label,
    }


def summarise(answers: Sequence[Any], gold: Sequence[Sequence[int]], labels: Sequence[str]) -> dict[str, Any]:
    """`classification_metrics` of answers (common.scoring.Answer), and what their likelihoods of the gold ones give.

    eval_loss: nats a target (a token of the answer; a row or a row's label for a head); mean_token_accuracy: share of
    the targets that were the likeliest choice; perplexity: e to the eval_loss.
    """
    metrics = classification_metrics(gold, [answer.labels for answer in answers], labels)
    if targets := sum(answer.targets for answer in answers):
        metrics["eval_loss"] = sum(answer.nll for answer in answers) / targets
        metrics["perplexity"] = math.exp(min(metrics["eval_loss"], 700))  # a float ends at e^709
        metrics["mean_token_accuracy"] = sum(answer.correct for answer in answers) / targets
    return metrics


def perplexity_metrics(
    blocks: Sequence[tuple[float, int]], per_token: dict[str, float] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Perplexity and its kin from (nats, predicted tokens) of every block: sums over all, no means of means.

    eval_loss: nats a token; perplexity: e to that. bits_per_byte and word_perplexity put it on the split's UTF-8 bytes
    and white-space words, so that models with different tokenizers compare.
    per_token: {bytes, words} of a token; unset: without these two.
    95 % intervals: percentiles of RESAMPLES bootstrap resamples of the blocks.
    """
    nats, tokens = np.array(blocks, dtype=float).T

    def headline(loss: np.ndarray) -> dict[str, np.ndarray]:
        values = {"eval_loss": loss, "perplexity": np.exp(np.minimum(loss, 700))}  # a float ends at e^709
        if per_token:
            values["bits_per_byte"] = loss / per_token["bytes"] / math.log(2)
            values["word_perplexity"] = np.exp(np.minimum(loss / max(per_token["words"], 1e-9), 700))
        return values

    rng = np.random.default_rng(seed)
    resampled = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rows = rng.integers(len(nats), size=len(nats))
        resampled[i] = nats[rows].sum() / tokens[rows].sum()
    intervals = {name: np.percentile(value, [2.5, 97.5]).tolist() for name, value in headline(resampled).items()}
    values = {name: float(value) for name, value in headline(nats.sum() / tokens.sum()).items()}
    return {**values, "intervals_95": intervals, "rows": len(nats), "predicted_tokens": int(tokens.sum())}


def text_overlap(answers: Sequence[str], references: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """How much generated answers share with their references, from 0 to 100.

    rouge_l: mean F1 of the longest common word sequence (Lin, 2004; of a-z and 0-9 alone, as the rouge-score package
    reads words), with a 95 % bootstrap interval over the rows; chrf: character n-grams (Popovic, 2015) and bleu:
    word n-grams (Papineni et al., 2002), over the corpus, by sacrebleu with its defaults.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    shared = np.array([100 * scorer.score(r, a)["rougeL"].fmeasure for r, a in zip(references, answers, strict=True)])
    drawn = np.random.default_rng(seed).integers(len(shared), size=(RESAMPLES, len(shared)))
    return {
        "rouge_l": float(shared.mean()),
        "chrf": sacrebleu.corpus_chrf(list(answers), [list(references)]).score,
        "bleu": sacrebleu.corpus_bleu(list(answers), [list(references)]).score,
        "intervals_95": {"rouge_l": np.percentile(shared[drawn].mean(1), [2.5, 97.5]).tolist()},
    }


def confusion_matrix(
    gold: Sequence[Sequence[int]], predicted: Sequence[Sequence[int] | None], labels: int, multi_label: bool
) -> np.ndarray:
    """One label a row: [labels + 1, labels + 1], gold by prediction, where the last row and column are "no label".

    Several: [labels, 2, 2], for each label gold by prediction, not / yes.
    """
    if multi_label:
        truth, answer = indicator(gold, labels), indicator([row or () for row in predicted], labels)
        return np.stack([[((truth == g) & (answer == p)).sum(0) for p in (0, 1)] for g in (0, 1)]).transpose(2, 0, 1)
    matrix = np.zeros((labels + 1, labels + 1), dtype=np.int64)
    for g, p in zip(gold, predicted, strict=True):
        matrix[g[0] if g else labels, p[0] if p else labels] += 1
    return matrix


def _ratio(numerator: Any, denominator: Any) -> np.ndarray:
    denominator = np.asarray(denominator, dtype=float)
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)
