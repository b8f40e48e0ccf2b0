"""How probabilities become answers: a blend with a baseline, a temperature, thresholds, a cut for abstention.

`Decision.decide` is the one place where this happens, for evaluate.py, inference.py and the Python API. Unfitted, it
answers with the likeliest label, or with every label that has 0.5.

`fit` chooses all of it by rows that neither trained the model nor measure it. Only the cut comes with a guarantee
(fixed-sequence testing of Learn then Test, Angelopoulos et al., 2021, arXiv 2110.01052). An example with
--min_precision 0.9 and --confidence 0.9: half A of the rows orders candidates from strict to loose, and half B tests
them in this order.

    cut    accepted in B    wrong    at most so many are wrong, with 90 % confidence
    0.97              60        1    6.3 %     passes
    0.90             150        7    7.7 %     passes
    0.80             230       17    10.1 %    fails: the cut is 0.90, and what is looser is not looked at

As the order does not depend on half B, the first false candidate is passed in at most 10 % of all draws of half B.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from common.measure.intervals import most_errors
from common.measure.label_answer import Answer
from common.measure.metrics import indicator, rows_right

SMALLEST = 1e-12  # a probability: one of 0 would outweigh everything else
TEMPERATURES = (0.05, 20.0)
BLENDS = np.linspace(0, 1, 21)
CANDIDATES = 100  # cuts that are tested at most
BINS = 15  # of the expected calibration error
FEWEST = 10  # positive rows that a threshold of its own is fitted to


class Baseline(Protocol):
    """What can be blended with a model."""

    def probabilities(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Decision:
    """What is done with the probabilities of a row's labels.

    blend: the weight of the baseline's log-probabilities (of several labels per row: log-odds) in their mean with the
    model's. temperature: what log-probabilities are divided by, of one label per row (Guo et al., 2017, arXiv
    1706.04599). thresholds: of several labels per row, the probability from which on each is answered. cut: the least
    certainty of an answer that is given; None: all are. fitted: on which rows, and what the cut promises.
    """

    multi_label: bool
    thresholds: Sequence[float]
    temperature: float = 1.0
    blend: float = 0.0
    cut: float | None = None
    fitted: dict[str, Any] = field(default_factory=dict)
    baseline: Baseline | None = None

    @classmethod
    def unfitted(cls, multi_label: bool, labels: int) -> "Decision":
        """The likeliest label, or every label with 0.5; an answer to every row."""
        return cls(multi_label, [0.5] * labels)

    def decide(self, answers: Sequence[Answer], texts: Sequence[str]) -> list[Answer]:
        """The same answers with the labels, probabilities and acceptance decided on; without probabilities, unchanged.

        texts: of the rows, for the baseline.
        """
        if not answers or not answers[0].probabilities:
            return list(answers)
        p = self.probabilities(np.array([answer.probabilities for answer in answers]), self.of_baseline(texts))
        sure = self.certainty(p).tolist()
        return [
            replace(answer, labels=labels, probabilities=row, certainty=x, accepted=x >= (self.cut or 0))
            for answer, labels, row, x in zip(answers, self.labels(p), p.tolist(), sure, strict=True)
        ]

    def of_baseline(self, texts: Sequence[str]) -> np.ndarray | None:
        """[rows, labels], the probabilities of the baseline, if it has a weight."""
        return self.baseline.probabilities(texts) if self.baseline and self.blend else None

    def probabilities(self, model: np.ndarray, baseline: np.ndarray | None) -> np.ndarray:
        """Blended and calibrated: [rows, labels] of the model, and of the baseline if it has a weight."""
        if baseline is None and self.temperature == 1:
            return model
        if self.multi_label:
            return 1 / (1 + np.exp(-_blended(_log_odds, model, baseline, self.blend)))
        return _softmax(_blended(_logs, model, baseline, self.blend) / self.temperature)

    def labels(self, p: np.ndarray) -> list[tuple[int, ...]]:
        """The answer to each row, [rows, labels]."""
        if self.multi_label:
            return [tuple(np.flatnonzero(row).tolist()) for row in p >= np.asarray(self.thresholds)]
        return [(int(k),) for k in p.argmax(1)]

    def certainty(self, p: np.ndarray) -> np.ndarray:
        """[rows]: the probability of the answer; of several labels per row, the least certain yes or no.

        A yes or no has certainty 0.5 at its threshold, and 1 at a probability of 1 or 0, linearly.
        """
        if not self.multi_label:
            return p.max(1)
        t = np.asarray(self.thresholds)
        yes = (p - t) / np.maximum(1 - t, SMALLEST)
        no = (t - p) / np.maximum(t, SMALLEST)
        return (0.5 + np.where(p >= t, yes, no) / 2).min(1)

    def saved(self) -> dict[str, Any]:
        """What task.json keeps; the baseline has files of its own."""
        return {name: value for name, value in asdict(replace(self, baseline=None)).items() if name != "baseline"}


def fit(
    model: np.ndarray,
    gold: Sequence[Sequence[int]],
    *,
    multi_label: bool,
    baseline: np.ndarray | None = None,
    min_precision: float | None = None,
    confidence: float = 0.9,
    seed: int = 42,
) -> Decision:
    """The decision that suits these rows, which must not have trained the model.

    model, baseline: [rows, labels], probabilities; with a baseline, a blend is fitted. gold: the right labels of each
    row. Blend and temperature are the likeliest ones; a threshold maximizes the F1 of its label (those with fewer than
    FEWEST positive rows share one, which maximizes micro-F1). min_precision: the share of accepted answers that is to
    be right with this `confidence`: half of the rows, drawn by `seed`, then fit, and the other half certifies the cut.
    """
    rows, labels = model.shape
    half = np.random.default_rng(seed).permutation(rows) < rows // 2
    fitting = half if min_precision is not None else np.ones(rows, dtype=bool)
    real = indicator(gold, labels)

    def some(p: np.ndarray | None) -> np.ndarray | None:
        return None if p is None else p[fitting]

    decision = _likeliest(Decision.unfitted(multi_label, labels), model[fitting], some(baseline), real[fitting])
    p = decision.probabilities(model, baseline)
    if multi_label:
        decision = replace(decision, thresholds=fit_thresholds(p[fitting], real[fitting]))
    fitted: dict[str, Any] = {"rows": int(fitting.sum())}
    cut = None
    if min_precision is not None:
        right = rows_right(gold, decision.labels(p))
        cut, tested = certified_cut(decision.certainty(p), right, half, 1 - min_precision, confidence)
        fitted["promise"] = {"min_precision": min_precision, "confidence": confidence, **tested}
    return replace(decision, cut=cut, fitted=fitted)


def _likeliest(decision: Decision, model: np.ndarray, baseline: np.ndarray | None, real: np.ndarray) -> Decision:
    """With the blend, and for one label per row the temperature, under which the right labels are likeliest.

    model, baseline, real: [rows, labels].
    """
    from scipy.optimize import minimize_scalar  # comes with scikit-learn

    def loss(blend: float, temperature: float) -> float:
        found = replace(decision, blend=blend, temperature=temperature)
        return negative_log_likelihood(found.probabilities(model, baseline), real, decision.multi_label)

    found = []
    for blend in [0.0] if baseline is None else BLENDS.tolist():
        temperature = 1.0
        if not decision.multi_label:
            best = minimize_scalar(lambda log: loss(blend, math.exp(log)), bounds=np.log(TEMPERATURES))  # noqa: B023
            temperature = math.exp(best.x)
        found.append((loss(blend, temperature), blend, temperature))
    _, blend, temperature = min(found)
    return replace(decision, blend=blend, temperature=temperature)


def fit_thresholds(p: np.ndarray, real: np.ndarray) -> list[float]:
    """The threshold of each label that maximizes its F1; p, real: [rows, labels].

    Labels with fewer than FEWEST positive rows share the one that maximizes micro-F1, where p and real are all labels'.
    """
    common = _best_threshold(p.ravel(), real.ravel())
    own = real.sum(0) >= FEWEST
    return [_best_threshold(p[:, k], real[:, k]) if own[k] else common for k in range(p.shape[1])]


def _best_threshold(p: np.ndarray, real: np.ndarray) -> float:
    """The threshold with the greatest F1, midway to the next lower value; of several, the one nearest to 0.5."""
    order = np.argsort(-p, kind="stable")
    values, hits = p[order], np.cumsum(real[order])
    last = np.append(values[1:] < values[:-1], True)  # equal values are all answered or none
    f1 = 2 * hits / (np.arange(1, len(p) + 1) + real.sum())
    middles = (values + np.append(values[1:], 0)) / 2
    best = last & (f1 >= f1[last].max() - 1e-12)
    return float(min(middles[best], key=lambda value: abs(value - 0.5))) if real.any() else 0.5


def certified_cut(
    sure: np.ndarray, right: np.ndarray, half: np.ndarray, allowed: float, confidence: float
) -> tuple[float | None, dict[str, Any]]:
    """The least certainty of answers of which at most the share `allowed` is wrong, with `confidence`; None: not found.

    sure, right: [rows]. half: [rows], True for those that order the candidates; the others test them. Also what
    was tested last with success (of a failure: first): rows, accepted and wrong ones, and, where it failed, how many
    accepted rows without an error are needed. The promise is about rows like these on average, not of every label.
    """
    needed = math.ceil(math.log(1 - confidence) / math.log(1 - allowed))

    def counts(cut: float, part: np.ndarray) -> tuple[int, int]:
        accepted = part & (sure >= cut)
        return int(accepted.sum()), int((accepted & ~right).sum())

    ordered = np.sort(sure[half])[::-1]
    places = np.unique(np.linspace(0, len(ordered) - 1, CANDIDATES).round().astype(int))
    candidates = [float(ordered[place]) for place in places] + [0.0]
    # The first one tested is the most promising in half A; what is stricter accepts less and proves no more.
    promising = [most_errors(wrong, rows, confidence) for rows, wrong in (counts(cut, half) for cut in candidates)]
    found: float | None = None
    tested: dict[str, Any] = {}
    for cut in candidates[int(np.argmin(promising)) :]:
        rows, wrong = counts(cut, ~half)
        passed = rows > 0 and most_errors(wrong, rows, confidence) <= allowed
        if passed or not tested:
            tested = {"tested_rows": int((~half).sum()), "accepted": rows, "wrong": wrong}
        if not passed:
            break
        found = cut
    return found, tested if found is not None else {**tested, "needed": needed}


def negative_log_likelihood(p: np.ndarray, real: np.ndarray, multi_label: bool) -> float:
    """Mean over rows, nats; of several labels per row, the sum of the labels' decisions. p, real: [rows, labels]."""
    logs = np.where(real, _logs(p), _logs(1 - p) if multi_label else 0)
    return float(-logs.sum(1).mean())


def calibration(p: np.ndarray, real: np.ndarray, multi_label: bool) -> dict[str, Any]:
    """How far probabilities can be taken at their word: `nll`, `brier_score`, `ece` and the bins of `ece`.

    nll: negative_log_likelihood. brier_score: mean over rows of the summed squared errors of the labels (Brier, 1950).
    ece: expected calibration error over BINS bins of equal width (Guo et al., 2017) of the answer's probability; of
    several labels per row, of all yes or no decisions. bins: [mean probability, share right, decisions] of each.
    """
    if multi_label:
        sure, right = np.maximum(p, 1 - p).ravel(), ((p >= 0.5) == real).ravel()
    else:
        sure, right = p.max(1), np.take_along_axis(real, p.argmax(1)[:, None], 1)[:, 0]
    numbers = np.minimum((sure * BINS).astype(int), BINS - 1)
    count = np.bincount(numbers, minlength=BINS)
    sums = np.bincount(numbers, sure, BINS), np.bincount(numbers, right, BINS)
    ece = np.abs(sums[0] - sums[1]).sum() / len(sure)
    bins = [[float(s / n), float(r / n), int(n)] for s, r, n in zip(*sums, count, strict=True) if n]
    brier = ((p - real) ** 2).sum(1).mean()
    nll = negative_log_likelihood(p, real, multi_label)
    return {"nll": nll, "brier_score": float(brier), "ece": float(ece), "calibration_bins": bins}


def _blended(read: Any, model: np.ndarray, baseline: np.ndarray | None, blend: float) -> np.ndarray:
    return read(model) if baseline is None else (1 - blend) * read(model) + blend * read(baseline)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _logs(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, SMALLEST))


def _log_odds(p: np.ndarray) -> np.ndarray:
    return _logs(p) - _logs(1 - p)
