"""The benchmarks run, and other trainers reach the losses of ours on the same rows: the strictest check of the loop."""

import json

import pytest
from conftest import run_script, toy_rows, write_csv


def test_other_trainers_reach_the_same_losses(models, tmp_path):
    pytest.importorskip("trl", reason="a peer of the benchmark, in requirements-dev.txt")
    rows = write_csv(tmp_path / "rows.csv", toy_rows(100))
    few = ["--rounds", "1", "--warmup", "1", "--updates", "1", "--output_dir", str(tmp_path / "out")]
    peers = ["--trainers", "plainlora", "plain_loop", "hf_trainer", "trl_tuned"]
    task = ["--model", str(models["llama"]), "--train_file", str(rows)]
    run_script("benchmarks/train_speed.py", *task, *few, *peers, timeout=900)
    [file] = (tmp_path / "out").glob("*.json")
    table = json.loads(file.read_text())["table"]
    assert [entry["trainer"] for entry in table] == peers[1:]
    for entry in table:
        assert entry["largest_loss_difference"] < 1e-4 and entry["ratio_of_plainlora"] > 0
    assert (tmp_path / "out" / f"{file.stem}.md").is_file() and (tmp_path / "out" / f"{file.stem}.png").is_file()


def test_profile_of_a_step(models):
    shown = run_script("benchmarks/step_profile.py", "--model", str(models["qwen"]), "--rounds", "1").stdout
    assert len([line for line in shown.splitlines() if line.startswith("| + ")]) == 3
