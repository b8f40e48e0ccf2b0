"""evaluate.py: the run's own figures again, other rows, other models, and what it refuses."""

import csv
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from helpers import ROOT
from helpers.models import FAMILIES
from helpers.rows import WORDS, chats, multi_rows, task_options, toy_options, toy_rows, write_csv, write_jsonl
from helpers.runs import (
    COMBINATIONS,
    QUANTIZED,
    RUNS,
    name_of,
    run_evaluate,
    timeless,
    train,
    train_chat,
    train_text,
)
from helpers.scripts import run_in_two_processes, run_script
from helpers.texts import prose
from sklearn.metrics import f1_score

import evaluate
from common.data.classification import SEPARATOR, load_classification
from common.errors import InputError
from common.model import storage
from common.options import TrainingConfig, read_saved
from common.use.fit_decisions import check_fit
from common.use.runs import open_run


def figures(folder: Path) -> dict:
    return timeless(json.loads((folder / "metrics.json").read_text()))


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def copy_of(run: Path, target: Path) -> Path:
    """The shared runs are never changed."""
    return Path(shutil.copytree(run, target))


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_a_run_evaluates_to_its_own_figures(run, trained, tmp_path):
    """Reloaded best weights, difference 0 in every figure and every probability."""
    family, approach, kind, options = run
    source = trained(family, approach, kind, *options)
    folder = copy_of(source, tmp_path / "run")
    shutil.rmtree(folder / "eval")
    run_evaluate("--run", folder, draw=options == QUANTIZED)
    before, after = source / "eval" / "test", folder / "eval" / "test"
    assert figures(after) == figures(before)
    assert predictions(after) == predictions(before)
    assert {path.name for path in after.iterdir()} == {path.name for path in before.iterdir()} - {"baselines.json"}
    assert (after / "predictions.csv").read_bytes() == (before / "predictions.csv").read_bytes()


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_other_rows_by_an_adapter_folder_alone(trained, combination, tmp_path):
    """--test_file takes the place of the run's data; also as `--test_file=F`, and without the run folder around."""
    rows = multi_rows(5, 80) if combination[1] == "multi" else toy_rows(2, start=50)
    other = write_csv(tmp_path / "other.csv", rows)
    columns = ["--label_columns", "sport", "science", "music"] if combination[1] == "multi" else []
    for family in FAMILIES:
        run = trained(family, *combination)
        adapter = copy_of(run / "adapter", tmp_path / family / "moved")
        run_evaluate("--run", adapter, f"--test_file={other}", *columns, "--output_dir", tmp_path / family / "alone")
        run_evaluate("--run", run, "--test_file", other, "--output_dir", tmp_path / family / "run")
        assert predictions(tmp_path / family / "alone") == predictions(tmp_path / family / "run")
        found = figures(tmp_path / family / "run")
        assert found["rows"] == len(rows) and "train_loss" not in found
        assert [line["id"] for line in predictions(tmp_path / family / "run")] == [str(i) for i in range(len(rows))]


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_baselines_are_measured_on_whatever_rows(models, kind, tmp_path, capsys):
    """Own test rows, validation rows and a --test_file: majority and TF-IDF, and first the gain over them."""
    approach = "generative" if kind == "single" else "head"
    run, few = tmp_path / "run", ["--max_steps", 1, "--baselines", "true", "--approach", approach]
    train("--model", models["llama"], *task_options(kind, tmp_path / "data"), *few, "--output_dir", run)
    for name in ("tfidf/tfidf.json", "tfidf/tfidf.safetensors", "majority.json"):
        assert (run / name).is_file()
    before, table = figures(run / "eval" / "test"), (run / "eval" / "test" / "report.md").read_text()
    known = json.loads((run / "eval/test/baselines.json").read_text())
    known["TF-IDF + logistic regression"]["suspects"] = 3
    (run / "eval/test/baselines.json").write_text(json.dumps(known))
    assert "TF-IDF + logistic regression |" in table and before["gain_over_best_baseline"]["rows"] == before["rows"]
    capsys.readouterr()
    rows = multi_rows(7, 80) if kind == "multi" else toy_rows(3, start=50)
    other = write_csv(tmp_path / "other.csv", rows)
    with mock.patch("common.measure.tfidf.Tfidf.fit", side_effect=AssertionError):
        for options, folder in ((), "test"), (("--split", "validation"), "validation"), (("--test_file", other), None):
            run_evaluate("--run", run, *options)
            found = run / "eval" / (folder or "test-other")
            text = (found / "report.md").read_text()
            assert text.startswith("# Evaluation\n\nGain over the best baseline (")
            assert text.splitlines()[2] in capsys.readouterr().out
            assert "| majority class " in text and "| TF-IDF + logistic regression " in text
            ids = [line["id"] for line in predictions(found)]
            for name in ("majority", "tfidf"):
                lines = (found / "baselines" / f"{name}.jsonl").read_text().splitlines()
                assert [json.loads(line)["id"] for line in lines] == ids
            assert figures(found)["gain_over_best_baseline"]["rows"] == len(ids)
    assert figures(run / "eval" / "test")["gain_over_best_baseline"] == before["gain_over_best_baseline"]
    run_evaluate("--run", run / "adapter", "--test_file", other, "--output_dir", tmp_path / "alone")
    assert "gain_over_best_baseline" in figures(tmp_path / "alone")  # the run folder is around it
    assert "labels of 3 training rows may be wrong" in (run / "eval" / "test" / "report.md").read_text()
    copy = copy_of(run / "adapter", tmp_path / "copy")
    shutil.copytree(run / "tfidf", copy / "tfidf")  # as a merged model has it
    fitted = ["--fit_decisions", "--blend_baseline", "true", "--validation_file", tmp_path / "data" / "validation.csv"]
    run_evaluate("--run", copy, *fitted, *(["--label_columns", *WORDS] if kind == "multi" else []))
    assert (copy / "tfidf").is_dir() and open_run(str(copy)).decision()
    if kind == "single":  # the untrained base was asked, too
        run_evaluate("--run", run, "--output_dir", tmp_path / "again")
        assert figures(tmp_path / "again")["gain_over_best_baseline"] == before["gain_over_best_baseline"]
        kept = (Path("baselines") / "zero_shot.jsonl").as_posix()
        assert (tmp_path / "again" / kept).read_text() == (run / "eval" / "test" / kept).read_text()
        text = (run / "eval" / "test" / "report.md").read_text()
        run_evaluate("--run", run, "--text_fields", "text", "text")  # neither replaces what was nor stands beside it
        assert (run / "eval" / "test" / "report.md").read_text() == text
        assert "untrained base" not in (run / "eval" / "test-changed" / "report.md").read_text()


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_answers_are_counted_whatever_they_are(trained, family, kind, tmp_path):
    """Every row has its text; what is no label stands in the last column of the matrix."""
    run = trained(family, "generative", kind)
    run_evaluate("--run", run, "--decode", "generate", "--output_dir", tmp_path)
    lines, found = predictions(tmp_path), figures(tmp_path)
    assert len(lines) == found["rows"] and all(isinstance(line["answer"], str) for line in lines)
    outside = sum(line["prediction"] is None for line in lines)
    assert found["outside_label_set"] == outside and all(line["probabilities"] == {} for line in lines)
    matrix = np.array(found["confusion_matrix"])
    if kind == "single":
        assert matrix.shape == (4, 4) and matrix[:, -1].sum() == outside and matrix.sum() == len(lines)
    else:
        assert (matrix.sum((1, 2)) == len(lines)).all()
    with open(tmp_path / "predictions.csv", newline="") as file:
        assert [row["answer"] for row in csv.DictReader(file)] == [line["answer"] for line in lines]
    for line in lines:
        labels = line["prediction"] if kind == "multi" else [line["prediction"]]
        assert line["prediction"] is None or line["answer"].strip() == ", ".join(labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_with_task_options(models, family, tmp_path, monkeypatch):
    """An untrained model answers with the labels in the order given."""
    monkeypatch.chdir(tmp_path)
    test = write_csv(tmp_path / "test.csv", toy_rows(3))
    labels = ["sport", "science", "music"]
    plain = ["--load_in_4bit", "false", "--mixed_precision", "no"]
    run_evaluate("--run", models[family], "--test_file", test, "--labels", *labels, *plain)
    folder = tmp_path / "outputs" / models[family].name / "eval" / "classification-test-test"
    assert [list(line["probabilities"]) for line in predictions(folder)] == [labels] * 9
    assert "train_loss" not in figures(folder) and figures(folder)["eval_loss"] > 0
    with pytest.raises(InputError, match="'music' is not among the labels"):
        run_evaluate("--run", models[family], "--test_file", test, "--labels", *labels[:2], *plain)
    with pytest.raises(InputError, match="--model other: give the model as --run"):
        run_evaluate("--run", models[family], "--model", "other", "--test_file", test)
    with pytest.raises(InputError, match="head would be random"):
        run_evaluate("--run", models[family], "--approach", "head", "--test_file", test)


def test_newest_run_without_an_option(trained, tmp_path, monkeypatch):
    """The newest weights under outputs/; the embedded model where there are none."""
    monkeypatch.chdir(tmp_path)
    config, run, _ = evaluate.read_options({})
    assert (config.model, run.folder) == ("smollm2-135m", None)
    for number, family in enumerate(FAMILIES, 1):
        run = copy_of(trained(family, "generative", "single"), Path("outputs") / family / "toy" / "run_1")
        shutil.rmtree(run / "eval")
        os.utime(run / "adapter" / "task.json", (number, number))
    run_evaluate()
    assert [path.parts[1] for path in Path().rglob("metrics.json")] == [FAMILIES[-1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_split_of_the_run(trained, family, tmp_path):
    """Validation rows have their own folder and heading, and no test baselines."""
    run = copy_of(trained(family, "generative", "single"), tmp_path / "run")
    run_evaluate("--run", run, "--split", "validation")
    report = (run / "eval" / "validation" / "report.md").read_text()
    assert figures(run / "eval" / "validation")["rows"] == 6 and "| validation split |" in report
    with pytest.raises(InputError, match="--test_file is the test split"):
        run_evaluate("--run", run, "--split", "validation", "--test_file", tmp_path / "x.csv")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_with_its_own_file_needs_no_other(trained, split, tmp_path):
    """Training rows may be gone, or large: nothing of theirs is in the figures."""
    run = copy_of(trained("llama", "generative", "single"), tmp_path / "run")
    options = read_saved(run)
    options |= {f"{other}_file": str(tmp_path / "gone.csv") for other in {"train", "validation", "test"} - {split}}
    (run / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    run_evaluate("--run", run, "--split", split, "--output_dir", tmp_path / "again")
    assert figures(tmp_path / "again")["rows"] == {"validation": 6, "test": 15}[split]
    with pytest.raises(InputError, match=r"gone\.csv"):
        run_evaluate("--run", run, "--split", "train")


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_file_is_refused(models, family, tmp_path, monkeypatch):
    """The split would be another one; nothing is loaded before that is said."""
    task = ["--model", models[family], *task_options("single", tmp_path / "data")]
    train(*task, "--max_steps", 1, "--output_dir", tmp_path / "run")
    with open(tmp_path / "data" / "test.csv", "a", encoding="utf-8") as file:
        file.write("one more match,sport\n")
    monkeypatch.setattr(storage, "load_classifier", None)
    with pytest.raises(InputError, match=r"test\.csv has changed since the run was trained.*--test_file"):
        run_evaluate("--run", tmp_path / "run")


def test_what_does_not_fit_the_run_is_refused(trained, tmp_path, monkeypatch):
    """Options settled by training, labels in another order, a head that should write: said before a model is loaded."""
    monkeypatch.setattr(storage, "load_classifier", None)
    multi = write_csv(tmp_path / "multi.csv", multi_rows(4))
    single = write_csv(tmp_path / "single.csv", toy_rows(2))
    for family in FAMILIES:
        run, several = trained(family, "generative", "single"), trained(family, "head", "multi")
        alone = copy_of(several / "adapter", tmp_path / f"{family}-adapter")
        for options, reason in (
            (["--run", run, "--max_length", "9"], "--max_length was settled"),
            (["--run", run, "--test_fraction", "0.3"], "--test_fraction was settled"),  # would test what was trained on
            (["--run", run, "--labels", "sport", "music", "science"], "--labels was settled"),
            (["--run", run, "--load_in_4bit", "true"], "--load_in_4bit was settled"),
            (["--run", several, "--decode", "generate"], "has a classification head and writes no text"),
            (["--run", several, "--label_columns", "music", "science", "sport", "--test_file", multi], "in this order"),
            (["--run", alone, "--test_file", single], "any number of labels"),
            (["--run", tmp_path], "no trained weights"),
        ):
            with pytest.raises(InputError, match=reason):
                run_evaluate(*options)


@pytest.fixture(scope="module")
def shared_out(trained, models, chat_files, tmp_path_factory) -> Path:
    """A folder of evaluations by one process, by two, and by two that share the model out.

    103 rows of each task, 13 of several labels, and a single conversation, which one of two processes has.
    """
    base = tmp_path_factory.mktemp("shared_out")
    text, texts = base / "text.txt", base / "rows.txt"
    text.write_text(prose(400))
    texts.write_text(prose(396, seed=1))
    train_chat("--model", models["llama"], *chat_files, "--max_steps", 1, "--output_dir", base / "chat")
    train_text("--model", models["llama"], "--train_file", text, "--max_steps", 1, "--output_dir", base / "text")
    labeled = write_csv(base / "rows.csv", toy_rows(35)[:103])
    asked, one_asked = write_jsonl(base / "rows.jsonl", chats(103)), write_jsonl(base / "row.jsonl", chats(1, 30))
    evaluations = {
        "classification": ["--run", trained("mistral", "generative", "single"), "--test_file", labeled],
        "causal_lm": ["--run", base / "text", "--test_file", texts],
        "chat": ["--run", base / "chat", "--test_file", asked, "--max_new_tokens", 8],
        "one chat": ["--run", base / "chat", "--test_file", one_asked, "--max_new_tokens", 20],
        "multi": ["--run", trained("qwen", "generative", "multi")],
        "head": ["--run", trained("gemma", "head", "single")],
        "nf4": ["--run", trained(FAMILIES[0], *COMBINATIONS[0], *QUANTIZED)],
        "base": ["--run", models["llama"], "--task", "causal_lm", "--test_file", texts, "--load_in_4bit", "false"],
    }
    for task, options in evaluations.items():
        run_evaluate(*options, "--output_dir", base / "one" / task)
    calls = [[*options, "--output_dir", base / "two" / task] for task, options in evaluations.items()]
    calls += [[*options, "--output_dir", base / "sharded" / task, "--shard_model", "true"]
              for task, options in evaluations.items()]  # fmt: skip
    said = run_in_two_processes("evaluate", base, *calls)
    assert said.count("The base is sharded: a process holds") == len(evaluations)
    return base


@pytest.mark.parametrize("processes", ["two", "sharded"])
def test_two_processes_write_one_processes_files(processes, shared_out):
    """By the script itself: 13 rows over two processes, once each, the same figures."""
    one, two = (figures(shared_out / folder / "multi") for folder in ("one", processes))
    lines = predictions(shared_out / processes / "multi")
    assert [line["id"] for line in lines] == [str(i) for i in range(13)]
    for name in ("eval_loss", "perplexity", "nll", "ece", "brier_score"):
        assert two.pop(name) == pytest.approx(one.pop(name), rel=1e-4)
    assert np.array(two.pop("calibration_bins")) == pytest.approx(np.array(one.pop("calibration_bins")), rel=1e-4)
    assert two == one


@pytest.mark.parametrize("processes", ["two", "sharded"])
@pytest.mark.parametrize("task", ["classification", "causal_lm", "chat", "one chat", "head", "base"])
def test_two_processes_measure_rows_as_one(task, processes, shared_out):
    """A number that two processes cannot share out evenly: the same figures and intervals, each row once.

    Greedy answers of different length are written by each for itself, so nobody waits for the other's tokens.
    """
    one, two = (figures(shared_out / folder / task) for folder in ("one", processes))
    rows = {"classification": 103, "chat": 103, "one chat": 1, "head": 15}.get(task, one["rows"])
    assert one["rows"] % 2 and one.get("answers", one["rows"]) == rows
    for found in (one, two):  # beside these numbers, all is equal
        found.pop("calibration_bins", None)
        for name, bounds in found.pop("intervals_95").items():
            found |= {f"{name} from": bounds[0], f"{name} to": bounds[1]}
    numbers = [name for name, value in one.items() if isinstance(value, float)]
    assert [two.pop(name) for name in numbers] == pytest.approx([one.pop(name) for name in numbers], rel=1e-4)
    assert two == one
    if "chat" in task:
        answers = [[line["prediction"] for line in predictions(shared_out / folder / task)]
                   for folder in ("one", processes)]  # fmt: skip
        assert answers[0] == answers[1]


def test_a_sharded_4_bit_base_measures_what_a_whole_one_does(shared_out):
    """In bf16, with the adapter in fp32 beside it."""
    whole, sharded = (figures(shared_out / folder / "nf4") for folder in ("two", "sharded"))
    assert sharded["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_the_figures_are_those_of_the_predictions(trained, combination):
    """scikit-learn's of the columns of predictions.csv."""
    for family in FAMILIES:
        folder = trained(family, *combination) / "eval" / "test"
        with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        labels = [name[2:-1] for name in rows[0] if name.startswith("p(")]
        gold, found = (
            np.array([[label in row[column].split(SEPARATOR) for label in labels] for row in rows])
            for column in ("gold", "prediction")
        )
        metrics = figures(folder)
        assert metrics["accuracy"] == pytest.approx((gold == found).all(1).mean())
        for average in ("micro", "macro", "weighted"):
            expected = f1_score(gold, found, average=average, zero_division=0)
            assert metrics[f"f1_{average}"] == pytest.approx(expected)
        p = np.array([[float(row[f"p({label})"]) for label in labels] for row in rows])
        assert metrics["brier_score"] == pytest.approx(((p - gold) ** 2).sum(1).mean(), abs=1e-5)


def test_loaded_precision_follows_the_option(models, tmp_path):
    """--mixed_precision no loads a bf16 run in fp32; its figures stay within 1e-2."""
    rows = {split: toy_rows(n, start=s) for split, n, s in (("train", 4, 0), ("validation", 2, 20), ("test", 4, 30))}
    files = {split: str(write_csv(tmp_path / f"{split}.csv", content)) for split, content in rows.items()}
    for family in FAMILIES:
        run = tmp_path / family
        options = ["--approach", "head", "--mixed_precision", "bf16", "--max_steps", 1, "--output_dir", run]
        train("--model", models[family], *toy_options(files), *options)
        run_evaluate("--run", run, "--mixed_precision", "no", "--output_dir", tmp_path / f"{family}-fp32")
        one, two = figures(run / "eval" / "test"), figures(tmp_path / f"{family}-fp32")
        assert one["eval_loss"] != two["eval_loss"] and abs(one["eval_loss"] - two["eval_loss"]) < 1e-2


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_a_fitted_decision_is_applied_wherever_a_run_answers(trained, combination, tmp_path, capsys):
    """evaluate.py, inference.py's batch and the Python API give the same answers; a second fit begins anew."""
    options, some_abstained = ["--fit_decisions", "--min_precision", 0.305, "--confidence", 0.6], False
    for family in FAMILIES:
        folder = copy_of(trained(family, *combination), tmp_path / f"{family}-run")
        before = predictions(folder / "eval" / "test")
        run_evaluate("--run", folder, *options)
        said = capsys.readouterr().out
        task = json.loads((folder / "adapter" / "task.json").read_text())
        decision = task["decision"]
        assert " validation rows, half of which" in said
        assert "30.5% of the answers given are right, with 60% confidence" in said
        run_evaluate("--run", folder, *options)
        assert json.loads((folder / "adapter" / "task.json").read_text()) == task
        task["decision"]["cut"] = 0.6 if combination[1] == "multi" else 0.4  # some are given, some are not
        (folder / "adapter" / "task.json").write_text(json.dumps(task))
        run_evaluate("--run", folder)
        found, metrics = predictions(folder / "eval" / "test"), figures(folder / "eval" / "test")
        if combination[1] == "multi":
            labels = list(found[0]["probabilities"])
            assert decision["temperature"] == 1 and len(decision["thresholds"]) == 3
            for row in found:
                pairs = zip(labels, row["probabilities"].values(), decision["thresholds"], strict=True)
                assert row["prediction"] == [label for label, x, threshold in pairs if x >= threshold]
        else:
            assert decision["temperature"] != 1
            assert [row["prediction"] for row in found] == [row["prediction"] for row in before]
            for row, other in zip(found, before, strict=True):
                raw = np.array(list(other["probabilities"].values())) ** (1 / decision["temperature"])
                assert list(row["probabilities"].values()) == pytest.approx((raw / raw.sum()).tolist())
        given = [row for row in found if not row.get("abstained")]
        if len(given) < len(found):
            some_abstained = True
            right = sum(row["prediction"] == row["gold"] for row in given)
            assert metrics["accepted"] == len(given) / len(found)
            assert metrics.get("accuracy_accepted", 0) == (right / len(given) if given else 0)
        examples = load_classification(TrainingConfig(**read_saved(folder)), training=False).splits["test"]
        answers = open_run(str(folder)).classifier().label_examples(examples, 4)
        for row, answer in zip(found, answers, strict=True):
            assert answer.prediction == (None if row.get("abstained") else row["prediction"])
            assert answer.abstained == row.get("abstained", False)
            assert list(answer.probabilities.values()) == pytest.approx(list(row["probabilities"].values()), abs=2e-6)
    assert some_abstained


def test_decisions_are_fitted_on_validation_rows_alone(trained, models, tmp_path):
    folder = copy_of(trained("llama", "generative", "single"), tmp_path / "run")
    for options, reason in [
        (["--split", "test"], "drop --split"),
        (["--split", "train"], "drop --split"),
        (["--test_file", "other.csv"], "drop --split, --test_file"),
        (["--decode", "generate"], "--decode"),
    ]:
        with pytest.raises(InputError, match=reason):
            run_evaluate("--run", folder, "--fit_decisions", *options)
    with pytest.raises(InputError, match="need --fit_decisions"):
        run_evaluate("--run", folder, "--min_precision", 0.9)
    for option in (["--fit_decisions"], ["--folds", 5, "--train_file", "t.csv"]):
        with pytest.raises(InputError, match="is a base model"):
            run_evaluate("--run", models["llama"], *option)
    config = mock.Mock(blend_baseline=False, min_precision=0.9)
    with pytest.raises(InputError, match="only one row"):
        check_fit(config, open_run(str(folder)), [None])
    config.blend_baseline = True
    with pytest.raises(InputError, match="has no tfidf/, which --baselines true leaves there"):
        check_fit(config, open_run(str(folder)), [None] * 9)
    task = json.loads((folder / "adapter" / "task.json").read_text())
    (folder / "adapter" / "task.json").write_text(json.dumps({**task, "decision": {"temperatur": 2}}))
    with pytest.raises(InputError, match="task.json: decision: .*temperatur"):
        run_evaluate("--run", folder)


MEMORY = """
import resource, sys
sys.path[:0] = [sys.argv.pop(1)]
import evaluate
evaluate.main()
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_twice_the_rows_take_no_more_memory(trained, tmp_path):
    """Peak resident set of evaluate.py, all probabilities included: at most 5 % more."""
    (tmp_path / "memory.py").write_text(MEMORY)
    peaks = []
    for rows in (150, 300):
        file = write_csv(tmp_path / f"{rows}.csv", toy_rows(rows // 3))
        run = trained("llama", "generative", "single")
        options = ["--run", str(run), "--test_file", str(file), "--output_dir", str(tmp_path / str(rows))]
        found = run_script(tmp_path / "memory.py", str(ROOT), *options)
        peaks.append(int(found.stdout.split("PEAK")[1]))
    assert peaks[1] < 1.05 * peaks[0]
