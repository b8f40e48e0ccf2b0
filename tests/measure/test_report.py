"""Results as files: the table of methods, predictions, report.md, pictures."""

import csv
import json
from types import SimpleNamespace
from unittest import mock

import pytest

from common.data.classification import Example
from common.measure import figures, gain, report
from common.measure.label_answer import Answer
from common.measure.metrics import Metric, classification_metrics, headlines
from common.options import CHAT, CLASSIFICATION
from common.text.prompts import Rendered

MAE = Metric("mae", "mean error", higher_is_better=False)


@pytest.fixture(autouse=True)
def no_pictures():
    with mock.patch.object(figures, "can_draw", lambda: False):
        yield


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without the rule below its header."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return [lines[0], *lines[2:]]


def test_a_table_shows_what_was_measured():
    """A value without an interval alone, - where one method lacks it, no column for what all lack, a text as it is."""
    results = {
        "this run": {"mae": 0.25, "eval_loss": 1, "intervals_95": {"eval_loss": [0.5, 1.5]}},
        "median": {"mae": 0.5},
        "linear": "n/a",
    }
    found = report.results_table(results, "validation", [MAE, *headlines(CHAT)])
    assert cells(found) == [
        ["validation split", "mean error", "nats per token"],
        ["this run", "0.250", "1.000 [0.500, 1.500]"],
        ["median", "0.500", "-"],
        ["linear", "n/a", "n/a"],
    ]


def classifier(multi_label: bool) -> SimpleNamespace:
    """What a report needs of one: texts of more than two words are shortened, words are the tokens."""

    def prompt(text: str) -> Rendered:
        return Rendered(text.split()[:2], len(text.split()) > 2)

    rendered = SimpleNamespace(labels=["sun", "rain"], multi_label=multi_label, prompt=prompt)
    return SimpleNamespace(prompt=rendered, head=False, tokenizer=SimpleNamespace(decode=" ".join))


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_classification_leaves_its_files(tmp_path, multi_label):
    """Every row in both files of predictions, answers outside the label set included; the table is returned."""
    gold = [(0,), (0, 1) if multi_label else (1,)]
    examples = [Example("0", "dry", gold[0]), Example("1", "wet, and cold", gold[1])]
    answers = [Answer((0,), [0.75, 0.25]), Answer(None, [0.5, 0.5])]
    metrics = classification_metrics(gold, [answer.labels for answer in answers], ["sun", "rain"])
    results = {"this run": metrics, "majority class": {"accuracy": 0.5}}
    given = {"classifier": classifier(multi_label), "examples": examples, "answers": answers}
    table = report.write_classification(tmp_path / "test", metrics, results, "test", **given)
    assert table == report.results_table(results, "test", headlines(CLASSIFICATION))
    first, second = (json.loads(line) for line in (tmp_path / "test/predictions.jsonl").read_text().splitlines())
    assert first == {
        "id": "0", "gold": ["sun"] if multi_label else "sun", "prediction": ["sun"] if multi_label else "sun",
        "probabilities": {"sun": 0.75, "rain": 0.25}, "truncated": False,
    }  # fmt: skip
    assert second["prediction"] is None and second["truncated"] is True
    sheet = list(csv.DictReader((tmp_path / "test/predictions.csv").open(newline="")))
    assert list(sheet[0]) == ["id", "gold", "prediction", "p(sun)", "p(rain)", "truncated", "prompt"]
    assert sheet[1]["gold"] == ("sun, rain" if multi_label else "rain") and sheet[1]["prediction"] == ""
    assert (sheet[1]["truncated"], sheet[1]["prompt"]) == ("true", "wet, and")
    saved = json.loads((tmp_path / "test/metrics.json").read_text())
    assert saved["accuracy"] == 0.5 and len(saved["confusion_matrix"]) == (2 if multi_label else 3)
    text = (tmp_path / "test/report.md").read_text()
    assert table in text and "Answers outside the label set: 1 of 2." in text and "bootstrap over the rows" in text


@pytest.mark.parametrize("multi_label", [False, True])
def test_errors_are_sorted_by_confidence(tmp_path, multi_label):
    """wrong.csv holds every error and no right answer; the report has the pairs that are confused most."""
    single = [((0,), (1,), 0.75), ((1,), (1,), 0.8), ((1,), (0,), 0.9), ((0,), (1,), 0.625), ((1,), None, 0.3)]
    several = [((0,), (0, 1), 0.75), ((0, 1), (0, 1), 0.8), ((), (0,), 0.875), ((0,), (0, 1), 0.625), ((1,), None, 0.3)]
    rows = several if multi_label else single
    examples = [Example(str(i), f"={i}", gold) for i, (gold, _, _) in enumerate(rows)]
    answers = []
    for _, found, p in rows:
        likely = [0.95, p] if found == (0, 1) else [p, 0.05] if multi_label else [p, 1 - p]
        answers.append(Answer(found, likely if found != (1,) else likely[::-1]))
    metrics = classification_metrics([row.labels for row in examples], [a.labels for a in answers], ["sun", "rain"])
    results = {"this run": metrics, "words": {"accuracy": 0.5, "suspects": 7}}
    given = {"classifier": classifier(multi_label), "examples": examples, "answers": answers}
    report.write_classification(tmp_path, metrics, results, "test", **given)
    found = list(csv.DictReader((tmp_path / "wrong.csv").open(newline="")))
    assert [row["id"] for row in found] == ["2", "0", "3", "4"] and found[0]["text"] == "'=2"
    assert list(found[0]) == ["id", "gold", "prediction", "p(prediction)", "p(gold)", "text"]
    assert found[1]["gold"] == "sun" and found[1]["prediction"] == ("sun, rain" if multi_label else "rain")
    assert [float(row["p(prediction)"]) for row in found[:3]] == [0.875 if multi_label else 0.9, 0.75, 0.625]
    assert float(found[1]["p(gold)"]) == 0.25 and found[3]["prediction"] == found[3]["p(prediction)"] == ""
    text = (tmp_path / "report.md").read_text()
    assert "The labels of 7 training rows may be wrong: see suspects.csv" in text
    if multi_label:
        assert "Most confused" not in text
    else:
        part = text[text.index("Most confused") :]
        expected = [["label", "answered", "rows"], ["sun", "rain", "2"], ["rain", "sun", "1"]]
        assert cells(part)[:3] == expected and cells(part)[3] == ["rain", "none of the labels", "1"]


def test_the_gain_over_the_best_baseline_comes_first(tmp_path):
    """In report.md, in what is printed, and in metrics.json."""
    examples = [Example(str(i), "dry", (i % 2,)) for i in range(6)]
    gold = [example.labels for example in examples]
    answers = [Answer(labels, [0.5, 0.5]) for labels in gold]
    metrics = classification_metrics(gold, gold, ["sun", "rain"])
    gain.write_predictions(tmp_path, gain.MAJORITY, examples, [(0,)] * 6, ["sun", "rain"], False)
    given = {"classifier": classifier(False), "examples": examples, "answers": answers}
    results = {"this run": metrics, gain.MAJORITY: classification_metrics(gold, [(0,)] * 6, ["sun", "rain"])}
    shown = report.write_classification(tmp_path, metrics, results, "test", **given)
    saved = json.loads((tmp_path / "metrics.json").read_text())["gain_over_best_baseline"]
    low, high = saved["intervals_95"]["accuracy"]
    assert saved["baseline"] == "majority class" and saved["accuracy"] == 0.5
    first = f"Gain over the best baseline (majority class): accuracy +0.500 [{low:+.3f}, {high:+.3f}], macro-F1 +0.667"
    assert shown.startswith(first) and (tmp_path / "report.md").read_text().startswith(f"# Evaluation\n\n{first}")


def test_generated_labels_are_shown_with_their_text(tmp_path):
    """Answers as free text have no probabilities."""
    metrics = classification_metrics([(0,)], [None], ["sun", "rain"])
    given = {"classifier": classifier(False), "examples": [Example("7", "dry", (0,))]}
    answers = [Answer(None, [], text="cloudy")]
    report.write_classification(tmp_path, metrics, {"this run": metrics}, "test", **given, answers=answers)
    (row,) = csv.DictReader((tmp_path / "predictions.csv").open(newline=""))
    assert list(row) == ["id", "gold", "prediction", "answer", "truncated", "prompt"] and row["answer"] == "cloudy"
    assert json.loads((tmp_path / "predictions.jsonl").read_text())["answer"] == "cloudy"


def test_answers_are_kept_and_some_are_shown(tmp_path):
    """All in the files, SAMPLES of them in the report, line by line; the losses alone need no answers."""
    metrics = {"eval_loss": 1.0, "rouge_l": 50.0, "intervals_95": {"eval_loss": [0.5, 2.0]}}
    rows = [
        {"id": f"row {i}", "prompt": "Why?\nSay.", "gold": "", "prediction": "so", "stopped": True, "truncated": False}
        for i in range(25)
    ]
    table = report.write_chat(tmp_path / "test", metrics, {"this run": metrics}, "test", answers=rows)
    assert cells(table) == [["test split", "nats per token", "ROUGE-L"], ["this run", "1.000 [0.500, 2.000]", "50.000"]]
    assert len((tmp_path / "test/predictions.jsonl").read_text().splitlines()) == 25
    sheet = list(csv.DictReader((tmp_path / "test/predictions.csv").open(newline="")))
    assert len(sheet) == 25 and sheet[24]["stopped"] == "True" and sheet[24]["prompt"] == "Why?\nSay."
    text = (tmp_path / "test/report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("### ")] == [f"### row {i}" for i in range(0, 25, 3)]
    assert "> Why?\n> Say.\n\nreference:\n\n> \n\nanswer:\n\n> so\n" in text
    report.write_chat(tmp_path / "losses", metrics, {"this run": metrics}, "test")
    assert {path.name for path in (tmp_path / "losses").iterdir()} == {"metrics.json", "report.md"}


def test_a_perplexity_leaves_its_blocks_and_a_sample(tmp_path):
    metrics = {"perplexity": 2.0, "unit": "documents"}
    results = {"this run": metrics, "untrained base": "n/a"}
    given = {"blocks": [(3.5, 5), (1.0, 2)], "units": [0, 4], "sample": "Once\nupon"}
    report.write_causal_lm(tmp_path, metrics, results, "test", **given)
    blocks = [json.loads(line) for line in (tmp_path / "blocks.jsonl").read_text().splitlines()]
    assert blocks[1] == {"block": 1, "unit": 4, "nats": 1.0, "predicted_tokens": 2}
    assert (
        "bootstrap over the documents.\n\nA sample, the prompt included:\n\n> Once\n> upon\n"
        in (tmp_path / "report.md").read_text()
    )


def test_pictures_need_no_intervals(tmp_path, monkeypatch):
    """Bars of the methods that have the metric; a curve of either kind of line, and none where there is neither."""
    monkeypatch.setattr(figures, "can_draw", lambda: True)
    results = {
        "one": {"mae": 1.0, "intervals_95": {"mae": [0.5, 1.5]}},
        "two": {"mae": 2.0},
        "three": "n/a",
        "four": {},
    }
    figures.draw_bars(tmp_path / "bars.png", results, "mae")
    assert (tmp_path / "bars.png").stat().st_size > 1000
    for lines, drawn in (([], False), ([{"update": 1, "loss": 2.0}], True), ([{"update": 1, "mae": 2.0}], True)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        figures.draw_learning_curve(tmp_path, "mae")
        assert (tmp_path / "learning_curve.png").exists() is drawn
        (tmp_path / "learning_curve.png").unlink(missing_ok=True)
