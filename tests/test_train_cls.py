"""train_cls.py from end to end on tiny models: what a run leaves behind, and that training teaches."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from helpers.models import FAMILIES
from helpers.rows import WORDS, multi_rows, task_options, toy_options, toy_rows, write_csv
from helpers.runs import PLAIN, RUNS, assert_same_updates, name_of, quick, run_evaluate, train
from helpers.scripts import run_script
from sklearn.metrics import accuracy_score, f1_score

import train_cls
from common.data.files import read_rows
from common.errors import InputError
from common.measure import figures, scoring
from common.model import base_model, classifier, storage
from common.text.prompts import GENERATIVE_TEMPLATE

TREE = {
    "config.yaml", "environment.json", "splits.json", "data_report.md", "data_report.json", "metrics.jsonl",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/tokenizer.json", "adapter/task.json",
    "adapter/README.md", "checkpoints/step_4/weights/adapter_model.safetensors", "checkpoints/step_4/state.json",
    "eval/test/metrics.json", "eval/test/predictions.csv", "eval/test/predictions.jsonl",
    "eval/test/report.md", "eval/test/wrong.csv",
}  # fmt: skip
METRICS = {
    "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "eval_runtime",
    "mean_token_accuracy", "accuracy", "f1_micro", "f1_macro", "f1_weighted", "per_label", "confusion_matrix",
    "eval_loss", "perplexity", "examples_per_second", "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture(params=RUNS, ids=name_of)
def run(request, trained) -> Path:
    family, approach, kind, options = request.param
    return trained(family, approach, kind, *options)


def test_run_folder_holds_what_the_contract_names(run):
    """Every file, pictures that are pictures, and every figure with a sensible value."""
    files = {str(path.relative_to(run)) for path in run.rglob("*")}
    drawn = {"eval/test/confusion_matrix.png", "learning_curve.png"} if run.parent.name.startswith("drawn") else set()
    assert files >= TREE | drawn, (TREE | drawn) - files
    assert not [name for name in files if ".tmp" in name or ".old" in name]
    for picture in run.rglob("*.png"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 3000
    metrics = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    assert metrics.keys() >= METRICS, METRICS - metrics.keys()
    positive = METRICS - {"per_label", "confusion_matrix", "mean_token_accuracy", "accuracy", "perplexity"}
    assert all(metrics[name] > 0 for name in positive if not name.startswith("f1_"))
    assert metrics["perplexity"] >= 1 and 0 <= metrics["mean_token_accuracy"] <= 1
    for name in ("accuracy", "f1_micro", "f1_macro", "f1_weighted"):
        low, high = metrics["intervals_95"][name]
        assert 0 <= low <= metrics[name] <= high <= 1
    text = (run / "eval" / "test" / "report.md").read_text()
    assert all(part in text for part in ("this run", "95 %", "Answers outside the label set"))
    assert ("(confusion_matrix.png)" in text) == bool(drawn)
    task = json.loads((run / "adapter" / "task.json").read_text())
    assert task["prompt_hash"] and task["template"] and len(task["labels"]) == 3


def test_predictions_have_a_line_a_row_in_input_order(run):
    """Both files: ids, gold labels, probabilities that explain the answer, and in the sheet what the model read."""
    source = read_rows(json.loads((run / "splits.json").read_text())["sources"]["test"]["name"])
    lines = [json.loads(line) for line in (run / "eval" / "test" / "predictions.jsonl").read_text().splitlines()]
    with open(run / "eval" / "test" / "predictions.csv", newline="", encoding="utf-8") as file:
        sheet = list(csv.DictReader(file))
    task = json.loads((run / "adapter" / "task.json").read_text())
    assert len(lines) == len(sheet) == len(source)
    for number, (line, cells, row) in enumerate(zip(lines, sheet, source, strict=True)):
        assert list(line) == ["id", "gold", "prediction", "probabilities", "truncated"]
        assert line["id"] == cells["id"] == str(number) and list(line["probabilities"]) == task["labels"]
        assert line["truncated"] is False and cells["truncated"] == "false"
        assert row["text"].strip() in cells["prompt"]
        assert [float(cells[f"p({label})"]) for label in task["labels"]] == list(line["probabilities"].values())
        if task["multi_label"]:
            assert line["gold"] == [label for label in task["labels"] if row[label] == "1"]
            assert line["prediction"] == [label for label, p in line["probabilities"].items() if p >= 0.5]
            assert cells["gold"] == ", ".join(line["gold"])
        else:
            assert line["gold"] == cells["gold"] == row["label"]
            assert line["prediction"] == max(line["probabilities"], key=line["probabilities"].get)
            assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_generative_model_learns_its_rows_and_to_stop(models, family, tmp_path, monkeypatch):
    """Pad == eos; after 60 updates on 21 rows it answers them, and ends each answer by itself."""
    rows = toy_rows(7)
    files = {"train": str(write_csv(tmp_path / "train.csv", rows)), "test": str(write_csv(tmp_path / "test.csv", rows))}
    options = ["--max_steps", 60, "--learning_rate", 1e-2, "--eval_strategy", "no", "--validation_fraction", 0]
    rates = ["--lr_scheduler_type", "linear", "--save_strategy", "no", "--output_dir", tmp_path / "run"]
    figures = train("--model", models[family], *toy_options(files), *options, *rates, "--lora_r", 16)
    assert figures["accuracy"] >= 0.95 and figures["mean_token_accuracy"] >= 0.95

    classifier = storage.load_classifier(tmp_path / "run" / "adapter")
    prompt, outputs = classifier.prompt, []
    assert classifier.tokenizer.pad_token_id == classifier.tokenizer.eos_token_id == 2
    prompt.answer_tokens = 12  # room to run on
    generate = classifier.model.generate
    monkeypatch.setattr(classifier.model, "generate", lambda **kw: outputs.append(generate(**kw)) or outputs[-1])
    ids = [prompt.prompt(f"{row['text']}.").ids for row in rows]
    answers = scoring.generate_answers(classifier, ids, batch_size=1, device="cpu")
    order = sorted(range(21), key=lambda i: -len(ids[i]))
    stopped = [output[0, len(ids[i]) :].tolist().count(2) == 1 for i, output in zip(order, outputs, strict=True)]
    assert sum(stopped) >= 0.95 * 21
    right = [answer.text.strip() == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) >= 0.95 * 21


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_encoders_run_as_a_control(encoders, family, tmp_path):
    """With baselines, of which the untrained model is none: an encoder cannot be asked."""
    task = ["--model", encoders[family], "--approach", "head", *task_options("single", tmp_path / "data")]
    default = ["--load_in_4bit", "false", "--baselines", "true", "--max_steps", 40, "--learning_rate", 2e-2]
    figures = train(*task, *default, "--output_dir", tmp_path / "run")
    baselines = json.loads((tmp_path / "run" / "eval" / "test" / "baselines.json").read_text())
    assert baselines["untrained base, zero-shot"] == "n/a"
    assert figures["accuracy"] > baselines["majority class"]["accuracy"] + 0.2
    again = storage.load_classifier(tmp_path / "run" / "adapter")
    assert again.encoder and again.head


@pytest.mark.parametrize("approach", ["generative", "head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_baselines_are_measured_on_the_untrained_base(models, family, approach, tmp_path):
    """The same figures whatever the adapter's initialisation takes from the base, and for a head as well."""
    task = ["--model", models[family], *task_options("single", tmp_path / "data")]
    few = ["--max_steps", 1, "--baselines", "true", "--eval_strategy", "no", "--save_strategy", "no"]
    init = ["--init_lora_weights", "pissa"] if approach == "generative" else ["--approach", "head"]
    train(*task, *few, *init, "--output_dir", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "eval" / "test" / "baselines.json").read_text())
    assert found["TF-IDF + logistic regression"]["accuracy"] > 0.9 and found["majority class"]["accuracy"] == 1 / 3

    config = storage.TrainedOptions(model=str(models[family]), load_in_4bit=False)
    base = base_model.load_base(config.model, config)[0].eval()
    tokenizer = base_model.load_tokenizer(config.model, config)
    prompt = classifier.classification_prompt(
        tokenizer, False, labels=["music", "science", "sport"], multi_label=False,
        template=GENERATIVE_TEMPLATE, max_length=256,
    )  # fmt: skip
    rows = toy_rows(5, start=30)
    base_classifier = classifier.Classifier(base, prompt, tokenizer)
    gold = [(prompt.labels.index(row["label"]),) for row in rows]
    ids = [prompt.prompt(f"{row['text']}.").ids for row in rows]
    answers = scoring.score_labels(base_classifier, ids, gold=gold, batch_size=16, device="cpu")
    loss = sum(answer.nll for answer in answers) / sum(answer.targets for answer in answers)
    assert found["untrained base, zero-shot"]["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_finetuning_leaves_a_model(models, family, tmp_path, capfd):
    """model/ instead of adapter/, and no progress bars or warnings of libraries on the way."""
    approach = "head" if family in ("llama", "gemma") else "generative"
    task = ["--model", models[family], "--approach", approach, *task_options("single", tmp_path / "data")]
    train(*task, "--full_finetuning", "true", "--max_steps", 2, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file() and not (tmp_path / "run" / "adapter").exists()
    printed = capfd.readouterr().err
    assert not [word for word in ("Writing", "Loading", "Warning", "warn(") if word in printed], printed


def test_missing_extras_are_named_once_with_their_command(models, tmp_path, monkeypatch, capsys):
    """A run without matplotlib and TensorBoard works, for each family, and says at its start what would add them."""
    real = importlib.util.find_spec

    def without(name: str, package: str | None = None):
        return None if name.partition(".")[0] in ("matplotlib", "tensorboard") else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for family in FAMILIES:
        run = tmp_path / family
        task = ["--model", models[family], *task_options("single", tmp_path / "data"), "--max_steps", 1]
        train(*task, "--output_dir", run, draw=True)
        printed = capsys.readouterr().out
        assert printed.count("`pip install matplotlib`") == printed.count("pip install") == 1
        assert printed.index("pip install") < printed.index("# Data report")
        assert not list(run.rglob("*.png"))
        assert "confusion_matrix.png" not in (run / "eval" / "test" / "report.md").read_text()
    figures.say_what_is_missing(SimpleNamespace(is_main_process=True), None)
    assert "`pip install matplotlib tensorboard`" in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_survive_any_label(models, family, tmp_path):
    """Labels that are formulas to matplotlib, bars to a table, or in a script that its font lacks."""
    names = {"sport": "$x^{ a|b$", "science": "科学 $", "music": "a_{"}
    rows = {split: [{**row, "label": names[row["label"]]} for row in toy_rows(n, start=s)]
            for split, n, s in (("train", 4, 0), ("validation", 2, 20), ("test", 2, 30))}  # fmt: skip
    files = {split: str(write_csv(tmp_path / f"{split}.csv", content)) for split, content in rows.items()}
    train("--model", models[family], *toy_options(files), "--max_steps", 1, "--output_dir", tmp_path / "run", draw=True)
    assert (tmp_path / "run" / "eval" / "test" / "confusion_matrix.png").stat().st_size > 3000
    text = (tmp_path / "run" / "eval" / "test" / "report.md").read_text()
    assert r"| $x^{ a\|b$ |" in text


def test_few_shot_examples_are_no_training_rows(trained, tmp_path):
    """splits.json lists what was trained on; the examples stand beside it."""
    run = trained("llama", "generative", "single", "--few_shot", "3", "--max_length", "512")
    splits = json.loads((run / "splits.json").read_text(encoding="utf-8"))
    rows = read_rows(splits["sources"]["train"]["name"])
    assert len(splits["few_shot"]) == 3 and len(splits["ids"]["train"]) == len(rows) - 3
    assert not {rows[int(i)]["text"] + "." for i in splits["ids"]["train"]} & set(splits["few_shot"])
    run_evaluate("--run", run, "--split", "train", "--output_dir", tmp_path)
    measured = [json.loads(line)["id"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert measured == splits["ids"]["train"]


def test_trained_weights_are_finite(trained):
    """The run used by the other tests moved its adapter."""
    from safetensors.torch import load_file

    for family in FAMILIES:
        weights = load_file(trained(family, "generative", "single") / "adapter" / "adapter_model.safetensors")
        assert all(t.isfinite().all() for t in weights.values())
        assert any(t.abs().sum() > 0 for name, t in weights.items() if "lora_B" in name)
        assert all(t.dtype is torch.float32 for t in weights.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--max_length", 600], "longer than the 512 positions"), (["--mixed_precision", "fp16"], "needs a GPU")],
)
def test_what_the_model_or_the_machine_cannot_do_is_said_at_once(models, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(base_model, "load_base", None)
    task = task_options("single", tmp_path / "data")
    with pytest.raises(InputError, match=message):
        train("--model", models["llama"], *task, *options, "--output_dir", tmp_path / "run")


def test_a_compiled_model_makes_the_same_updates(models, tmp_path, monkeypatch):
    """With packs, by torch.compile's graphs; without its code generator, which takes minutes."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled(self, backend="aot_eager", **how))
    task = ["--model", models["llama"], *task_options("single", tmp_path / "data"), "--shared_prefix", "on"]
    for way in ("false", "true"):
        train(*task, "--max_steps", 3, "--torch_compile", way, "--output_dir", tmp_path / way)
    torch.compiler.reset()
    assert_same_updates(tmp_path / "false", tmp_path / "true")


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_folds_predict_every_row_once(models, tmp_path, monkeypatch, capsys, kind):
    """Three runs with a table, pooled figures as scikit-learn's; each run evaluates on its own fold again."""
    rows = toy_rows(9) if kind == "single" else multi_rows(27)
    options = ["--train_file", write_csv(tmp_path / "rows.csv", rows), "--folds", 3, "--max_steps", 2]
    options += ["--label_columns", *WORDS] if kind == "multi" else []
    options = ["--model", models["llama"], *PLAIN, *options, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["train_cls.py", *map(str, options)])
    with quick():
        train_cls.main()
    said, found = capsys.readouterr().out, []
    for fold in (1, 2, 3):
        run = tmp_path / "out" / f"fold_{fold}"
        lines = [json.loads(line) for line in (run / "eval/test/predictions.jsonl").read_text().splitlines()]
        splits = json.loads((run / "splits.json").read_text())["ids"]
        assert [line["id"] for line in lines] == splits["test"] and len(splits["validation"]) in (2, 3)
        assert sorted(sum(splits.values(), []), key=int) == [str(i) for i in range(27)]
        run_evaluate("--run", run, "--output_dir", tmp_path / f"again_{fold}")
        assert (tmp_path / f"again_{fold}/predictions.jsonl").read_text() == (
            run / "eval/test/predictions.jsonl"
        ).read_text()
        found += lines
    run_evaluate("--run", run, "--test_file", tmp_path / "rows.csv", "--output_dir", tmp_path / "all")
    assert json.loads((tmp_path / "all" / "metrics.json").read_text())["rows"] == 27  # other rows are not dealt out
    assert sorted((line["id"] for line in found), key=int) == [str(i) for i in range(27)]
    names = list(WORDS)
    gold, predicted = (
        [[int(name in line[key]) for name in names] if kind == "multi" else names.index(line[key]) for line in found]
        for key in ("gold", "prediction")
    )
    table = (tmp_path / "out" / "folds.md").read_text()
    assert table in said and table.startswith("| fold ") and "mean ± sd" in table
    pooled = next(line for line in table.splitlines() if line.startswith("| all 27 rows"))
    assert [cell.split()[0] for cell in pooled.split("|")[2:5]] == [
        f"{accuracy_score(gold, predicted):.3f}",
        *(f"{f1_score(gold, predicted, average=average, zero_division=0):.3f}" for average in ("micro", "macro")),
    ]


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = sys.modules["datasets"] = None  # importing either fails, as where it is not installed
import os, runpy
sys.argv[0] = sys.argv.pop(1)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_needs_neither_bitsandbytes_nor_datasets(models, toy_files, tmp_path):
    """Unquantized, on files: trained, evaluated, and loaded again."""
    script = tmp_path / "without.py"
    script.write_text(WITHOUT)
    options = [*PLAIN, "--model", models["llama"], *toy_options(toy_files), "--max_steps", 2]
    run_script(str(script), str(ROOT / "train_cls.py"), *map(str, options), "--output_dir", str(tmp_path / "run"))
    run_script(str(script), str(ROOT / "evaluate.py"), "--run", str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "eval" / "test" / "metrics.json").read_text())["rows"] == 15
