"""TF-IDF + logistic regression: the baseline of a classifier, and what its probabilities can be blended with."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.classification import Example
from common.disk import write_json
from common.measure.metrics import indicator

VECTORIZER = {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"}  # words and word pairs


@dataclass
class Tfidf:
    """A fitted baseline.

    vocabulary: word or pair -> column. idf: [columns]. weights: [labels, columns]. bias: [labels].
    """

    multi_label: bool
    vocabulary: dict[str, int]
    idf: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    @classmethod
    def fit(cls, train: Sequence[Example], labels: int, multi_label: bool) -> "Tfidf":
        """Logistic regression with C = 10; for several labels one per label.

        Raises ValueError for texts without words, or where one label is left.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer  # here, as only classification needs it
        from sklearn.linear_model import LogisticRegression

        vectorizer = TfidfVectorizer(**VECTORIZER)
        features = vectorizer.fit_transform([example.text for example in train])
        real = indicator([example.labels for example in train], labels)
        weights, bias = np.zeros((labels, features.shape[1])), np.full(labels, -np.inf)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if multi_label:
                for k in range(labels):
                    if 0 < real[:, k].sum() < len(real):
                        found = LogisticRegression(C=10, max_iter=1000).fit(features, real[:, k])
                        weights[k], bias[k] = found.coef_[0], found.intercept_[0]
                    else:
                        bias[k] = 30.0 if real[:, k].any() else -30.0  # a label in every row, or in none
            else:
                found = LogisticRegression(C=10, max_iter=1000).fit(features, real.argmax(1))
                coefficients, intercepts = found.coef_, found.intercept_
                if len(found.classes_) == 2:  # as two classes whose logits differ by scikit-learn's one
                    coefficients = np.vstack([-coefficients, coefficients]) / 2
                    intercepts = np.append(-intercepts, intercepts) / 2
                weights[found.classes_], bias[found.classes_] = coefficients, intercepts
        vocabulary = {word: int(column) for word, column in vectorizer.vocabulary_.items()}
        return cls(multi_label, vocabulary, vectorizer.idf_, weights, bias)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """[rows, labels]: with one label per row they add up to 1."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(**VECTORIZER, vocabulary=self.vocabulary)
        vectorizer.idf_ = self.idf
        logits = vectorizer.transform(texts) @ self.weights.T + self.bias
        if self.multi_label:
            return 1 / (1 + np.exp(-logits))
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def save(self, folder: Path) -> None:
        """JSON and safetensors, from which `load` makes the same."""
        from safetensors.numpy import save_file

        write_json(folder / "tfidf.json", {"multi_label": self.multi_label, "vocabulary": self.vocabulary})
        save_file({name: getattr(self, name) for name in ("idf", "weights", "bias")}, folder / "tfidf.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Tfidf":
        """What `save` wrote."""
        from safetensors.numpy import load_file

        described = json.loads((folder / "tfidf.json").read_text(encoding="utf-8"))
        values: dict[str, Any] = {**described, **load_file(folder / "tfidf.safetensors")}
        return cls(**values)
