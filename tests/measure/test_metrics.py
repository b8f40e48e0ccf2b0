"""Figures against scikit-learn, answers outside the label set included, and intervals that cover."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn import metrics as sk

from common import baselines
from common.data import Example
from common.metrics import classification_metrics, confusion_matrix, indicator, summarise
from common.scoring import Answer

LABELS = ["a", "b", "c", "never"]  # the last one occurs nowhere, so that divisions by zero count


def random_rows(kind: str, seed: int, rows: int = 60) -> tuple[list, list]:
    """Gold and predicted labels; a tenth of the answers are outside the set."""
    rng = np.random.default_rng(seed)
    if kind == "single":
        gold = [(int(k),) for k in rng.integers(0, 3, rows)]
        predicted = [g if rng.random() < 0.6 else (int(rng.integers(0, 3)),) for g in gold]
    else:
        matrix = rng.random((rows, 3)) < 0.4
        gold = [tuple(np.flatnonzero(row).tolist()) for row in matrix]
        predicted = [tuple(np.flatnonzero(row ^ (rng.random(3) < 0.2)).tolist()) for row in matrix]
    return gold, [None if rng.random() < 0.1 else row for row in predicted]


def as_sklearn(rows: list, kind: str):
    if kind == "single":
        return [len(LABELS) if row is None else row[0] for row in rows]
    return indicator([row or () for row in rows], len(LABELS))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_equal_to_scikit_learn(kind, seed):
    """CORRECTNESS 29: an answer outside the set is wrong, never dropped."""
    gold, predicted = random_rows(kind, seed)
    ours = classification_metrics(gold, predicted, LABELS)
    truth, answer = as_sklearn(gold, kind), as_sklearn(predicted, kind)
    options = {"labels": range(len(LABELS)), "zero_division": 0}
    for average in ("micro", "macro", "weighted"):
        assert ours[f"f1_{average}"] == pytest.approx(sk.f1_score(truth, answer, average=average, **options), abs=1e-12)
    right = [p is not None and g == p for g, p in zip(gold, predicted, strict=True)]
    assert ours["accuracy"] == pytest.approx(np.mean(right))
    if kind == "single":
        assert ours["accuracy"] == pytest.approx(sk.accuracy_score(truth, answer))
    assert ours["outside_label_set"] == predicted.count(None) > 0 and ours["rows"] == len(gold)
    columns = sk.precision_recall_fscore_support(truth, answer, **options)
    for label, *values in zip(LABELS, *columns, strict=True):
        assert list(ours["per_label"][label].values()) == pytest.approx(values, abs=1e-12)


def test_no_label_at_all_is_an_answer_but_none_is_not():
    """A row without labels: the empty answer is right, an answer outside the set is wrong."""
    ours = classification_metrics([(), (), (0,)], [(), None, (0,)], LABELS)
    assert ours["accuracy"] == pytest.approx(2 / 3) and ours["f1_micro"] == 1


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_confusion_matrix_counts_every_row(kind):
    """Equal to scikit-learn's; answers outside the set have a column of their own."""
    gold, predicted = random_rows(kind, 5)
    ours = confusion_matrix(gold, predicted, len(LABELS), kind == "multi")
    truth, answer = as_sklearn(gold, kind), as_sklearn(predicted, kind)
    if kind == "multi":
        assert (ours == sk.multilabel_confusion_matrix(truth, answer)).all()
        return
    assert (ours == sk.confusion_matrix(truth, answer, labels=range(len(LABELS) + 1))).all()
    assert ours.sum() == len(gold) and ours[:, -1].sum() == predicted.count(None)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_intervals_are_the_same_each_time_and_narrow_with_rows(kind):
    """The value lies inside; four times the rows give about half the width."""
    gold, predicted = random_rows(kind, 1, rows=100)
    ours, again = (classification_metrics(gold, predicted, LABELS) for _ in range(2))
    assert ours == again
    larger = classification_metrics(gold * 4, predicted * 4, LABELS)
    for name, (low, high) in ours["intervals_95"].items():
        assert low <= ours[name] <= high and high - low > 0.05
        narrow = larger["intervals_95"][name]
        assert 0.4 < (narrow[1] - narrow[0]) / (high - low) < 0.6


def test_intervals_of_many_rows_are_drawn_in_slices():
    """1,000 resamples of 20,000 rows do not stand in memory at once, and are the same draws."""
    gold, predicted = random_rows("single", 0, rows=20_000)
    right = np.array([g == p for g, p in zip(gold, predicted, strict=True)], dtype=float)
    draws = np.random.default_rng(0).multinomial(len(right), np.full(len(right), 1 / len(right)), size=1000)
    expected = np.percentile(draws @ right / len(right), [2.5, 97.5])
    assert classification_metrics(gold, predicted, LABELS)["intervals_95"]["accuracy"] == pytest.approx(expected)


def test_intervals_cover_the_truth_about_95_times_in_100():
    """True accuracy 0.7, 150 rows, 150 draws: 0.95 +- 0.055 is three standard errors."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(150):
        predicted = [(0,) if right else (1,) for right in rng.random(150) < 0.7]
        low, high = classification_metrics([(0,)] * 150, predicted, LABELS)["intervals_95"]["accuracy"]
        inside += low <= 0.7 <= high
    assert 0.895 <= inside / 150 <= 1


def test_loss_is_a_sum_over_targets_not_a_mean_of_means():
    """CORRECTNESS 14: rows of 1 and 9 targets; and no loss where nothing was scored."""
    answers = [Answer((0,), [1.0], nll=2.0, correct=1, targets=1), Answer((0,), [1.0], nll=3.0, correct=6, targets=9)]
    ours = summarise(answers, [(0,), (0,)], LABELS)
    assert (ours["eval_loss"], ours["mean_token_accuracy"]) == (0.5, 0.7)
    assert ours["perplexity"] == pytest.approx(math.exp(0.5))
    assert "eval_loss" not in summarise([Answer((0,), [])], [(0,)], LABELS)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_baselines_learn_what_words_give_away(kind):
    """TF-IDF + logistic regression is right on words it has seen; the majority is the likeliest answer of training."""
    texts = [(("sun", "rain", "snow")[i % 3], (i % 3,)) for i in range(12)] + [("sun sun", (0,))]
    texts += [("sun rain", (0, 1))] * 4 + [("fog", ())] * 2 if kind == "multi" else []
    rows = [Example(str(i), *row) for i, row in enumerate(texts)]
    assert baselines.majority(rows, rows[:2]) == [(0,), (0,)]
    found = baselines.tfidf_logistic_regression(rows, rows, 4, kind == "multi")  # no row has label 3
    assert found == [row.labels for row in rows]


def test_texts_without_words_leave_a_baseline_out(tmp_path):
    """Emoji have no TF-IDF features: that baseline is n/a, the run goes on."""
    rows = [Example(str(i), "\U0001f600", (i % 2,)) for i in range(4)]
    data = SimpleNamespace(splits={"train": rows, "test": rows}, labels=["a", "b"], multi_label=False)
    alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    measure = (tmp_path / "baselines.json", SimpleNamespace(encoder=True), data, "", None, alone, None)
    found = baselines.measure(*measure)
    assert found[baselines.TFIDF] == "n/a" and found["majority class"]["accuracy"] == 0.5
    assert baselines.measure(*measure) == found  # from the file, as a resumed run does
