"""The registry of metrics; metrics against scikit-learn, answers outside the label set included; their intervals."""

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import peft
import pytest
import torch
from helpers import ROOT
from sklearn import metrics as sk

from common.errors import InputError
from common.measure import baselines
from common.measure.label_answer import Answer
from common.measure.metrics import (
    METRICS,
    TASKS,
    Task,
    choosable,
    classification_metrics,
    confusion_matrix,
    headlines,
    indicator,
    label_measure,
    metric,
    perplexity_metrics,
    register_metric,
    register_task,
    summarize,
)
from common.model import base_model
from common.options import CAUSAL_LM, CHAT, CLASSIFICATION
from common.train.checkpoints import State

# An accelerator of one process.
ALONE = SimpleNamespace(device="cpu", is_main_process=True, wait_for_everyone=lambda: None)
LABELS = ["a", "b", "c", "never"]  # the last one occurs nowhere, so that divisions by zero count


@pytest.fixture
def registry():
    """What a test registers is forgotten after it."""
    with mock.patch.dict(METRICS), mock.patch.dict(TASKS):
        yield


def test_tasks_name_registered_metrics():
    """The default of --metric_for_best_model comes first; a loss and a perplexity are better when lower."""
    for task in TASKS.values():
        assert {*task.headlines, *task.choosable, task.curve, task.compared} <= METRICS.keys()
    assert [choosable(task)[0] for task in (CLASSIFICATION, CAUSAL_LM, CHAT)] == ["f1_macro", "eval_loss", "eval_loss"]
    assert [entry.title for entry in headlines(CLASSIFICATION)] == ["accuracy", "micro-F1", "macro-F1"]
    lower = {name for name, entry in METRICS.items() if not entry.higher_is_better}
    assert lower == {"eval_loss", "perplexity", "bits_per_byte", "word_perplexity", "ece", "brier_score", "nll"}


def test_what_is_not_registered_is_named_with_what_is(registry):
    with pytest.raises(InputError, match="mae: there is no such metric. Known are accuracy, f1_micro"):
        metric("mae")
    with pytest.raises(InputError, match="regression: there is no such task. Known are classification, causal_lm"):
        choosable("regression")
    with pytest.raises(InputError, match="regression"):
        register_metric("mae", "MAE", higher_is_better=False, tasks=["regression"])
    with pytest.raises(InputError, match="rmse"):
        register_task(Task("regression", ("mae", "rmse"), ("mae",), "mae", "mae"))
    assert headlines("regression") == [] and "regression" not in TASKS


def test_a_registered_metric_is_shown_and_may_choose_the_best_weights(registry):
    """Registered a second time, as when a script is loaded twice, it is still one column."""
    for _ in range(2):
        register_metric("brier_loss", "Brier score", higher_is_better=False, tasks=[CLASSIFICATION])
    assert [entry.title for entry in headlines(CLASSIFICATION)].count("Brier score") == 1
    assert choosable(CLASSIFICATION) == ("f1_macro", "f1_micro", "accuracy", "eval_loss", "brier_loss")
    assert "brier_loss" not in choosable(CHAT)
    register_task(Task("ranking", ("brier_loss", "accuracy"), ("brier_loss",), "brier_loss", "accuracy"))
    assert choosable("ranking") == ("brier_loss",) and headlines("ranking")[1] == METRICS["accuracy"]


@pytest.mark.parametrize(
    ("name", "higher", "scores"),
    [("brier_loss", False, [0.2, 0.6]), ("gain_loss", True, [0.6, 0.2]), ("accuracy", None, [0.9, 0.5]),
     ("eval_loss", None, [1.0, 2.0]), ("perplexity", None, [3.0, 9.0])],
)  # fmt: skip
def test_a_worse_validation_does_not_replace_the_best_weights(registry, name, higher, scores):
    """Whatever the name ends in; the better of the two, met later, does replace the worse."""
    if higher is not None:
        register_metric(name, name, higher_is_better=higher)
    better, worse = ({name: score} for score in scores)
    state = State(update=1)
    assert state.improves(name, better) and state.best_update == 1
    state.update = 2
    assert not state.improves(name, worse) and (state.best_update, state.stale_evaluations) == (1, 1)
    state = State(update=1)
    assert state.improves(name, worse)
    state.update = 2
    assert state.improves(name, better) and (state.best_update, state.stale_evaluations) == (2, 0)


def test_the_registry_is_there_at_once():
    """The scripts offer metrics as values of an option, so `--help` must not wait for torch or scikit-learn."""
    code = "import sys, common.measure.metrics, common.report; print({'torch', 'sklearn'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


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
    """An answer outside the set is wrong, never dropped."""
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
    """1,000 resamples of 20,000 rows are not in memory at once, and are the same draws."""
    gold, predicted = random_rows("single", 0, rows=20_000)
    draws = np.random.default_rng(0).multinomial(len(gold), np.full(len(gold), 1 / len(gold)), size=1000)
    expected = np.percentile(label_measure(gold, predicted, len(LABELS))(draws)["f1_macro"], [2.5, 97.5])
    assert classification_metrics(gold, predicted, LABELS)["intervals_95"]["f1_macro"] == pytest.approx(expected)


def test_intervals_cover_the_truth_about_95_times_in_100():
    """True accuracy 0.7, 150 rows, 150 draws: 0.95 +- 0.055 is three standard errors."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(150):
        predicted = [(0,) if right else (1,) for right in rng.random(150) < 0.7]
        low, high = classification_metrics([(0,)] * 150, predicted, LABELS)["intervals_95"]["accuracy"]
        inside += low <= 0.7 <= high
    assert 0.895 <= inside / 150 <= 0.995


@pytest.mark.parametrize("labels", [5, 20, 77])
def test_the_interval_of_macro_f1_holds_it_with_two_rows_of_a_label(labels):
    """A label that a resample did not draw is no error there; one that no row has still counts as 0."""
    rng, gold = np.random.default_rng(labels), [(k,) for k in range(labels)] * 2
    names = [str(k) for k in range(labels + 3)]
    for _ in range(10):
        predicted = [g if rng.random() < 0.85 else (int(rng.integers(labels)),) for g in gold]
        ours = classification_metrics(gold, predicted, names)
        low, high = ours["intervals_95"]["f1_macro"]
        assert low <= ours["f1_macro"] <= high <= labels / len(names) + 1e-9


def test_a_single_row_has_no_bootstrap_interval():
    """All resamples would be that row; Wilson's interval of its accuracy is wide."""
    assert perplexity_metrics([(20.0, 10)])["intervals_95"] == {}
    low, high = classification_metrics([(0,)], [(0,)], LABELS)["intervals_95"]["accuracy"]
    assert low < 0.3 and high == 1


def test_loss_is_a_sum_over_targets_not_a_mean_of_means():
    """Rows of 1 and 9 targets; and no loss where nothing was scored."""
    answers = [Answer((0,), [1.0], nll=2.0, correct=1, targets=1), Answer((0,), [1.0], nll=3.0, correct=6, targets=9)]
    ours = summarize(answers, [(0,), (0,)], LABELS)
    assert (ours["eval_loss"], ours["mean_token_accuracy"]) == (0.5, 0.7)
    assert ours["perplexity"] == pytest.approx(math.exp(0.5))
    assert "eval_loss" not in summarize([Answer((0,), [])], [(0,)], LABELS)


@pytest.mark.parametrize(("init", "full"), [("true", False), ("pissa", False), ("true", True)])
def test_the_untrained_base_is_measured_once_on_some_rows(tmp_path, monkeypatch, init, full):
    """With the adapter off; or loaded again, where the training has changed the base itself."""
    base, loaded = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    monkeypatch.setattr(base_model, "load_base", lambda path, config, device: (loaded, []))
    monkeypatch.setattr(baselines, "TokenLosses", lambda model: SimpleNamespace(model=model))
    config = SimpleNamespace(init_lora_weights=init, full_finetuning=full, max_baseline_samples=3, split_seed=1,
                             shard_model=False)  # fmt: skip
    calls = []

    def evaluate(rows: list[str], what: str, model: Any) -> dict:
        calls.append((model.model, model.model is loaded or model.model.base_model.model[0].disable_adapters, rows))
        return {"eval_loss": 2.5}

    given = (tmp_path / "eval" / "baselines.json", model, "base", config, ALONE, "abcde", evaluate)
    found = baselines.untrained(*given)
    assert found == {"untrained base (3 of 5 rows)": {"eval_loss": 2.5}} == baselines.untrained(*given)
    ((measured, switched_off, rows),) = calls
    assert measured is (loaded if init == "pissa" or full else model) and switched_off
    assert len(rows) == 3 and rows == sorted(rows) and not model.base_model.model[0].disable_adapters
    config.max_baseline_samples = 5
    again = (tmp_path / "other.json", *given[1:])
    assert list(baselines.untrained(*again)) == ["untrained base"] and calls[1][2] == [*"abcde"]
