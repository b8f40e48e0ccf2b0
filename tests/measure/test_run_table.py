"""Seeds and runs side by side, whatever their task and metrics."""

import csv
import json
from pathlib import Path
from unittest import mock

import pytest

from common import report as command
from common.errors import InputError
from common.measure import figures
from common.measure.metrics import METRICS, TASKS, Task, register_metric, register_task
from common.measure.run_table import write_seed_table, write_table


@pytest.fixture(autouse=True)
def registry():
    """What a test registers is forgotten after it; no pictures."""
    with mock.patch.dict(METRICS), mock.patch.dict(TASKS), mock.patch.object(figures, "can_draw", lambda: False):
        yield


def write_run(folder: Path, task: str, metrics: dict, config: str, baselines: dict | None = None) -> Path:
    """A run folder with no more than the table needs."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "eval" / "test").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model: hub/tiny\n{config}")
    (folder / "adapter" / "task.json").write_text(json.dumps({"task": task}))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"0" * 2**20)
    (folder / "eval" / "test" / "metrics.json").write_text(json.dumps(metrics))
    if baselines:
        (folder / "eval" / "test" / "baselines.json").write_text(json.dumps(baselines))
    return folder


def cells(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, each title -> cell."""
    lines = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


REGRESSION = {"mae": 0.25, "epochs": 2.0, "train_runtime": 30.0, "train_tokens_per_second": 1234.5}


def test_a_task_of_ones_own_is_shown_by_the_metric_that_chose_its_weights(tmp_path, capsys):
    """Nothing is registered for it: no interval, and no cell for what the folder does not tell."""
    config = "metric_for_best_model: mae\nload_in_4bit: 'true'\nlora_r: '8'\nlora_alpha: '16.0'"
    baselines = {"untrained base": {"mae": 0.5}, "median": {"mae": 0.75}, "linear": "mae", "other": {"rmse": 1}}
    write_run(tmp_path / "runs" / "one", "regression", REGRESSION, config, baselines)
    write_run(tmp_path / "runs" / "two", "regression", {"mae": 0.5}, f"{config}\nuse_dora: 'true'", baselines)
    command.main(["table", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    one, two, base, median = cells(text)
    assert one == {
        "run": "one", "model": "tiny", "training": "4-bit LoRA", "r, alpha": "8, 16", "trained": "-", "epochs": "2",
        "s per epoch": "15", "tokens/s": "1234", "mae": "0.250", "memory": "-", "weights": "1.0 MB",
    }  # fmt: skip
    assert (two["training"], two["epochs"], two["mae"]) == ("4-bit DoRA", "-", "0.500")
    assert (base["run"], base["training"], base["mae"]) == ("untrained base", "4-bit base", "0.500")
    assert (median["run"], median["training"], median["mae"]) == ("median", "", "0.750")
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [row["mae"] for row in rows] == ["0.25", "0.5"] and rows[0]["low_95"] == ""
    assert rows[0]["weights_bytes"] == str(2**20)


def test_a_registered_task_is_compared_by_its_own_metric(tmp_path):
    """And not by what chose the weights."""
    register_metric("rmse", "RMSE", higher_is_better=False)
    register_task(Task("regression", ("rmse",), ("rmse",), curve="rmse", compared="rmse"))
    metrics = {"mae": 0.25, "rmse": 0.5, "intervals_95": {"rmse": [0.4, 0.6]}}
    write_run(tmp_path / "one", "regression", metrics, "metric_for_best_model: mae")
    (row,) = cells(write_table([tmp_path], tmp_path / "out"))
    assert row["rmse"] == "0.500 [0.400, 0.600]" and "mae" not in row


def test_what_cannot_be_compared_is_named(tmp_path):
    write_run(tmp_path / "one", "regression", {"mae": 0.25}, "metric_for_best_model: mae")
    write_run(tmp_path / "two", "classification", {"accuracy": 0.5}, "metric_for_best_model: f1_macro")
    with pytest.raises(InputError, match=r"different tasks \(accuracy, mae\)"):
        write_table([tmp_path], tmp_path / "out")
    write_run(tmp_path / "three", "regression", {"rmse": 0.25}, "metric_for_best_model: mae")
    with pytest.raises(InputError, match="three: its test metrics have none .* of the task regression"):
        write_table([tmp_path / "three"], tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "training"),
    [("full_finetuning: 'true'", "full"), ("load_in_8bit: 'true'\nuse_dora: 'true'", "8-bit DoRA"), ("", "LoRA"),
     ("load_in_4bit: 'false'\nload_in_8bit: 'false'\nuse_dora: 'false'", "LoRA")],
)  # fmt: skip
def test_how_a_run_was_trained(tmp_path, config, training):
    write_run(tmp_path, "classification", {"accuracy": 0.5}, config)
    (row,) = cells(write_table([tmp_path], tmp_path / "out"))
    assert row["training"] == training and row["r, alpha"] == ("" if training == "full" else "16, 32")


def test_runs_of_one_name_are_told_apart(tmp_path):
    """As seed_1 of two recipes: by their folders."""
    for recipe in ("a", "b"):
        write_run(tmp_path / recipe / "seed_1", "classification", {"accuracy": 0.5}, "lora_r: 8\n")
    rows = cells(write_table([tmp_path], tmp_path / "out"))
    assert [row["run"] for row in rows] == ["a/seed_1", "b/seed_1"] and rows[0]["weights"] == "1.0 MB"


def test_a_table_for_spreadsheets_has_no_formulas(tmp_path):
    write_run(tmp_path / "=cmd()", "classification", {"accuracy": 0.5}, "")
    write_table([tmp_path], tmp_path / "out")
    assert (tmp_path / "out" / "table.csv").read_text().splitlines()[1].startswith("'=cmd(),tiny,")


def test_seeds_show_every_registered_metric(tmp_path, capsys):
    """By its title; what one seed lacks is -, what is not registered is left out, a failed seed says why."""
    register_metric("mae", "mean error", higher_is_better=False)
    runs = {
        1: {"epochs": 1.0, "train_loss": 2.0, "eval_loss": 1.0, "mae": 0.25, "mystery": 7, "eval_runtime": 3.0},
        2: {"epochs": 1.0, "train_loss": 4.0, "eval_loss": 1.5, "eval_runtime": 5.0},
        3: "failed: ValueError: bad luck",
    }
    write_seed_table(tmp_path / "runs" / "seeds.md", runs)
    text = (tmp_path / "runs" / "seeds.md").read_text()
    assert text in capsys.readouterr().out
    one, two, three, mean = cells(text)
    assert one == {"seed": "1", "epochs": "1", "train loss": "2", "eval loss": "1", "mean error": "0.25", "eval s": "3"}
    assert two["mean error"] == "-" and {*three.values()} == {"3", "failed"}
    assert (mean["train loss"], mean["mean error"]) == ("3 ± 1.4", "-")
    assert text.endswith("\nSeed 3 failed: ValueError: bad luck\n")
