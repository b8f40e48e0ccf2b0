"""The TF-IDF baseline against scikit-learn, what it may learn from, its files, and the labels that it doubts."""

import csv
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers import SHARED
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from common.data.classification import Example, load_classification
from common.measure import suspects, tfidf
from common.measure.metrics import indicator
from common.measure.tfidf import Tfidf
from common.options import ClassificationDataConfig

KINDS = pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])


def rows(count: int, multi_label: bool, seed: int = 0, noise: int = 6) -> list[Example]:
    """Rows of labels 0 to 2, of which each has a word among others; the third label is rare."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        drawn = [k for k in range(3) if rng.random() < (0.5, 0.4, 0.15)[k]]
        labels = tuple(drawn) if multi_label else (int(rng.choice(3, p=[0.5, 0.35, 0.15])),)
        words = [("sun", "rain", "snow")[k] for k in labels if rng.random() < 0.9]
        words += [f"w{w}" for w in rng.integers(0, 40, noise)]
        found.append(Example(str(i), " ".join(rng.permutation(words)), labels))
    return found


def texts(examples: list[Example]) -> list[str]:
    return [example.text for example in examples]


@KINDS
def test_probabilities_are_those_of_scikit_learn(multi_label):
    train, test = rows(120, multi_label), texts(rows(30, multi_label, seed=1))
    model, _ = Tfidf.fit(train, 3, multi_label)
    vectorizer = TfidfVectorizer(**tfidf.WORDS)
    features, real = vectorizer.fit_transform(texts(train)), indicator([row.labels for row in train], 3)
    if multi_label:
        options = {"C": model.c, "solver": "liblinear", "dual": True, "max_iter": 1000, "random_state": 0}
        each = [LogisticRegression(**options).fit(features, real[:, k]) for k in range(3)]
        expected = np.stack([one.predict_proba(vectorizer.transform(test))[:, 1] for one in each], 1)
    else:
        one = LogisticRegression(C=model.c, solver="newton-cg", max_iter=1000).fit(features, real.argmax(1))
        expected = one.predict_proba(vectorizer.transform(test))
    found = model.probabilities(test)
    assert found.shape == (30, 3) and np.allclose(found, expected, atol=1e-6)
    assert model.decide(found) == [
        tuple(np.flatnonzero(p >= model.thresholds).tolist()) if multi_label else (int(p.argmax()),) for p in found
    ]


def test_two_labels_and_one_without_a_row():
    """scikit-learn has one logit for two classes; a label without a training row is never likely."""
    train = [replace(row, labels=(row.labels[0] % 2 * 2,)) for row in rows(60, False)]  # of labels 0, 1, 2 and 3
    model, unseen = Tfidf.fit(train, 4, False)
    features = TfidfVectorizer(**tfidf.WORDS).fit_transform(texts(train))
    one = LogisticRegression(C=model.c, solver="newton-cg", max_iter=1000)
    one.fit(features, [row.labels[0] for row in train])
    found = model.probabilities(texts(train))
    assert np.allclose(found[:, [0, 2]], one.predict_proba(features), atol=1e-6) and not found[:, [1, 3]].any()
    assert unseen.shape == (60, 4) and np.allclose(unseen.sum(1), 1)


@KINDS
def test_what_is_saved_is_loaded(multi_label, tmp_path):
    """JSON and safetensors alone, and the same probabilities."""
    model, _ = Tfidf.fit(rows(60, multi_label), 3, multi_label)
    model.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tfidf.json", "tfidf.safetensors"}
    again = Tfidf.load(tmp_path)
    new = [*texts(rows(20, multi_label, seed=2)), "words never seen", ""]
    assert np.abs(again.probabilities(new) - model.probabilities(new)).max() <= 1e-6
    assert (again.c, again.thresholds, again.multi_label) == (model.c, model.thresholds, model.multi_label)


@KINDS
def test_out_of_fold_means_not_fitted_to_the_row(multi_label):
    """A word that only one row has, and its label with it, is no help there; the model of all rows has learned it."""
    train = rows(50, multi_label)
    odd = train[7] = Example("7", "sun " * 3 + "planted", (2,))
    model, unseen = Tfidf.fit(train, 3, multi_label)
    assert unseen.shape == (50, 3) and unseen[7, 2] < 0.2 < model.probabilities([odd.text])[0, 2]


def test_thresholds_are_of_training_rows_and_better_than_one_half():
    """Rare labels get thresholds of their own; unseen rows gain from them."""
    train, test = rows(1000, True, noise=12), rows(1000, True, seed=1, noise=12)
    model, unseen = Tfidf.fit(train, 3, True)
    assert model.thresholds == tfidf.fit_thresholds(unseen, indicator([row.labels for row in train], 3))
    real, p = indicator([row.labels for row in test], 3).astype(bool), model.probabilities(texts(test))

    def macro_f1(found: np.ndarray) -> float:
        return float((2 * (found & real).sum(0) / (found.sum(0) + real.sum(0))).mean())

    assert macro_f1(p >= model.thresholds) > macro_f1(p >= 0.5)


@KINDS
def test_small_and_odd_training_rows(multi_label):
    """A label with one row, one in every row, texts without words among others; fewer rows than folds."""
    few = [Example(str(i), text, labels) for i, (text, labels) in enumerate(
        [("sun", (0,)), ("sun sun", (0,)), ("rain", (1,)), ("\U0001f600", (0,))])]  # fmt: skip
    if multi_label:
        few = [replace(row, labels=(*row.labels, 2)) for row in few]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, unseen = Tfidf.fit(few, 4, multi_label)
        found = model.probabilities(["sun", "", "hail"])
    assert np.isfinite(unseen).all() and np.isfinite(found).all() and found[:, 3].max() < 1e-6
    for bad in ([replace(row, text="\U0001f600") for row in few], [replace(row, labels=(0,)) for row in few]):
        if not multi_label or bad[0].text != few[0].text:
            with pytest.raises(ValueError, match=r"empty vocabulary|one label"):
                Tfidf.fit(bad, 4, multi_label)


def test_suspects_are_sorted_and_safe(tmp_path):
    """One label per row: only rows with a likelier one; no text is a formula, and long ones are cut."""
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7]])
    given = [Example(str(i), text, (k,)) for i, (text, k) in enumerate(
        [("right", 0), ("=1+1", 0), ("-x" * 300, 0), ("right too", 1)])]  # fmt: skip
    assert suspects.write_suspects(tmp_path / "s.csv", given, p, ["a", "b"], False) == 2
    first, second = csv.DictReader((tmp_path / "s.csv").open(newline=""))
    assert first == {"id": "1", "given": "a", "likelier": "b", "p(given)": "0.2", "p(likelier)": "0.8", "text": "'=1+1"}
    assert second["id"] == "2" and len(second["text"]) == 201
    assert suspects.write_suspects(tmp_path / "s.csv", given[:1], p[:1], ["a", "b"], False) == 0
    assert not (tmp_path / "s.csv").exists()


def test_suspects_of_several_labels(tmp_path):
    """The decision of a row that disagrees most, whether the label is there or lacks."""
    p = np.array([[0.75, 0.1], [0.25, 0.125]])
    given = [Example("0", "x", ()), Example("1", "y", (0, 1))]
    assert suspects.write_suspects(tmp_path / "s.csv", given, p, ["a", "b"], True) == 2
    found = [list(row.values())[:5] for row in csv.DictReader((tmp_path / "s.csv").open(newline=""))]
    assert found == [["1", "b", "not b", "0.125", "0.875"], ["0", "not a", "a", "0.25", "0.75"]]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_flipped_labels_of_banking77_are_found():
    """5 % of 3,000 training rows get another label: 80 of the first 100 suspects are among them."""
    folder: Path = SHARED / "banking77"
    options: dict = {f"{split}_file": str(folder / f"{split}.csv") for split in ("train", "validation", "test")}
    options |= {"text_fields": ["text"], "label_column": "label_name", "max_train_samples": 3000}
    config = ClassificationDataConfig(**options)
    data = load_classification(config)
    train, rng = data.splits["train"], np.random.default_rng(0)
    flipped = set(rng.permutation(len(train))[: len(train) // 20].tolist())
    shifts = rng.integers(1, 77, len(train))
    train = [
        replace(row, labels=((row.labels[0] + int(shifts[i])) % 77,)) if i in flipped else row
        for i, row in enumerate(train)
    ]
    with mock.patch.object(tfidf, "STRENGTHS", (10.0,)):  # what it chooses, in a third of the time
        _, unseen = Tfidf.fit(train, 77, False)
    order, _ = suspects.rank_suspects(unseen, indicator([row.labels for row in train], 77), False)
    assert len(flipped & set(order[:100].tolist())) >= 80
