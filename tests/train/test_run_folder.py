"""A run folder belongs to one run: nothing of a user's is replaced, two runs never share it, damage is seen."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.rows import toy_options
from helpers.runs import Stopped, log_lines, run_evaluate, stop_at, train

from common import disk
from common.errors import InputError
from common.train import loop, run_folder

SAVED = ["--save_strategy", "steps", "--save_steps", 1, "--max_steps", 4, "--lora_dropout", 0.2]
LATEST = ["--resume_from_checkpoint", "latest"]


@pytest.fixture
def options(models, toy_files) -> list:
    return ["--model", models["llama"], *toy_options(toy_files), *SAVED]


@pytest.fixture
def interrupted(options, tmp_path) -> Path:
    """A run that was killed in its last update; checkpoints of the first three are there."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, loop, "finite_mean", 4)
        train(*options, "--output_dir", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", run_folder.WRITTEN)
def test_what_a_user_has_in_the_folder_is_not_replaced(options, tmp_path, name):
    """Refused before anything is loaded; what a run itself writes there is in the list."""
    mine = tmp_path / name / "mine.txt" if "." not in name else tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    config = type("Config", (), {"output_dir": str(tmp_path)})
    with pytest.raises(InputError, match=rf"there is {name} already"):
        run_folder.check_output_dir(config)
    assert mine.read_text() == "mine"


def test_all_that_a_run_writes_is_known(options, tmp_path):
    run = tmp_path / "run"
    train(*options, "--output_dir", run, "--report_to", "tensorboard")
    visible = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert visible - {"config.yaml"} <= set(run_folder.WRITTEN) and len(visible) > 7


def test_two_runs_never_write_into_one_folder(options, interrupted):
    """While another process has the folder, a run is refused by its number; when that is killed, the folder is free."""
    code = "import sys, time\nfrom pathlib import Path\nfrom common import disk\n"
    code += "held = disk.lock(Path(sys.argv[1]), 'x'); print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(interrupted / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")}
        with pytest.raises(InputError, match=rf"run is being written by another process \(process {other.pid}\)"):
            train(*options, "--output_dir", interrupted, *LATEST)
        assert before == {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")}
        other.kill()
    train(*options, "--output_dir", interrupted, *LATEST)
    assert len(log_lines(interrupted)) == 4


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_number(file: Path) -> None:
    content = json.loads(file.read_text())
    content["state"]["rows"] += 1
    file.write_text(json.dumps(content))


DAMAGE = {
    "weights/adapter_model.safetensors": [cut, flip, Path.unlink],
    "optimizer.bin": [flip],
    "random_states_0.pkl": [Path.unlink, flip],
    "scheduler.json": [Path.unlink],
    "state.json": [cut, change_number],
}


@pytest.mark.parametrize(("name", "damage"), [(name, how) for name, ways in DAMAGE.items() for how in ways])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(interrupted, options, capfd, name, damage):
    checkpoint = interrupted / "checkpoints" / "step_3"
    damage(checkpoint / name)
    with pytest.raises(InputError, match=rf"step_3/{name} is damaged"):
        train(*options, "--resume_from_checkpoint", checkpoint)
    train(*options, "--output_dir", interrupted, *LATEST)
    output, errors = capfd.readouterr()
    assert f"warning: {checkpoint / name} is damaged" in errors and "from step_2\n" in output
    straight = interrupted.with_name("straight")
    train(*options, "--output_dir", straight)
    assert log_lines(interrupted) == log_lines(straight)


def test_other_weights_of_the_base_are_noticed(interrupted, options, models, tmp_path, capfd):
    """A model replaced under its path: refused to resume, a warning in an evaluation."""
    base = tmp_path / "base"
    shutil.copytree(models["llama"], base)
    mine = [base if option == models["llama"] else option for option in options]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, loop, "finite_mean", 4)
        train(*mine, "--output_dir", tmp_path / "mine")
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="other options or data: weights of the base was "):
        train(*mine, "--output_dir", tmp_path / "mine", *LATEST)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    train(*mine, "--output_dir", tmp_path / "mine", *LATEST)
    capfd.readouterr()
    run_evaluate("--run", tmp_path / "mine")
    assert "other weights" not in capfd.readouterr().err
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    run_evaluate("--run", tmp_path / "mine")
    assert f"warning: {base} has other weights than when" in capfd.readouterr().err


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_weights_that_are_not_finite_are_not_saved(models, toy_files, tmp_path, strategy):
    """No later update would notice those of the last one; and whatever is written stays JSON."""
    given = ["--model", models["llama"], *toy_options(toy_files), "--max_steps", 1, "--learning_rate", 1e30]
    given += ["--warmup_ratio", 0, "--eval_strategy", strategy, "--save_strategy", strategy]
    with pytest.raises(FloatingPointError, match="after the last update weights are not finite"):
        train(*given, "--output_dir", tmp_path / "run")
    assert not list(tmp_path.glob("run/*/adapter_model.safetensors"))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for file in tmp_path.rglob("*.json*"):
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(line, parse_constant=refuse)


def test_json_has_no_word_for_what_is_not_finite():
    numbers = {"a": float("nan"), "b": [1.5, float("inf"), {"c": -float("inf")}], "d": (2, None, "é")}
    assert disk.to_json(numbers) == '{"a": null, "b": [1.5, null, {"c": null}], "d": [2, null, "é"]}'


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_a_checkpoint_runs_no_code(interrupted, options, tmp_path, name):
    """A pickle in place of the optimizer or the random numbers, or beside them, is refused though its checksum fits."""

    class Planted:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "planted"),)

    checkpoint = interrupted / "checkpoints" / "step_3"
    torch.save(Planted(), checkpoint / name)
    content = json.loads((checkpoint / "state.json").read_text())
    content["files"][name] = run_folder.file_hash(checkpoint / name)
    content["checksum"] = run_folder.checksum({key: value for key, value in content.items() if key != "checksum"})
    disk.write_json(checkpoint / "state.json", content)
    refused = pytest.raises(InputError, match="step_3 holds more than numbers")
    with pytest.raises(RuntimeError, match="custom") if "custom" in name else refused:
        train(*options, "--output_dir", interrupted, *LATEST)
    assert not (tmp_path / "planted").exists()
