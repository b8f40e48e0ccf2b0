"""What baselines learn from, what they leave in the run folder, and what a run gains over the best of them."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from sklearn.metrics import f1_score

from common.data.classification import ClassificationData, Example
from common.disk import BASELINE, MAJORITY_FILE, SUSPECTS
from common.errors import InputError
from common.measure import baselines, gain, intervals
from common.measure.label_answer import Answer

LABELS = ["sun", "rain", "snow"]
CONFIG = SimpleNamespace(split_seed=42, max_baseline_samples=20)
ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
KINDS = pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])


def data_of(multi_label: bool, train: int = 40, test: int = 40) -> ClassificationData:
    """Rows whose words tell their label, but for some."""
    rng, splits = np.random.default_rng(3), {}
    for split, count in (("train", train), ("validation", 5), ("test", test)):
        splits[split] = []
        for i in range(count):
            labels = tuple(k for k in range(3) if rng.random() < 0.4) if multi_label else (i % 3 % 2 + i % 7 // 6,)
            words = [LABELS[k] if rng.random() < 0.6 else "hail" for k in labels]
            splits[split].append(Example(f"{split} {i}", " ".join([*words, f"w{i % 9}"]), labels))
    return ClassificationData(splits, LABELS, multi_label, {})


def measure(run: Path, data: ClassificationData, evaluate=None) -> dict:
    """evaluate: of the untrained base, in place of an encoder, which has none."""
    classifier = SimpleNamespace(encoder=evaluate is None, model=None)
    with (
        mock.patch.object(baselines, "_zero_shot_prompt", lambda *given: "prompt"),
        mock.patch.object(baselines, "_untrained", lambda *given: mock.MagicMock()),
        mock.patch.object(baselines, "replace", lambda old, **new: old),
    ):
        return baselines.measure(
            run, classifier=classifier, data=data, path="", config=CONFIG, accelerator=ALONE, evaluate=evaluate
        )


@KINDS
def test_everything_is_kept(multi_label, tmp_path):
    """Predictions of every test row; and the same figures again for whatever rows, without fitting."""
    data = data_of(multi_label)
    found = measure(tmp_path, data)
    folder = tmp_path / "eval" / "test"
    for name in (gain.MAJORITY, gain.TFIDF):
        kept = gain.read_predictions(folder, name, LABELS)
        assert list(kept) == [row.id for row in data.splits["test"]]
        right = np.mean([kept[row.id] == row.labels for row in data.splits["test"]])
        assert found[name]["accuracy"] == pytest.approx(right)
    line = json.loads((folder / "baselines" / "tfidf.jsonl").read_text().splitlines()[0])
    assert list(line["probabilities"]) == LABELS and isinstance(line["prediction"], list if multi_label else str)
    assert found[gain.ZERO_SHOT] == "n/a"  # an encoder cannot be prompted
    with mock.patch.object(baselines.Tfidf, "fit", side_effect=AssertionError):
        again = baselines.measure_kept(tmp_path, folder, data.splits["test"], LABELS, multi_label)
        assert again == {name: {k: v for k, v in found[name].items() if k != "suspects"} for name in again}
        other = baselines.measure_kept(tmp_path, tmp_path / "o", data.splits["validation"], LABELS, multi_label)
        assert measure(tmp_path, data) == found  # from the file, as a resumed run does
    assert other[gain.TFIDF]["rows"] == 5 and len(gain.read_predictions(tmp_path / "o", gain.MAJORITY, LABELS)) == 5


def test_only_training_rows_are_learned_from(tmp_path):
    """A word of the other splits is not in the vocabulary, and their labels change nothing."""
    data = data_of(False)
    for split in ("validation", "test"):
        data.splits[split] = [replace(row, text=row.text + " planted") for row in data.splits[split]]
    measure(tmp_path / "one", data)
    assert "planted" not in (tmp_path / "one" / BASELINE / "tfidf.json").read_text()
    for split in ("validation", "test"):
        data.splits[split] = [replace(row, labels=(2,)) for row in data.splits[split]]
    measure(tmp_path / "two", data)
    for name in (MAJORITY_FILE, f"{BASELINE}/tfidf.json", f"{BASELINE}/tfidf.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@KINDS
def test_baselines_learn_what_words_give_away(multi_label, tmp_path):
    """TF-IDF + logistic regression is right on words it has seen; the majority is the likeliest answer of training."""
    texts = [(("sun", "rain", "snow")[i % 3], (i % 3,)) for i in range(30)] + [("sun sun", (0,))]
    texts += [("sun rain", (0, 1))] * 10 + [("fog", ())] * 5 if multi_label else []
    rows = [Example(str(i), *row) for i, row in enumerate(texts)]
    found = measure(tmp_path, ClassificationData({"train": rows, "test": rows}, LABELS, multi_label, {}))
    assert baselines.majority(rows) == (0,) and found[gain.TFIDF]["accuracy"] == 1
    assert not (tmp_path / SUSPECTS).exists() or multi_label


def test_texts_without_words_leave_a_baseline_out(tmp_path):
    """Emoji have no TF-IDF features: that baseline is n/a, the run continues."""
    rows = [Example(str(i), "\U0001f600", (i % 2,)) for i in range(4)]
    data = ClassificationData({"train": rows, "test": rows}, ["a", "b"], False, {})
    found = measure(tmp_path, data)
    assert found[gain.TFIDF] == "n/a" and found[gain.MAJORITY]["accuracy"] == 0.5
    assert list(baselines.measure_kept(tmp_path, tmp_path / "other", rows, ["a", "b"], False)) == [gain.MAJORITY]
    assert baselines.measure_kept(tmp_path / "a copied adapter", tmp_path / "other", rows, ["a", "b"], False) == {}


def test_a_damaged_baseline_is_named(tmp_path):
    data = data_of(False)
    measure(tmp_path, data)
    (tmp_path / BASELINE / "tfidf.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="tfidf.safetensors: damaged"):
        baselines.measure_kept(tmp_path, tmp_path / "other", data.splits["test"], LABELS, False)


@KINDS
def test_the_gain_is_that_of_a_direct_computation(multi_label, tmp_path):
    """Accuracy, micro- and macro-F1 by scikit-learn on every resample, both methods on the same rows.

    Macro-F1 is the mean over the labels that the resample has drawn, as all labels that are used count in the value.
    """
    data = data_of(multi_label, test=60)
    results, rows, rng = measure(tmp_path, data), data.splits["test"], np.random.default_rng(0)
    own = [row.labels if rng.random() < 0.9 else (2,) for row in rows]
    with mock.patch.object(intervals, "RESAMPLES", 100):
        found = gain.gain_over_best(tmp_path / "eval" / "test", list(results), rows, own, LABELS)
    base = list(gain.read_predictions(tmp_path / "eval" / "test", gain.TFIDF, LABELS).values())
    assert (found["baseline"], found["rows"]) == (gain.TFIDF, 60)

    def values(answers: list, drawn: np.ndarray) -> np.ndarray:
        real, said = (
            np.array([[k in labels for k in range(3)] for labels in part])
            for part in ([row.labels for row in rows], answers)
        )
        used = (real | said).any(0).mean()
        real, said = real[drawn], said[drawn]
        f1_micro, each = (f1_score(real, said, average=average, zero_division=0) for average in ("micro", None))
        f1_macro = each[(real | said).any(0)].mean() * used
        return np.array([(real == said).all(1).mean(), f1_micro, f1_macro])

    assert [found[name] for name in gain.VALUES] == pytest.approx(values(own, range(60)) - values(base, range(60)))
    counts = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=100)
    drawn = [np.repeat(np.arange(60), count) for count in counts]
    differences = np.array([values(own, some) - values(base, some) for some in drawn])
    for number, name in enumerate(gain.VALUES):
        low, high = np.percentile(differences[:, number], [2.5, 97.5])
        assert found["intervals_95"][name] == pytest.approx([low, high])
    sentence = gain.gain_sentence(found, 60, multi_label)
    assert sentence.startswith("Gain over the best baseline (TF-IDF + logistic regression): ")
    assert ("micro-F1 " in sentence) is multi_label and sentence.endswith("95 % paired, on 60 rows.")


@pytest.mark.parametrize("better", [True, False])
def test_the_untrained_base_counts_on_its_own_rows(better, tmp_path):
    """It answered 20 of 40 rows: it is the best baseline only if it is better than TF-IDF on these."""
    data = data_of(False)

    def evaluate(base, rows, what):
        answers = [Answer(row.labels if better else None, []) for row in rows]
        return answers, baselines.classification_metrics([r.labels for r in rows], [a.labels for a in answers], LABELS)

    results, rows = measure(tmp_path, data, evaluate), data.splits["test"]
    assert f"{gain.ZERO_SHOT} (20 of 40 rows)" in results
    own = [row.labels for row in rows]
    found = gain.gain_over_best(tmp_path / "eval" / "test", list(results), rows, own, LABELS)
    assert (found["baseline"], found["rows"]) == ((gain.ZERO_SHOT, 20) if better else (gain.TFIDF, 40))
    assert ("on the 20 of 40 rows" in gain.gain_sentence(found, 40, False)) is better
    others = [replace(row, id=f"{row.id} of another file") for row in rows]
    assert gain.gain_over_best(tmp_path / "eval" / "test", list(results), others, own, LABELS) == {}
    assert gain.gain_over_best(tmp_path / "eval" / "test", ["this run"], rows, own, LABELS) == {}
