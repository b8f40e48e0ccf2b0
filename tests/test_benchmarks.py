"""The benchmarks run, and other trainers reach the losses of ours on the same rows: the strictest check of the loop."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.rows import task_options, toy_options, toy_rows, write_csv
from helpers.runs import quick, run_evaluate, train
from helpers.scripts import run_script

from benchmarks import cost_growth, decisions, gpu, score_speed, train_speed, turns
from common import open_run
from common.errors import InputError


@pytest.fixture
def run_here(monkeypatch):
    """Runs a benchmark with its workers in this process, which saves the start of a dozen others."""

    def run(script, *options):
        def start(name, **environment):  # what turns.start does
            results = []
            for key, value in environment.items():
                monkeypatch.setenv(key, str(value))
            called = mock.patch.object(sys, "argv", [*sys.argv, "--worker", name])
            with called, mock.patch.object(turns, "hand_over", results.append), quick():
                script.main()
            return json.loads(json.dumps(results[0]))

        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(turns, "start", start)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
        script.main()

    return run


TASKS = {
    "classification": ["--label_column", "label"],
    "causal_lm": ["--block_size", "16"],
    "chat": ["--chat_template", "plain"],
}


@pytest.mark.parametrize("task", TASKS)
def test_other_trainers_reach_the_same_losses(models, tmp_path, run_here, task):
    pytest.importorskip("trl", reason="a peer of the benchmark, in requirements-dev.txt")
    rows, file = toy_rows(100), tmp_path / {"causal_lm": "text.txt", "chat": "rows.jsonl"}.get(task, "rows.csv")
    if task == "classification":
        write_csv(file, rows)
    elif task == "chat":
        lines = [json.dumps({"instruction": f"word {row['label']}", "response": row["text"]}) for row in rows]
        file.write_text("\n".join(lines))
    else:
        file.write_text("\n".join(row["text"] for row in rows) * 2)
    peers = ["plainlora", "hf_trainer", "trl_tuned"] + ["plain_loop"] * (task == "classification")
    peers += ["whole_logits"] * (task == "causal_lm")
    few = ["--rounds", "1", "--warmup", "1", "--updates", "1", "--output_dir", tmp_path / "out"]
    options = ["--model", models["llama"], "--task", task, "--train_file", file, *TASKS[task], "--trainers", *peers]
    run_here(train_speed, *options, *few)
    [written] = (tmp_path / "out").glob("*.json")
    table = json.loads(written.read_text())["table"]
    assert [entry["trainer"] for entry in table] == peers
    for entry in table:
        assert entry["largest_loss_difference"] < 1e-4 and entry["ratio_of_plainlora"] > 0
    assert written.with_suffix(".md").is_file() and written.with_suffix(".png").is_file()


def test_profile_of_a_step(models):
    shown = run_script("benchmarks/step_profile.py", "--model", str(models["qwen"]), "--rounds", "1").stdout
    assert len([line for line in shown.splitlines() if line.startswith("| + ")]) == 3


def test_scorers_agree_and_every_column_is_filled(models, tmp_path, monkeypatch, run_here):
    rows = {"train": toy_rows(30), "test": toy_rows(4, start=30)}
    files = {name: str(write_csv(tmp_path / f"{name}.csv", content)) for name, content in rows.items()}
    run, out = tmp_path / "run", tmp_path / "out"
    learn = ["--model", str(models["llama"]), "--learning_rate", "1e-2", "--max_steps", "150"]
    learn += ["--validation_fraction", "0", "--eval_strategy", "no"]
    train(*learn, *toy_options(files), "--output_dir", str(run))
    few = ["--rows", "9", "--slow_rows", "6", "--rounds", "1", "--batch_sizes", "4", "8", "--output_dir", out]
    run_here(score_speed, "--run", run, *few)

    [file] = out.glob("score_*.json")
    table = {entry["scorer"]: entry for entry in json.loads(file.read_text())["table"]}
    counts = {name: entry["rows"] for name, entry in table.items()}
    assert counts == {"plainlora": 9, "plainlora_answers": 9, "pipeline": 6, "generate": 9, "per_label": 6}
    for entry in table.values():
        assert entry["agreement_with_per_label"] == 1 and entry["outside_label_set"] == 0 and entry["accuracy"] > 0.6
        assert entry["ratio_of_plainlora"] > 0 and entry["examples_per_second"] > 0
    lines = (out / f"{file.stem}.md").read_text().splitlines()
    assert len(lines) == 7 and all(cell.strip() for cell in lines[-1].split("|")[1:-1])
    assert (out / f"{file.stem}.png").is_file()

    # no ratio where accuracy is lost
    few = {"answers": {0: (1, 1), 1: (1, 1)}}
    ours = {"answers": {0: (1, 1), 1: (2, 1), 2: (0, 1)}}
    assert score_speed.lost_accuracy(ours, few) == 0.5 and score_speed.lost_accuracy(few, ours) == -0.5
    monkeypatch.setattr(score_speed, "GATE", -0.01)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--scorers", "plainlora", "generate"])
    score_speed.main()
    table = json.loads(file.read_text())["table"]
    assert [entry["ratio_of_plainlora"] for entry in table] == [None, None]
    assert "accuracy lost" in (out / f"{file.stem}.md").read_text()


def test_growth_of_cost(models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    few = ["--labels", "2", "5", "--text_tokens", "4", "12", "--rows", "1", "3", "--micro_batch", "2", "--repeats", "1"]
    task = ["--model", str(models["llama"]), "--mixed_precision", "no", "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", ["cost_growth.py", *task, *few])
    cost_growth.main()
    table = json.loads((out / "cost_growth.json").read_text())["table"]
    assert [(entry["grows"], entry["labels"], entry["text_tokens"], entry["rows"]) for entry in table] == [
        ("labels", 2, 12, 3), ("labels", 5, 12, 3), ("text_tokens", 5, 4, 3), ("text_tokens", 5, 12, 3),
        ("rows", 5, 12, 1), ("rows", 5, 12, 3),
    ]  # fmt: skip
    for entry in table:  # the ways do the same work
        assert max(entry["losses"].values()) - min(entry["losses"].values()) < 1e-4 and entry["losses"]["pack"] > 1
    assert all(entry[way] > 0 and len(entry["speeds"][way]) == 1 for entry in table for way in cost_growth.WAYS)
    assert len((out / "cost_growth.md").read_text().splitlines()) == 8 and (out / "cost_growth.png").is_file()


@pytest.fixture
def measure_here(monkeypatch):
    """Runs benchmarks/gpu.py with its measurements in this process; those whose name is in the list fail."""
    broken = []

    def measured(config, job, seconds):
        if job.name in broken:
            return {"failed": "on purpose"}
        with quick():
            return {"figures": json.loads(json.dumps(gpu.KINDS[job.kind](config, job, Path(config.output_dir))))}

    monkeypatch.setattr(gpu, "measured", measured)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "true", *map(str, options)])
        gpu.main()

    return run, broken


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_decisions_are_measured_as_evaluate_does(kind, models, tmp_path, capsys):
    """Fitted here to the validation rows, and by evaluate.py --fit_decisions: the same metrics on the test rows."""
    few = ["--max_steps", "4", "--learning_rate", "1e-2", "--baselines", "true", "--max_baseline_samples", "1"]
    folder = tmp_path / "run"
    task = ["--model", models["llama"], "--approach", "head", *task_options(kind, tmp_path / "data")]
    train(*task, *few, "--output_dir", folder)
    run_evaluate("--run", folder, "--split", "validation")
    config = decisions.Config(run=str(folder), splits=3)
    text = decisions.measured(config, open_run(str(folder)))
    fitted = next(line for line in text.splitlines() if line.startswith("| model, fitted"))
    assert text.count("promise kept") == 2
    run_evaluate("--run", folder, "--fit_decisions", "true")
    run_evaluate("--run", folder)
    metrics = json.loads((folder / "eval/test/metrics.json").read_text())
    cells = [cell.split()[0] for cell in fitted.split("|")[2:-1]]
    names = (*decisions.MEASURED, *decisions.CALIBRATED)
    assert cells == [f"{metrics[name]:.3f}" for name in names]
    with pytest.raises(InputError, match="fitted decision"):
        decisions.check(open_run(str(folder)))


def test_the_first_hour_with_a_gpu_goes_on_where_it_was(tmp_path, measure_here, capsys):
    """Every line is kept as it comes; what is missing is measured in the next call, and nothing twice."""
    pytest.importorskip("trl", reason="a peer of the benchmark, in requirements-dev.txt")
    run, broken = measure_here
    broken.append("chat/tiny/lora/packing")
    run("--steps", "chat", "scoring", "--output_dir", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    names = [line["job"] for line in lines]
    assert names == [f"chat/tiny/lora/{way}" for way in ("packing", "trl_tuned", "plainlora")] + [
        f"scoring/tiny/bf16/{way}" for way in ("plainlora_answers", "plainlora", "generate")
    ]
    assert [line["job"] for line in lines if "failed" in line] == broken
    for line in lines[1:]:
        assert all(value > 0 for value in line["figures"].values()) and line["figures"]["peak memory MB"] > 100
    assert "chat/tiny/lora/packing: FAILED, on purpose" in capsys.readouterr().out

    with open(tmp_path / "gpu.jsonl", "a") as file:
        file.write('{"job": "cut sh')  # by a crash
    broken.clear()
    run("--steps", "chat", "scoring", "--output_dir", tmp_path)
    assert "chat/tiny/lora/packing: rows per second" in capsys.readouterr().out
    found = gpu.read(tmp_path / "gpu.jsonl")
    assert len(found) == 6 and (tmp_path / "gpu.jsonl").read_text().count("scoring/tiny/bf16/generate") == 1
    run("--steps", "chat", "--minutes", 0, "--again", "true", "--output_dir", tmp_path)
    assert capsys.readouterr().out.count("no time left in this step") == 3


def test_a_gpu_is_asked_for(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(InputError, match="There is no GPU here, or this torch has no CUDA. `--tiny true` tries"):
        gpu.main()


def test_operations_of_a_known_shape():
    """Llama-3.2-1B: 3.89 GFLOP per token in the layers, 1.05 per target in the vocabulary, and the adapter's."""
    tokens, targets = (gpu.flops_of("llama-1b", gpu.Counts(*counts)) for counts in ((1, 0, 0), (0, 0, 1)))
    assert tokens == pytest.approx(4 * 973e6 + 6 * 11.3e6, rel=1e-2) and targets == pytest.approx(1.05e9, rel=1e-2)
    assert gpu.flops_of("llama-1b", gpu.Counts(0, 1, 0)) == 12 * 16 * 2048
