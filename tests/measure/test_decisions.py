"""Decisions: what probabilities become, what is fitted by which rows, and whether the cut keeps its promise."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, f1_score, log_loss

from common.measure import decisions
from common.measure.decisions import Decision, calibration, certified_cut, fit, fit_thresholds
from common.measure.label_answer import Answer
from common.measure.metrics import indicator


def draws(rows: int, labels: int, seed: int, sharpness: float = 1.0) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """True probabilities raised to `sharpness`, as an overconfident model would say, and labels drawn from the true."""
    rng = np.random.default_rng(seed)
    true = rng.dirichlet([0.4] * labels, rows)
    gold = [(int(rng.choice(labels, p=p)),) for p in true]
    said = true**sharpness
    return said / said.sum(1, keepdims=True), gold


def test_unfitted_answers_are_the_likeliest_label_or_all_from_one_half():
    """Their probabilities stay as they are; answers without probabilities are left alone."""
    answers = [Answer(None, [0.2, 0.6, 0.2]), Answer(None, [0.5, 0.1, 0.7])]
    one = Decision.unfitted(False, 3).decide(answers, ["", ""])
    several = Decision.unfitted(True, 3).decide(answers, ["", ""])
    assert [answer.labels for answer in one] == [(1,), (2,)]
    assert [answer.labels for answer in several] == [(1,), (0, 2)]
    assert [answer.probabilities for answer in one + several] == [answer.probabilities for answer in answers] * 2
    assert all(answer.accepted for answer in one + several)
    text = [Answer(None, [], text="a label of no set")]
    assert Decision(False, [0.5], temperature=2.0, cut=0.9).decide(text, [""]) == text


def test_a_decision_by_hand():
    """Temperature, blend, thresholds and cut."""
    answer = Answer(None, [0.8, 0.2])
    (found,) = Decision(False, [], temperature=2.0, cut=0.7).decide([answer], [""])
    assert found.probabilities == pytest.approx([2 / 3, 1 / 3]) and not found.accepted  # 0.8 : 0.2 = 2^2 : 1

    class Baseline:
        def probabilities(self, texts):
            return np.array([[0.2, 0.8], [0.8, 0.2]])[[len(text) for text in texts]]

    (found,) = Decision(False, [], blend=0.5, baseline=Baseline()).decide([answer], [""])
    assert found.probabilities == pytest.approx([0.5, 0.5])
    (found,) = Decision(True, [0.9, 0.5], blend=0.5, baseline=Baseline()).decide([answer], ["x"])
    assert found.probabilities == pytest.approx([0.8, 0.2]) and found.labels == ()
    (found,) = Decision(True, [0.5, 0.1], cut=0.85).decide([answer], [""])
    assert found.labels == (0, 1) and not found.accepted
    assert Decision.unfitted(True, 2).certainty(np.array([[0.8, 0.3]])) == pytest.approx([0.7])
    sure = Decision(True, [0.1, 0.1]).certainty(np.array([[0.12, 0.02], [0.45, 0.02], [0.1, 0.0]]))
    assert sure == pytest.approx([0.5 + 0.01 / 0.9, 0.5 + 0.175 / 0.9, 0.5]) and sure[1] > sure[0]


def test_a_decision_is_the_same_from_json():
    p, gold = draws(60, 3, 0)
    decision = fit(p, gold, multi_label=False, min_precision=0.6)
    assert Decision(**decision.saved()) == decision


def test_the_temperature_undoes_overconfidence_and_changes_no_answer():
    said, gold = draws(4000, 5, 1, sharpness=2.5)
    decision = fit(said, gold, multi_label=False)
    assert decision.temperature == pytest.approx(2.5, rel=0.05) and decision.cut is None and not decision.blend
    p = decision.probabilities(said, None)
    assert decision.labels(p) == Decision.unfitted(False, 5).labels(said)
    before, after = (calibration(x, indicator(gold, 5), False) for x in (said, p))
    assert after["ece"] < 0.02 < before["ece"] and after["nll"] < before["nll"]
    assert after["brier_score"] < before["brier_score"]


def test_the_blend_takes_the_better_one_and_both_where_both_know_something():
    """All weight to a model that knows everything, none to one that knows nothing, and a mean of two halves."""
    (p, gold), noise = draws(1500, 4, 2), draws(1500, 4, 3)[0]
    assert fit(p, gold, multi_label=False, baseline=noise).blend <= 0.05
    assert fit(noise, gold, multi_label=False, baseline=p).blend >= 0.95
    rng, odds = np.random.default_rng(4), np.log(p)
    one, other = (np.exp(odds + rng.normal(0, 1, p.shape)) for _ in range(2))
    one, other = one / one.sum(1, keepdims=True), other / other.sum(1, keepdims=True)
    both = fit(one, gold, multi_label=False, baseline=other)
    alone = fit(one, gold, multi_label=False)
    assert 0.3 <= both.blend <= 0.7
    loss = decisions.negative_log_likelihood
    real = indicator(gold, 4)
    mixed = loss(both.probabilities(one, other), real, False)
    assert mixed < 0.98 * min(loss(alone.probabilities(one, None), real, False), loss(other, real, False))


def test_thresholds_maximize_f1():
    """The best of all cuts of each label; rare labels share one; ties are not cut apart."""
    rng = np.random.default_rng(5)
    real = (rng.random((400, 3)) < [0.4, 0.15, 0.01]).astype(int)
    real[:4, 2] = 1
    p = np.round(1 / (1 + np.exp(-(2.5 * real - 2 + rng.normal(0, 1, real.shape)))), 2)
    found = fit_thresholds(p, real)
    for k in (0, 1):
        best = max(f1_score(real[:, k], p[:, k] >= t, zero_division=0) for t in np.unique(p))
        assert f1_score(real[:, k], p[:, k] >= found[k]) == pytest.approx(best)
    common = max(f1_score(real.ravel(), p.ravel() >= t, zero_division=0) for t in np.unique(p))
    assert real[:, 2].sum() < decisions.FEWEST
    assert f1_score(real.ravel(), p.ravel() >= found[2]) == pytest.approx(common)
    assert fit_thresholds(p, np.zeros_like(real)) == [0.5] * 3


def test_only_one_half_fits_what_the_other_half_certifies():
    """Other answers in the certifying half change neither temperature nor blend nor thresholds, only the cut."""
    for multi_label in (False, True):
        p, gold = draws(800, 3, 6, sharpness=1.5)
        wanted = {"multi_label": multi_label, "min_precision": 0.5, "confidence": 0.9, "seed": 7}
        first = fit(p, gold, **wanted)
        half = np.random.default_rng(7).permutation(800) < 400
        wrong = [labels if fits else ((labels[0] + 1) % 3,) for labels, fits in zip(gold, half, strict=True)]
        other = fit(p, wrong, **wanted)
        assert (first.temperature, first.thresholds) == (other.temperature, other.thresholds)
        assert first.fitted["rows"] == 400 and (multi_label or first.cut is not None) and other.cut is None


SHAPES = {  # of the truth: how often an answer of this certainty is right
    "as said": lambda sure: sure,
    "overconfident": lambda sure: sure**1.6,
    "a cliff": lambda sure: np.where(sure > 0.85, 0.965, 0.6),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cut_keeps_its_promise(shape):
    """400 draws of 1,000 rows: the share of right answers above the cut is below 95 % in at most 10 % of them."""
    rng, right_at = np.random.default_rng(8), SHAPES[shape]
    all_sure = rng.beta(9, 0.7, 200_000)
    order = np.argsort(-all_sure)
    truth = np.cumsum(right_at(all_sure)[order]) / np.arange(1, len(order) + 1)
    broken, found = 0, 0
    for _ in range(400):
        sure = rng.beta(9, 0.7, 1000)
        right = rng.random(1000) < right_at(sure)
        cut, tested = certified_cut(sure, right, rng.permutation(1000) < 500, 0.05, 0.9)
        if cut is not None:
            found += 1
            above = int((all_sure >= cut).sum())
            broken += truth[above - 1] < 0.95
            assert tested["accepted"] >= 45
    assert broken <= 40 and found >= 80


def test_too_few_rows_are_said_with_the_number_that_is_needed():
    sure, right = np.linspace(0.9, 1, 60), np.ones(60, dtype=bool)
    cut, tested = certified_cut(sure, right, np.arange(60) % 2 == 0, 0.05, 0.9)
    assert cut is None and tested["needed"] == 45 and tested["accepted"] <= 30
    cut, tested = certified_cut(np.tile(sure, 2), np.tile(right, 2), np.arange(120) % 2 == 0, 0.05, 0.9)
    assert cut == 0.0 and tested == {"tested_rows": 60, "accepted": 60, "wrong": 0}


def test_calibration_equals_scikit_learn():
    p, gold = draws(500, 2, 9)
    found = calibration(p, indicator(gold, 2), False)
    right = [k for (k,) in gold]
    assert found["nll"] == pytest.approx(log_loss(right, p))
    assert found["brier_score"] == pytest.approx(2 * brier_score_loss(right, p[:, 1]))
    real = np.random.default_rng(10).integers(2, size=(500, 3))
    several = np.random.default_rng(11).random((500, 3))
    logits = torch.tensor(several).logit()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(real).double(), reduction="none")
    assert calibration(several, real, True)["nll"] == pytest.approx(loss.sum(1).mean().item())
    sure = np.array([[0.72, 0.28], [0.71, 0.29], [0.95, 0.05]])
    assert calibration(sure, np.array([[1, 0], [0, 1], [1, 0]]), False)["ece"] == pytest.approx(
        (2 * abs(0.715 - 0.5) + 0.05) / 3
    )
    assert math.isfinite(calibration(np.array([[1.0, 0.0]]), np.array([[0, 1]]), False)["nll"])
