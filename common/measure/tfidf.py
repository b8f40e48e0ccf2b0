"""TF-IDF + logistic regression: the baseline of a classifier, and what its probabilities can be blended with.

It is to be as good as it can be for its cost: the strength of its regularization, and for several labels per row the
thresholds, are chosen by cross-validation on the training rows. Their out-of-fold probabilities, each from a model that
was not fitted to the row, also show labels that are probably wrong.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.classification import Example
from common.data.splits import hold_out, stratified_sample
from common.disk import write_json
from common.measure.decisions import fit_thresholds
from common.measure.metrics import indicator, label_measure

# Words and word pairs. In float32, which halves time and files, and answers as well.
WORDS = {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b", "dtype": np.float32}
MANY_WORDS = 500_000  # of longer training rows, words and pairs in one row alone are left out: three in four columns
MANY = 2000  # rows; of more, so many choose C
STRENGTHS = (1.0, 10.0, 100.0)  # C: the smaller, the more regularized
FOLDS = 5
NEVER = -1e9  # the logit of a label without a training row


@dataclass
class Tfidf:
    """A fitted baseline.

    c: the inverse strength of the regularization. thresholds: [labels], for several labels per row. vocabulary: word or
    pair -> column. idf: [columns]. weights: [labels, columns]. bias: [labels].
    """

    multi_label: bool
    c: float
    thresholds: list[float]
    vocabulary: dict[str, int]
    idf: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    @classmethod
    def fit(
        cls, train: Sequence[Example], labels: int, multi_label: bool, seed: int = 42
    ) -> "tuple[Tfidf, np.ndarray]":
        """The baseline of these rows, and their out-of-fold probabilities, [rows, labels]; folds are drawn by `seed`.

        Raises ValueError for texts without words, or where all rows have the same one label.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer  # here, as only classification needs it

        words = sum(len(example.text.split()) for example in train)
        vectorizer = TfidfVectorizer(**WORDS, min_df=1 if words <= MANY_WORDS else 2)
        features = vectorizer.fit_transform([example.text for example in train])
        real = indicator([example.labels for example in train], labels)
        if not multi_label and len(np.unique(real.argmax(1))) < 2:
            raise ValueError("one label")
        some = np.array(stratified_sample([example.labels for example in train], min(MANY, len(train)), seed))
        c = max(STRENGTHS, key=lambda c: _quality(_out_of_fold(features[some], real[some], multi_label, c, seed),
                                                  real[some], multi_label))  # fmt: skip
        unseen = _out_of_fold(features, real, multi_label, c, seed)
        thresholds = fit_thresholds(unseen, real) if multi_label else [0.5] * labels
        vocabulary = {word: int(column) for word, column in vectorizer.vocabulary_.items()}
        weights, bias = _regression(features, real, multi_label, c)
        return cls(multi_label, c, thresholds, vocabulary, vectorizer.idf_, weights, bias), unseen

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """[rows, labels]: with one label per row they add up to 1."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(**WORDS, vocabulary=self.vocabulary)
        vectorizer.idf_ = self.idf
        return _probabilities(vectorizer.transform(texts) @ self.weights.T + self.bias, self.multi_label)

    def decide(self, p: np.ndarray) -> list[tuple[int, ...]]:
        """The answer to each row, of whose labels these are the probabilities, [rows, labels]."""
        return _labels(p, self.multi_label, self.thresholds)

    def save(self, folder: Path) -> None:
        """JSON and safetensors, from which `load` makes the same."""
        from safetensors.numpy import save_file

        values = {"multi_label": self.multi_label, "c": self.c, "thresholds": self.thresholds}
        write_json(folder / "tfidf.json", {**values, "vocabulary": self.vocabulary})
        save_file({name: getattr(self, name) for name in ("idf", "weights", "bias")}, folder / "tfidf.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Tfidf":
        """What `save` wrote."""
        from safetensors.numpy import load_file

        described = json.loads((folder / "tfidf.json").read_text(encoding="utf-8"))
        values: dict[str, Any] = {**described, **load_file(folder / "tfidf.safetensors")}
        return cls(**values)


def _regression(features: Any, real: np.ndarray, multi_label: bool, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights [labels, columns] and bias [labels]: a softmax over the labels, or a regression of each."""
    from sklearn.linear_model import LogisticRegression

    weights = np.zeros((real.shape[1], features.shape[1]), np.float32)
    bias = np.full(real.shape[1], NEVER, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optimizer that stops at its last step
        if multi_label:
            for k in np.flatnonzero(real.any(0)):
                if real[:, k].all():
                    bias[k] = -NEVER
                    continue
                found = LogisticRegression(C=c, solver="liblinear", dual=True, max_iter=1000, random_state=0)
                found.fit(features, real[:, k])
                weights[k], bias[k] = found.coef_[0], found.intercept_[0]
            return weights, bias
        gold = real.argmax(1)
        classes = np.unique(gold)
        if len(classes) == 1:
            bias[classes] = 0
            return weights, bias
        # Not lbfgs: it takes twice as long to come as near to the optimum, without which a large C looks worse.
        found = LogisticRegression(C=c, solver="newton-cg", max_iter=1000).fit(features, gold)
    coefficients, intercepts = found.coef_, found.intercept_
    if len(classes) == 2:  # as two whose logits differ by scikit-learn's one
        coefficients, intercepts = np.vstack([-coefficients, coefficients]) / 2, np.append(-intercepts, intercepts) / 2
    weights[classes], bias[classes] = coefficients, intercepts
    return weights, bias


def _out_of_fold(features: Any, real: np.ndarray, multi_label: bool, c: float, seed: int) -> np.ndarray:
    """The probabilities of each row by the regression on the folds that it is not in."""
    found = np.empty(real.shape)
    folds = min(FOLDS, len(real))
    for fold in range(1, folds + 1):
        parts = hold_out(range(len(real)), fold, folds, seed, lambda i: tuple(real[i]))
        weights, bias = _regression(features[parts["train"]], real[parts["train"]], multi_label, c)
        found[parts["test"]] = _probabilities(features[parts["test"]] @ weights.T + bias, multi_label)
    return found


def _quality(p: np.ndarray, real: np.ndarray, multi_label: bool) -> float:
    """Accuracy, or of several labels per row micro-F1 with the best threshold for all of them."""
    thresholds = [fit_thresholds(p.reshape(-1, 1), real.reshape(-1, 1))[0]] * p.shape[1] if multi_label else []
    gold = [tuple(np.flatnonzero(row).tolist()) for row in real]
    measure = label_measure(gold, _labels(p, multi_label, thresholds), p.shape[1])
    return float(measure(np.ones((1, len(p))))["f1_micro"][0])


def _labels(p: np.ndarray, multi_label: bool, thresholds: Sequence[float]) -> list[tuple[int, ...]]:
    if multi_label:
        return [tuple(np.flatnonzero(row).tolist()) for row in p >= np.asarray(thresholds)]
    return [(int(k),) for k in p.argmax(1)]


def _probabilities(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    logits = logits.astype(float)
    if multi_label:
        return 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
