"""What survives a kill: checkpoints, the best weights, run folders; and what a resumed run makes of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.checkpointing import save_accelerator_state
from conftest import FAMILIES, ROOT, toy_options, toy_rows, write_csv
from runs import (  # noqa: F401
    FAMILY_APPROACHES,
    PLAIN,
    Stopped,
    fresh_accelerator,
    log_lines,
    stop_at,
    timeless,
    train,
    weights,
)

import train_cls
from common import checkpoint, loop, modeling, rundir
from common.checkpoint import State
from common.config import InputError, cli_errors, parse_config
from common.data import load_classification

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
from common import baselines, checkpoint, collate, loop, modeling, report, scoring
from common.config import cli_errors

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
    report.can_draw = lambda: False
    if job["signal"]:
        signal_at(*job["signal"])
    sys.argv = ["train_cls.py", *job["options"]]
    with cli_errors():
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
DURING = {  # where a run is killed while it writes
    "llama": ["accelerate.checkpointing", "save", 3],  # in save_state of step 4: weights are there, the rest is not
    "mistral": ["common.checkpoint", "replace_folder", 1, "step_4"],  # complete, but not yet under its name
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
        add(f"{family} update 4", f"{family}_killed", signal=[KILL, "common.loop", "finite_mean", 4])
        add(f"{family} update 7", f"{family}_killed", *latest, signal=[KILL, "common.loop", "finite_mean", 5])
        add(f"{family} resumed", f"{family}_killed", *latest)
        limit = ["--save_total_limit", 1] if family == "qwen" else []
        add(f"{family} writing", f"{family}_writing", *limit, signal=[KILL, *DURING[family]])
        if family == "gemma":
            jobs["gemma writing"]["copy"] = 1
        add(f"{family} written", f"{family}_writing", *limit, *latest)
    add("Ctrl-C", "interrupted", signal=[2, "common.loop", "finite_mean", 4])
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
    """CORRECTNESS 11: SIGKILL in updates 4 and 7, resumed mid-epoch and at an epoch's end: equal bit for bit."""
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


def test_ctrl_c_ends_with_a_message(killed):
    status, entries, output = killed["Ctrl-C"]
    assert status == 130 and entries == ["step_2"]
    assert "Stopped by Ctrl-C" in output and "Traceback" not in output


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_holds_no_base_weights(killed, models, family):
    """accelerate's save_state would write the whole model with every checkpoint."""
    folder = killed["folder"] / f"{family}_straight" / "checkpoints" / "step_9"
    names = list(weights(folder / "weights"))
    assert names and all("lora_" in name or "score" in name for name in names)
    trained = sum(tensor.numel() for tensor in weights(folder / "weights").values())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 4 * 3 * trained + 60_000  # weights and two moments in fp32; random states, options and names
    assert not list(folder.rglob("model*")) and (models[family] / "model.safetensors").exists()
