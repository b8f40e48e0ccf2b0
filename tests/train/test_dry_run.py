"""A dry run makes real updates on the longest rows, and scales what it has measured by what the plan says."""

import inspect
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import train, train_chat, train_text
from helpers.scripts import ROOT

from common.options import LoopConfig
from common.text.plan import Plan
from common.train import dry_run, loop

SIZES = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "3"]


@pytest.fixture
def start(models, toy_files, chat_files):
    """script -> a function that runs it, with its data."""
    data = [part for split, path in toy_files.items() for part in (f"--{split}_file", path)]
    model = ["--model", models["llama"]]
    return {
        "train_cls": lambda *options: train(*model, *data, *options),
        "train_sft": lambda *options: train_chat(*model, *chat_files, *options),
        "train_clm": lambda *options: train_text(*model, "--max_train_samples", 30, "--test_fraction", 0.01,
                                                 "--validation_fraction", 0.01, *options),
    }  # fmt: skip


def test_the_update_is_that_of_the_scripts():
    """Line by line, but for what it writes down."""
    body = textwrap.dedent(inspect.getsource(dry_run._update))
    script = (ROOT / "train_cls.py").read_text().partition("# --- loop")[2].partition("# --- end loop")[0]
    known = {line.strip() for line in script.splitlines()}
    lines = [line.strip() for line in body.partition("started = ")[2].splitlines()[1:]]
    other = [line for line in lines if line and line not in known]
    assert [line.split("(")[0] for line in other] == [
        "micro_batches = loop.micro_batches", "names = ", "loop.finite_mean",
        "if torch.accelerator.is_available", "torch.accelerator.synchronize",
        "return time.perf_counter",
    ]  # fmt: skip
    kept = [line for line in lines if line in known]
    order = [line.strip() for line in script.splitlines()]
    assert kept == [line for line in order if line in kept] and "optimizer.step()" in kept


@pytest.mark.parametrize("script", ["train_cls", "train_sft", "train_clm"])
def test_disk_is_what_the_run_leaves_and_nothing_is_written(start, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    needs = start[script](*SIZES, "--max_steps", 9, "--dry_run", "true")
    if script == "train_clm":
        start[script]("--test_fraction", 0, "--max_steps", 1, "--dry_run", "true")
    assert list((tmp_path / "scratch").iterdir()) == [] and len(list(tmp_path.iterdir())) == 1
    start[script](*SIZES, "--max_steps", 9, "--output_dir", "run")
    left = [path for name in ("adapter", "checkpoints") for path in Path("run", name).rglob("*") if path.is_file()]
    assert needs["disk"] == pytest.approx(sum(path.stat().st_size for path in left), rel=0.01)
    assert needs["checkpoints"] == 3
    assert min(needs["memory"], needs["training"], needs["evaluation"], needs["saving"]) > 0
    output = capsys.readouterr().out
    assert "Prediction for the run" in output and "# Data report" in output and "| LoRA" in output


def test_the_longest_rows_are_trained_on_first(models, tmp_path, monkeypatch):
    """The longest micro-batch, not the update with the longest sum; twice, before those near the mean."""
    made = []
    real = dry_run._update
    monkeypatch.setattr(dry_run, "_update", lambda numbers, **rest: made.append(numbers) or real(numbers, **rest))
    rows = [{"text": "goal " * n, "label": label} for n in range(1, 60) for label in ("a", "b")]
    from helpers.rows import write_csv

    file = write_csv(tmp_path / "rows.csv", rows)
    train("--model", models["llama"], "--train_file", file, "--max_length", 128, "--dry_run", "true",
          "--per_device_train_batch_size", 2)  # fmt: skip
    lengths = [[len(rows[i]["text"]) for i in numbers] for numbers in made]
    assert made[0] == made[1] and len(made) == dry_run.LONGEST + dry_run.MOST
    assert max(map(max, lengths)) == max(lengths[0])


def test_tokens_of_all_updates_are_counted():
    """Exactly while they are few; else updates evenly spaced stand for all."""
    lengths = np.arange(1, 41)
    plan = Plan(lengths, 4, seed=1)

    def padded(numbers: list[int]) -> int:
        return int(lengths[numbers].max()) * len(numbers)

    longest, usual, tokens = dry_run._choose(plan, 20, 4, padded)
    assert tokens == sum(map(padded, plan.updates(0, 20)))
    assert padded(longest) == max(map(padded, plan.updates(0, 20)))
    sizes, every = [[padded(numbers) for numbers in some] for some in (usual, plan.updates(0, 20))]
    assert len(sizes) == dry_run.MOST and np.mean(sizes) == pytest.approx(tokens / 20, rel=0.05)
    assert min(sizes) <= sorted(every)[1] and max(sizes) >= sorted(every)[-2]
    assert sorted(map(padded, dry_run._choose(plan, 3, 4, padded)[1])) == sorted(map(padded, plan.updates(0, 3)))
    many = 3000
    about = dry_run._choose(plan, many, 4, padded)[2]
    assert about == pytest.approx(sum(map(padded, plan.updates(0, many))), rel=0.03)


def test_an_evaluation_is_scaled_by_its_tokens(monkeypatch):
    """The longest rows come first; the time is that of rows evenly spaced, a token's seconds times all tokens."""
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def measure(rows: list[int]) -> None:
        calls.append(rows)
        clock[0] += sum(rows) / 100

    rows = list(range(1, 1001))
    seconds = dry_run._evaluate(dry_run.Evaluation(rows, measure, rows), 16, times=2.5)
    assert sorted(calls[0]) == rows[-16:] and len(calls[1]) == 64
    assert seconds == pytest.approx(2.5 * sum(rows) / 100)
    assert dry_run._evaluate(dry_run.Evaluation([], measure, []), 16, times=1) == 0


def test_what_is_due_is_counted_as_in_the_loop():
    plan = Plan([1] * 40, 4, seed=1)
    assert [dry_run._due(*how, plan, 25) for how in (("no", None), ("epoch", None), ("steps", 4))] == [0, 3, 7]
    assert loop.total_updates(LoopConfig(num_train_epochs=2.5), plan.updates_per_epoch) == 25


def test_slow_updates_are_few(start, monkeypatch):
    """Once they have taken long enough, three usual ones do."""
    made = []
    monkeypatch.setattr(dry_run, "_update", lambda numbers, **_: made.append(numbers) or 15.0)
    needs = start["train_cls"]("--dry_run", "true", "--max_steps", 100)
    assert len(made) == dry_run.LONGEST + dry_run.LEAST
    assert needs["training"] == pytest.approx(100 * 15, rel=0.2)


def test_a_failed_dry_run_leaves_nothing(start, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(dry_run, "_update", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start["train_cls"]("--dry_run", "true")
    assert list(tmp_path.iterdir()) == []
