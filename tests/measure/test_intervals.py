"""Intervals and tests against what they promise, in simulations; numpy alone."""

import numpy as np
import pytest

from common.measure.intervals import (
    difference,
    mcnemar,
    mean_measure,
    mean_of,
    mean_of_drawn,
    merged,
    percentiles,
    point,
    resampled,
    rows_to_see,
    sign_test,
    sums_of,
    wilson,
)
from common.measure.metrics import classification_metrics, label_measure, loss_measure, perplexity_metrics


def covered(intervals: list[list[float]], truth: float) -> float:
    """The share of the intervals that the truth is in."""
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def labels_of(right: np.ndarray) -> list[tuple[int]]:
    """Predicted labels of rows whose gold label is 0."""
    return [(int(not hit),) for hit in right]


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_an_interval_of_accuracy_holds_the_truth(share):
    hits = np.random.default_rng(0).binomial(300, share, size=4000)
    assert 0.93 <= covered([wilson(int(h), 300) for h in hits], share) <= 0.97


def test_a_perfect_score_is_not_certain():
    """Nor is none right; and the bounds stay between 0 and 1."""
    low, high = classification_metrics([(0,)] * 20, [(0,)] * 20, ["a", "b"])["intervals_95"]["accuracy"]
    assert low == pytest.approx(20 / (20 + 1.959964**2)) and high == 1
    assert wilson(0, 20) == pytest.approx([0, 1 - low])


def test_a_bootstrap_interval_holds_the_truth():
    """The loss per token of rows of unequal length, and macro-F1, both of 200 rows."""
    rng = np.random.default_rng(1)
    losses, scores = [], []
    for _ in range(400):
        tokens = rng.integers(5, 60, 200).astype(float)
        nats = tokens * rng.gamma(4, 0.5, 200)  # 2 nats per token
        losses.append(percentiles(resampled(loss_measure(nats, tokens), 200)["eval_loss"]))
        gold = rng.integers(0, 2, 200)
        found = np.where(rng.random(200) < 0.8, gold, 1 - gold)  # precision and recall of both are 0.8
        measure = label_measure([(g,) for g in gold], [(p,) for p in found], 2)
        scores.append(percentiles(resampled(measure, 200)["f1_macro"]))
    assert 0.93 <= covered(losses, 2) <= 0.97 and 0.93 <= covered(scores, 0.8) <= 0.97


def test_the_same_draws_for_the_same_seed_in_whatever_portions(monkeypatch):
    """A difference pairs rows: both see the same draws. A draw has as many rows as there are."""
    one, two = mean_measure("x", np.arange(50.0)), mean_measure("x", np.arange(50.0) ** 2)
    drawn = resampled(difference(one, two), 50)["x"]
    assert np.allclose(drawn, resampled(two, 50)["x"] - resampled(one, 50)["x"]) and drawn.shape == (1000,)
    assert len(set(resampled(merged(one, mean_measure("y", np.ones(50))), 50)["y"].round(12))) == 1


def accuracies(rng: np.random.Generator, gain: float, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether two classifiers are right on the same rows: the first in 0.85; the second loses 3 %, and gains more."""
    one = rng.random(rows) < 0.85
    lost = one & (rng.random(rows) < 0.03 / 0.85)
    gained = ~one & (rng.random(rows) < (0.03 + gain) / 0.15)
    return one, one & ~lost | gained


def test_equal_classifiers_are_seldom_told_apart():
    """Of 1,000 comparisons of equals at most 5 % say "better"; nor does the interval of the difference."""
    rng, better, outside = np.random.default_rng(2), 0, 0
    for trial in range(1000):
        one, two = accuracies(rng, 0, 500)
        better += mcnemar(one, two) <= 0.05 and two.sum() > one.sum()
        if trial < 200:
            low, high = percentiles(
                resampled(difference(*(mean_measure("x", x.astype(float)) for x in (one, two))), 500)["x"]
            )
            outside += low > 0 or high < 0
    assert better <= 50 and outside <= 0.08 * 200


def test_a_gain_of_three_points_is_found():
    """On 1,000 paired rows, in at least 80 % of the comparisons; and fewer rows are said to be needed for that."""
    rng, found, needed = np.random.default_rng(3), 0, []
    for trial in range(300):
        one, two = accuracies(rng, 0.03, 1000)
        found += mcnemar(one, two) <= 0.05 and two.sum() > one.sum()
        if trial < 20:
            drawn = resampled(difference(*(mean_measure("x", x.astype(float)) for x in (one, two))), 1000)["x"]
            needed.append(rows_to_see(0.03, drawn, 1000))
    variance = 0.03 + 0.06 - 0.03**2  # of the difference of one row
    assert np.median(needed) == pytest.approx(2.8016**2 * variance / 0.03**2, rel=0.15)
    assert found / 300 >= 0.80


def test_mcnemar_is_the_binomial_of_the_rows_that_differ():
    first, second = np.array([True] * 9 + [False] * 6), np.array([True] * 8 + [False] + [True] * 5 + [False])
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar(first, first) == 1


def test_six_seeds_are_the_fewest_for_a_sign_test():
    assert sign_test([0.1] * 6) == pytest.approx(2 / 64) and sign_test([0.1] * 5) > 0.05
    assert sign_test([0.1, -0.2, 0.0]) == 1 and sign_test([0.0]) == 1


def test_documents_are_drawn_whole():
    """Blocks of a document share its difficulty: drawn one by one, the interval of the loss is far too narrow."""
    rng, by_document, by_block = np.random.default_rng(4), [], []
    units = np.repeat(np.arange(60), 8)
    for _ in range(250):
        loss = 3 + rng.normal(0, 0.4, 60)[units] + rng.normal(0, 0.3, 480)
        rows = [(128 * x, 128) for x in loss]
        found = perplexity_metrics(rows, units=units.tolist(), unit="documents")
        assert (found["rows"], found["units"], found["unit"]) == (480, 60, "documents")
        by_document.append(found["intervals_95"]["eval_loss"])
        by_block.append(perplexity_metrics(rows)["intervals_95"]["eval_loss"])
    assert 0.93 <= covered(by_document, 3) <= 0.97 and covered(by_block, 3) < 0.7


def test_sums_of_groups():
    assert sums_of([(1, 2), (3, 4), (5, 6)], [1, 0, 1]).tolist() == [[3, 4], [6, 8]]


def test_a_recipe_draws_seeds_and_rows():
    """The variance of a mean over few seeds is that of both; with the rows drawn alone, it is too small."""
    rng, drawn, fixed, means = np.random.default_rng(5), [], [], []
    for trial in range(300):
        runs = [mean_measure("x", rng.normal(rng.normal(0, 0.3), 1, 100)) for _ in range(3)]
        means.append(point(mean_of(runs), 100)["x"])
        if trial < 150:
            drawn.append(resampled(mean_of_drawn(runs, seed=trial), 100)["x"].var())
            fixed.append(resampled(mean_of(runs), 100)["x"].var())
    truth = np.var(means)
    assert np.mean(drawn) > 0.85 * truth and np.mean(fixed) < 0.4 * truth
    assert mean_of_drawn(runs[:1], seed=0) is runs[0]
