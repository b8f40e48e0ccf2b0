"""What survives a kill: checkpoints, the best weights, run folders; and what a resumed run makes of them."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from helpers import ROOT
from helpers.models import FAMILIES
from helpers.rows import toy_options, toy_rows, write_csv
from helpers.runs import FAMILY_APPROACHES, PLAIN, Stopped, log_lines, stop_at, timeless, train, weights
from helpers.scripts import run_script

import train_cls
from common import disk
from common.data.classification import load_classification
from common.errors import InputError, cli_errors
from common.measure import scoring
from common.model import storage
from common.options import parse_config
from common.train import checkpoints, loop, run_folder, seeds
from common.train.checkpoints import State

# Updates of 4, 4 and 3 rows, so that checkpoints 2 and 4 are mid-epoch and 6 is an epoch's end. Dropout draws random
# numbers; the loss decides what is best, so that adapter/ is replaced more than once.
RESUMABLE = ["--num_train_epochs", 3, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2,
             "--lora_dropout", 0.2, "--save_strategy", "steps", "--save_steps", 2, "--learning_rate", 2e-3,
             "--metric_for_best_model", "eval_loss"]  # fmt: skip
SAVED = ["--save_strategy", "steps", "--save_steps", 1, "--num_train_epochs", 1]

# Runs jobs, each in a process of its own forked after the imports, which take longer than the jobs. A job may send
# itself a signal in place of call number `call` of a function, counting those whose arguments contain `text`.
JOBS = """
import gc, importlib, json, os, signal, sys
sys.path[:0] = [sys.argv[1]]
import torch
import train_cls
from common.measure import baselines
from common.train import checkpoints
from common.text import batches
from common.train import loop
from common.model import base_model
from common.measure import figures
from common.measure import scoring
from common.model import storage
from common.errors import cli_errors

def signal_at(number, owner, name, call, text=""):
    real, calls, owner = getattr(importlib.import_module(owner), name), [], importlib.import_module(owner)
    def limited(*args, **kwargs):
        if text in str(args):
            calls.append(args)
            if len(calls) == call:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)
    setattr(owner, name, limited)

def run(job):
    os.dup2(os.open(job["output"], os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    figures.can_draw = lambda: False
    if job["signal"]:
        signal_at(*job["signal"])
    sys.argv = ["train_cls.py", *job["options"]]
    with cli_errors(train_cls.RESUME_HINT):
        train_cls.main()

gc.freeze()
results = []
for job in json.loads(open(sys.argv[2]).read()):
    child = os.fork()
    if not child:
        code = 1
        try:
            run(job)
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    folder = job["folder"] + "/checkpoints"
    results.append([status, sorted(os.listdir(folder)) if os.path.isdir(folder) else []])
print(json.dumps(results))
"""
KILL = 9
STOPS = {2: ("Ctrl-C", 130), 15: ("SIGTERM", 143)}
DURING = {  # where a run is killed while it writes
    "llama": ["accelerate.checkpointing", "save", 2],  # in save_state of step 4: weights are there, the rest is not
    "mistral": ["common.train.checkpoints", "replace_folder", 1, "step_4"],  # complete, but not yet under its name
    "gemma": ["os", "rename", 2, ".adapter.tmp"],  # the old adapter is moved away, the new one not yet there
    "qwen": ["shutil", "rmtree", 1, "checkpoints/step_2'"],  # an old checkpoint is half deleted
}


@pytest.fixture(scope="module")
def killed(models, tmp_path_factory) -> dict[str, tuple]:
    """name -> (exit status, entries of checkpoints/, output) of the jobs; their runs are in killed["folder"]."""
    folder = tmp_path_factory.mktemp("killed")
    files = {"train": toy_rows(4)[:11], "validation": toy_rows(2, start=20), "test": toy_rows(2, start=30)}
    data = toy_options({split: str(write_csv(folder / f"{split}.csv", rows)) for split, rows in files.items()})
    jobs = {}

    def add(name: str, run: str, *options: object, signal: list | None = None) -> None:
        options = [*PLAIN, *common, *data, *RESUMABLE, *options, "--output_dir", folder / run]
        jobs[name] = {"options": [str(option) for option in options], "signal": signal, "folder": str(folder / run)}
        jobs[name]["output"] = str(folder / f"{name}.txt")

    latest = ["--resume_from_checkpoint", "latest"]
    for family, approach in FAMILY_APPROACHES:
        common = ["--model", models[family], "--approach", approach]
        add(f"{family} straight", f"{family}_straight")
        add(f"{family} update 4", f"{family}_killed", signal=[KILL, "common.train.loop", "finite_mean", 4])
        add(f"{family} update 7", f"{family}_killed", *latest, signal=[KILL, "common.train.loop", "finite_mean", 5])
        add(f"{family} resumed", f"{family}_killed", *latest)
        limit = ["--save_total_limit", 1] if family == "qwen" else []
        add(f"{family} writing", f"{family}_writing", *limit, signal=[KILL, *DURING[family]])
        add(f"{family} written", f"{family}_writing", *limit, *latest)
    for number in STOPS:
        add(f"{family} signal {number}", f"stopped_{number}", signal=[number, "common.train.loop", "finite_mean", 5])
        add(f"{family} after {number}", f"stopped_{number}", *latest)
    script, list_file = folder / "jobs.py", folder / "jobs.json"
    script.write_text(JOBS)
    list_file.write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, str(script), str(ROOT), str(list_file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    results = {
        name: (*entry, Path(job["output"]).read_text()) for (name, job), entry in zip(jobs.items(), found, strict=True)
    }
    return {**results, "folder": folder}


def assert_same_run(one: Path, other: Path) -> None:
    """Every number of the two runs is the same to the last bit: losses, evaluations, adapter, optimizer."""
    assert log_lines(one) == log_lines(other)
    assert log_lines(one, "eval_loss") == log_lines(other, "eval_loss")
    first, second = (json.loads((run / "eval/test/metrics.json").read_text()) for run in (one, other))
    assert timeless(first) == timeless(second)
    before, after = weights(one / "adapter"), weights(other / "adapter")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    states = [torch.load(run / "checkpoints/step_9/optimizer.bin")["state"] for run in (one, other)]
    assert all(torch.equal(states[0][i]["exp_avg_sq"], states[1][i]["exp_avg_sq"]) for i in states[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_and_resumed_run_is_the_uninterrupted_one(killed, family):
    """SIGKILL in updates 4 and 7, resumed mid-epoch and at an epoch's end: equal bit for bit."""
    assert killed[f"{family} straight"][0] == 0, killed[f"{family} straight"][2][-3000:]
    assert killed[f"{family} update 4"][:2] == (-KILL, ["step_2"])
    assert killed[f"{family} update 7"][:2] == (-KILL, ["step_2", "step_4", "step_6"])
    assert killed[f"{family} resumed"][0] == 0, killed[f"{family} resumed"][2][-3000:]
    assert_same_run(killed["folder"] / f"{family}_straight", killed["folder"] / f"{family}_killed")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kill_while_writing_costs_nothing_good(killed, family):
    """The issue: what is half written never replaces or shadows what is whole; resumed, the run ends as ever."""
    status, entries, output = killed[f"{family} writing"]
    left = {
        "llama": [".step_4.tmp", "step_2"],
        "mistral": [".step_4.tmp", "step_2"],
        "gemma": ["step_2", "step_4"],
        "qwen": ["step_2", "step_4"],  # step_2 without state.json
    }
    assert (status, entries) == (-KILL, left[family]), output[-3000:]
    status, entries, output = killed[f"{family} written"]
    resumed_from = {"llama": 2, "mistral": 2, "gemma": 4, "qwen": 4}
    assert f"from step_{resumed_from[family]}\n" in output
    assert status == 0, output[-3000:]
    assert_same_run(killed["folder"] / f"{family}_straight", killed["folder"] / f"{family}_writing")


@pytest.mark.parametrize("number", STOPS)
def test_a_stopped_run_finishes_its_update_and_saves(killed, number):
    """Ctrl-C and SIGTERM in update 5: a checkpoint that no option asks for, from which the run ends as ever."""
    status, entries, output = killed[f"qwen signal {number}"]
    name, code = STOPS[number]
    assert status == code and entries == ["step_2", "step_4", "step_5"], output[-3000:]
    assert f"Stopped by {name}" in output and "--resume_from_checkpoint latest" in output and "Traceback" not in output
    status, _, output = killed[f"qwen after {number}"]
    assert status == 0 and "from step_5\n" in output, output[-3000:]
    assert_same_run(killed["folder"] / "qwen_straight", killed["folder"] / f"stopped_{number}")


# The last of several processes gets one signal two times, from a terminal and from torchrun.
STOP_THE_LAST = """
import os, signal, sys
sys.path[:0] = [sys.argv.pop(1)]
import train_cls
from common.errors import cli_errors
from common.measure import figures
from common.train import loop

real, calls = loop.finite_mean, []
def counted(*args):
    calls.append(args)
    if len(calls) == 5 and os.environ["RANK"] == "1" and "latest" not in sys.argv:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)
loop.finite_mean, figures.can_draw = counted, lambda: False
with cli_errors(train_cls.RESUME_HINT):
    train_cls.main()
"""


def test_a_signal_to_one_of_two_processes_stops_both(models, toy_files, tmp_path):
    """After the same update, with a checkpoint, from which two processes go on, the first two with a sharded base."""
    (tmp_path / "two.py").write_text(STOP_THE_LAST)
    options = ["--model", models["llama"], *toy_options(toy_files), *PLAIN, "--num_train_epochs", 4, "--output_dir"]
    two = partial(run_script, tmp_path / "two.py", str(ROOT), *map(str, options), str(tmp_path / "run"), processes=2)
    found = two("--shard_model", "true", timeout=120, check=False)
    assert "The base is sharded" in found.stdout
    assert found.returncode and "exitcode  : 143" in found.stderr, found.stderr[-3000:]
    assert found.stderr.count("Stopped by SIGTERM") == 1 and "checkpoint" in found.stderr
    assert "step_5" in [folder.name for folder in (tmp_path / "run/checkpoints").iterdir()]
    assert "from step_5\n" in two("--resume_from_checkpoint", "latest", timeout=120).stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_holds_no_base_weights(killed, models, family):
    """accelerate's save_state would write the whole model with every checkpoint."""
    folder = killed["folder"] / f"{family}_straight" / "checkpoints" / "step_9"
    names = list(weights(folder / "weights"))
    assert names and all("lora_" in name or "score" in name for name in names)
    trained = sum(tensor.numel() for tensor in weights(folder / "weights").values())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 4 * 3 * trained + 60_000  # weights and two moments in fp32; random states, options and names
    assert size < (models[family] / "model.safetensors").stat().st_size


@pytest.fixture
def options(models, toy_files) -> dict[str, list]:
    """family -> model, approach and data."""
    return {
        family: ["--model", models[family], "--approach", approach, *toy_options(toy_files)]
        for family, approach in FAMILY_APPROACHES
    }


def interrupt(update: int, *given: object) -> None:
    """A run that ends within update number `update`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, loop, "finite_mean", update)
        train(*given)


def scripted(monkeypatch: pytest.MonkeyPatch, metric: str, scores: list[float]) -> list[dict]:
    """Lets the validations have these scores one after the other; returns the list of what they really measured."""
    real, measured = train_cls.evaluate, []

    def evaluate(predict, classifier, examples, *, what, **others):
        answers, metrics = real(predict, classifier, examples, what=what, **others)
        if what != "validation":
            return answers, metrics
        measured.append(metrics)
        return answers, {**metrics, metric: scores[len(measured) - 1]}

    monkeypatch.setattr(train_cls, "evaluate", evaluate)
    return measured


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_update_after_a_resume_is_the_next(options, tmp_path, monkeypatch, family):
    """The option really takes effect; nothing is done twice and nothing left out."""
    run = [*options[family], *SAVED, "--save_steps", 2, "--output_dir", tmp_path]
    interrupt(4, *run)
    real, updates = loop.finite_mean, []
    monkeypatch.setattr(loop, "finite_mean", lambda *args: updates.append(args[-2] + 1) or real(*args))
    train(*run, "--resume_from_checkpoint", "latest")
    assert updates == [3, 4, 5, 6]
    assert [line["update"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_run_is_not_resumed(options, toy_files, tmp_path, family):
    """A changed option, rows per update, file or template is named; what counts no row may change."""
    own = write_csv(tmp_path / "own.csv", toy_rows(14))
    template = tmp_path / "template.txt"
    template.write_text("{text}")
    run = [*options[family], "--train_file", own, *SAVED, "--output_dir", tmp_path / "run"]
    run += ["--prompt_template", template] if "head" in run else []
    interrupt(3, *run)
    run += ["--resume_from_checkpoint", "latest"]
    with pytest.raises(InputError, match="learning_rate was 0.001, is 0.002"):
        train(*run, "--learning_rate", 2e-3)
    with pytest.raises(InputError, match="rows_per_update was 8, is 16"):
        train(*run, "--gradient_accumulation_steps", 2)
    write_csv(own, toy_rows(14, start=1))
    with pytest.raises(InputError, match=r"content of \S+own.csv was [0-9a-f]{12}, is [0-9a-f]{12}"):
        train(*run)
    write_csv(own, toy_rows(14))
    if "head" in run:
        template.write_text("a text: {text}")
        with pytest.raises(InputError, match="prompt was"):
            train(*run)
        template.write_text("{text}")
    train(*run, "--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 4, "--logging_steps", 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_without_a_checkpoint_starts_anew(options, tmp_path, family):
    """Killed before its first checkpoint, a run begins again, with the options of now; old baselines are forgotten."""
    common = [*options[family], "--num_train_epochs", 1, "--lora_dropout", 0.2, "--baselines", "true"]
    interrupt(3, *common, "--seed", 1, "--output_dir", tmp_path / "again")
    baselines = tmp_path / "again" / "eval" / "test" / "baselines.json"
    disk.write_json(baselines, {})
    train(*common, "--seed", 2, "--output_dir", tmp_path / "again", "--resume_from_checkpoint", "latest")
    train(*common, "--seed", 2, "--output_dir", tmp_path / "straight")
    assert log_lines(tmp_path / "again") == log_lines(tmp_path / "straight")
    saved = (tmp_path / "again" / "config.yaml").read_text()
    assert "seed: 2" in saved and "resume_from_checkpoint" not in saved  # `--config` makes another run of it
    measured = disk.read_json(tmp_path / "straight" / "eval" / "test" / "baselines.json")
    assert disk.read_json(baselines).keys() == measured.keys() and measured


@pytest.mark.parametrize("family", FAMILIES)
def test_baselines_do_not_change_the_training(options, tmp_path, family):
    """They are no part of what a checkpoint must agree with, so they must not draw from its random numbers."""
    common = [*options[family], "--max_steps", 3, "--lora_dropout", 0.2]
    for baselines in ("true", "false"):
        train(*common, "--baselines", baselines, "--output_dir", tmp_path / baselines)
    assert log_lines(tmp_path / "true") == log_lines(tmp_path / "false")


@pytest.mark.parametrize(("metric", "scores"), [("f1_macro", [0.1, 0.9, 0.2]), ("eval_loss", [3.0, 1.0, 2.0])])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_is_the_best_by_the_named_metric(options, tmp_path, monkeypatch, family, metric, scores):
    """Neither the first nor the last weights; measured again after a reload, the difference is 0."""
    measured = scripted(monkeypatch, metric, scores)
    given = [*options[family], "--metric_for_best_model", metric, "--output_dir", tmp_path, "--save_total_limit", 1]
    data = options[family][options[family].index("--validation_file") + 1]
    train(*given, "--test_file", data, "--learning_rate", 5e-3)
    final = json.loads((tmp_path / "eval/test/metrics.json").read_text())
    assert {name: final[name] for name in timeless(measured[1])} == json.loads(json.dumps(timeless(measured[1])))
    assert final["eval_loss"] not in (measured[0]["eval_loss"], measured[2]["eval_loss"])
    # --save_total_limit 1 keeps best and last
    assert [folder.name for folder in run_folder.list_checkpoints(tmp_path)] == ["step_12", "step_18"]

    config = parse_config(train_cls.Config, [*PLAIN, *map(str, given), "--test_file", str(data)])
    from accelerate import Accelerator

    classifier = storage.load_classifier(tmp_path / "adapter")
    rows = load_classification(config).splits["test"]
    predict = partial(scoring.predict, accelerator=Accelerator(cpu=True), batch_size=16)
    _, metrics = train_cls.evaluate(predict, classifier, rows, what="test")
    assert metrics["eval_loss"] == final["eval_loss"] and metrics["f1_macro"] == final["f1_macro"]


@pytest.mark.parametrize("family", FAMILIES)
def test_early_stopping_survives_a_resume(options, tmp_path, monkeypatch, family):
    """Best score and patience are part of the state: two evaluations without a gain stop the run, before and after."""
    run = [*options[family], "--early_stopping_patience", 2, "--num_train_epochs", 5, "--output_dir", tmp_path]
    with monkeypatch.context() as patch:
        scripted(patch, "f1_macro", [0.5, 0.4])
        interrupt(14, *run)
    resumed = [*run, "--resume_from_checkpoint", "latest"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        assert len(scripted(patch, "f1_macro", [0.45, 0.9])) == 0
        stop_at(patch, storage, "load_weights", 1)  # after the loop: killed before the final evaluation
        train(*resumed)
    assert [line["update"] for line in log_lines(tmp_path, "f1_macro")] == [6, 12, 18]
    train(*resumed)
    assert len(log_lines(tmp_path)) == 18  # not one update more
    assert log_lines(tmp_path, "train_loss")[-1]["epochs"] == 3


def test_a_score_that_is_no_number_is_not_the_best():
    state = State()
    assert not state.improves("eval_loss", {"eval_loss": float("nan")})
    assert state.improves("eval_loss", {"eval_loss": 2.0}) and state.best_score == -2.0
    assert not state.improves("eval_loss", {"eval_loss": float("nan")})
    assert state.improves("eval_loss", {"eval_loss": 1.0}) and state.stale_evaluations == 0
    with pytest.raises(InputError, match="--metric_for_best_model f1_macro was not measured. There are eval_loss"):
        state.improves("f1_macro", {"eval_loss": 1.0})


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, 1, [1, 2, 3, 4]),
        (1, 2, [2, 4]),
        (2, 4, [3, 4]),
        (2, 1, [1, 4]),
        (3, None, [2, 3, 4]),
        (5, None, [1, 2, 3, 4]),
    ],
)
def test_pruning_keeps_best_and_last(tmp_path, limit, best, left):
    for number in (1, 2, 3, 4):
        (tmp_path / "checkpoints" / f"step_{number}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{number}" / "state.json").write_text("{}")
    checkpoints._prune(tmp_path, State(update=4, best_update=best), limit)
    assert [folder.name for folder in run_folder.list_checkpoints(tmp_path)] == [f"step_{number}" for number in left]


def test_a_half_deleted_checkpoint_is_none(tmp_path, monkeypatch):
    test_pruning_keeps_best_and_last(tmp_path, None, None, [1, 2, 3, 4])
    stop_at(monkeypatch, checkpoints.shutil, "rmtree", 1)
    with pytest.raises(Stopped):
        checkpoints._prune(tmp_path, State(update=4), 2)
    assert [folder.name for folder in run_folder.list_checkpoints(tmp_path)] == ["step_2", "step_3", "step_4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_comes_back_though_nothing_better_follows(options, tmp_path, monkeypatch, family):
    """Killed between the two renames of a better adapter that, once resumed, turns out no better."""
    run = [*options[family], *SAVED, "--num_train_epochs", 2, "--output_dir", tmp_path]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        scripted(patch, "f1_macro", [0.5, 0.9])
        stop_at(patch, disk.os, "rename", 2, text=".adapter.tmp")
        train(*run)
    assert not (tmp_path / "adapter").exists()
    first = weights(tmp_path / ".adapter.old")
    scripted(monkeypatch, "f1_macro", [0.4])
    train(*run, "--resume_from_checkpoint", "latest")
    last = weights(tmp_path / "adapter")
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_best_weights_that_a_resumed_run_does_not_find_again_are_not_its_best(options, tmp_path, monkeypatch):
    """As on a GPU, where an update is not the same twice: killed with 0.9 kept and not yet in a checkpoint."""
    run = [*options["llama"], *SAVED, "--num_train_epochs", 2, "--output_dir", tmp_path]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        scripted(patch, "f1_macro", [0.5, 0.9])
        stop_at(patch, checkpoints, "save_checkpoint", 12)
        train(*run)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    scripted(monkeypatch, "f1_macro", [0.4])
    train(*run, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns > before
    state = json.loads((tmp_path / "checkpoints" / "step_12" / "state.json").read_text())["state"]
    assert (state["best_score"], state["best_update"]) == (0.4, 12)


def test_a_folder_is_whole_at_every_moment_of_its_replacement(tmp_path, monkeypatch):
    """Stopped between the two renames, the old folder comes back; a second replacement does not delete it first."""
    target, new = tmp_path / "adapter", tmp_path / "new"
    target.mkdir()
    (target / "task.json").write_text("old")
    new.mkdir()
    (new / "task.json").write_text("new")
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_at(patch, disk.os, "rename", 3 if (tmp_path / ".adapter.old").exists() else 2)
            disk.replace_folder(new, target)
        assert not target.exists()
    assert (disk.weights_folder(tmp_path) / "task.json").read_text() == "old"
    disk.replace_folder(new, target)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"] and (target / "task.json").read_text() == "new"


def run_main(monkeypatch: pytest.MonkeyPatch, *given: object) -> int:
    """The exit code of `python train_cls.py`, in this process."""
    monkeypatch.setattr(sys, "argv", ["train_cls.py", *PLAIN, *map(str, given)])
    try:
        with cli_errors(train_cls.RESUME_HINT):
            train_cls.main()
    except SystemExit as error:
        return error.code
    return 0


def test_nothing_to_resume_is_an_error(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *options["llama"], "--resume_from_checkpoint", "latest") == 2
    assert "no unfinished run with these options" in capsys.readouterr().err
    (tmp_path / "half").mkdir()
    assert run_main(monkeypatch, *options["llama"], "--resume_from_checkpoint", "half") == 2
    assert "half is neither a run nor a checkpoint folder" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_latest_is_the_newest_unfinished_run_with_these_options(options, tmp_path, monkeypatch, capsys, family):
    monkeypatch.chdir(tmp_path)
    run = [*options[family], *SAVED, "--max_steps", 3]
    interrupt(3, *run)
    interrupt(3, *run, "--seed", 7)
    train(*run)  # run_3, finished
    assert run_main(monkeypatch, *run, "--resume_from_checkpoint", "latest", "--output_dir", "other") == 2
    found = next(Path("outputs").glob("*/*/run_1"))
    assert run_main(monkeypatch, *run, "--resume_from_checkpoint", found, "--output_dir", "other") == 2
    assert "drop --output_dir" in capsys.readouterr().err
    train(*run, "--resume_from_checkpoint", "latest")
    finished = ["finished" in (found.parent / f"run_{i}" / "environment.json").read_text() for i in (1, 2, 3)]
    assert finished == [True, False, True]
    with pytest.raises(InputError, match="no unfinished run"):
        train(*run, "--resume_from_checkpoint", "latest")
    with pytest.raises(InputError, match="is finished"):
        train(*run, "--resume_from_checkpoint", found)


def test_runs_started_together_get_folders_of_their_own(tmp_path, monkeypatch):
    """Both see no run yet; the second finds run_1 taken when it makes it."""
    monkeypatch.chdir(tmp_path)
    config = parse_config(train_cls.Config, ["--train_file", "a.csv"])
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    assert [run_folder.new_run_folder(config).name for _ in range(3)] == ["run_1", "run_2", "run_3"]


def test_a_new_run_does_not_overwrite_an_old_one(options, tmp_path, monkeypatch, capsys):
    for folder in (tmp_path / "one", tmp_path / "several" / "seed_2"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("seed: 2")
    assert run_main(monkeypatch, *options["llama"], "--output_dir", tmp_path / "one") == 2
    assert run_main(monkeypatch, *options["llama"], "--output_dir", tmp_path / "several", "--seeds", 1, 2) == 2
    assert capsys.readouterr().err.count("already holds a run") == 2
    assert [path.name for path in (tmp_path / "several").iterdir()] == ["seed_2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_failed_seed_keeps_the_others(options, tmp_path, monkeypatch, family):
    """One run folder and one row a seed; the exit code tells that one is missing."""
    stop_at(monkeypatch, loop, "finite_mean", 2, ValueError("bad luck"))
    run = [*options[family], "--max_steps", 3, "--seeds", 1, 2, 3, "--output_dir", tmp_path]
    assert run_main(monkeypatch, *run) == 1
    table = (tmp_path / "seeds.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:6]] == ["1", "2", "3", "mean ± sd"]
    assert table.count("failed") > 1 and "Seed 1 failed: ValueError: bad luck" in table
    assert [(tmp_path / f"seed_{seed}" / "adapter").is_dir() for seed in (1, 2, 3)] == [False, True, True]
    two, three = (weights(tmp_path / f"seed_{seed}" / "adapter") for seed in (2, 3))
    assert any(not torch.equal(two[name], three[name]) for name in two)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dry_run_writes_nothing(options, tmp_path, monkeypatch, capsys, family):
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *options[family], "--dry_run", "true") == 0
    assert "18 updates of 8 rows" in capsys.readouterr().out
    assert run_main(monkeypatch, *options[family], "--dry_run", "true", "--seeds", 1, 2, "--output_dir", "out") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "x.bin"), RuntimeError("unexpected pos 576")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_disk_is_named(options, tmp_path, monkeypatch, capsys, family, error):
    """torch reports it as a RuntimeError, safetensors by an error of its own; the last checkpoint stays."""
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 4096))
    stop_at(monkeypatch, checkpoints, "save_weights", 2, error)
    assert run_main(monkeypatch, *options[family], *SAVED, "--output_dir", tmp_path) == 2
    message = capsys.readouterr().err
    assert "error: no space left on the disk while writing" in message and "Traceback" not in message
    assert "--resume_from_checkpoint latest" in message
    assert [folder.name for folder in run_folder.list_checkpoints(tmp_path)] == ["step_1"]


def test_another_failure_of_saving_is_not_called_a_full_disk(options, tmp_path, monkeypatch):
    stop_at(monkeypatch, checkpoints, "save_weights", 1, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        train(*options["qwen"], *SAVED, "--output_dir", tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_line_of_the_log_does_not_hinder_a_resume(options, tmp_path, family):
    """A full disk can cut metrics.jsonl within a line."""
    run = [*options[family], *SAVED, "--max_steps", 4, "--output_dir", tmp_path]
    interrupt(4, *run)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"update": 3, "split"')
    train(*run, "--resume_from_checkpoint", "latest")
    assert [line["update"] for line in log_lines(tmp_path)] == [1, 2, 3, 4]


def test_a_damaged_later_checkpoint_costs_no_good_one(tmp_path):
    """After a resume from step 4, since step 8 was damaged: with a limit of 1, step 6 stays."""
    for step in (4, 6, 8):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{step}" / "state.json").write_text("{}")
    checkpoints._prune(tmp_path, State(update=6), 1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_6", "step_8"]


def test_a_folder_that_another_run_has_taken_meanwhile_is_left_alone(options, tmp_path, monkeypatch):
    """Between the look at --output_dir and the lock, that run may have come to its end."""
    given = [*options["llama"], "--max_steps", 1, "--output_dir", tmp_path / "run"]
    real = run_folder.lock

    def late(path: Path, what: str) -> object:
        (path.parent / "config.yaml").write_text("seed: 7")
        return real(path, what)

    monkeypatch.setattr(run_folder, "lock", late)
    with pytest.raises(InputError, match="already holds a run, which another process has made"):
        train(*given)
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 7"


def test_sigterm_after_early_stopping_ends_the_run(options, tmp_path, monkeypatch):
    """The loop gives the signals back when it ends early, too."""
    handlers = []
    real = train_cls.evaluate

    def evaluate(predict, classifier, examples, *, what, **others):
        handlers.append((what, signal.getsignal(signal.SIGTERM)))
        return real(predict, classifier, examples, what=what, **others)

    monkeypatch.setattr(train_cls, "evaluate", evaluate)
    before = signal.getsignal(signal.SIGTERM)
    stopping = ["--eval_strategy", "steps", "--eval_steps", 1, "--early_stopping_patience", 1, "--learning_rate", 1e-12]
    train(*options["llama"], *stopping, "--output_dir", tmp_path / "run")
    assert len(log_lines(tmp_path / "run", "eval_loss")) == 2  # it did end early
    assert dict(handlers)["test"] is before and dict(handlers)["validation"] is not before


def test_a_failure_of_one_of_several_processes_ends_them_all(monkeypatch):
    """The others may wait for it; alone, the next run is made."""
    for processes in (1, 2):
        monkeypatch.setattr(accelerate, "PartialState", lambda: SimpleNamespace(num_processes=processes))  # noqa: B023
        results: dict = {}
        ends = contextlib.nullcontext() if processes == 1 else pytest.raises(InputError)
        with ends, seeds._continue_after_failure(results, 3, True):
            raise InputError("broken")
        assert results == ({3: "failed: InputError: broken"} if processes == 1 else {})
