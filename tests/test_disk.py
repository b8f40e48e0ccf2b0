"""The cache: a folder is written once, and one that is not complete does not appear. And a disk that gets full."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.rows import toy_options, toy_rows, write_csv
from helpers.runs import assert_same_bits, train

from common.disk import cached_folder, read_lines, recover, replace_folder, to_json
from common.errors import RESUME_HINT, cli_errors
from common.train.run_folder import damaged_file, list_checkpoints


def test_a_cached_folder_is_written_once_and_only_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINLORA_CACHE", str(tmp_path))

    def fail(folder):
        folder.mkdir()
        (folder / "half").write_text("")
        raise OSError("killed")

    def write(folder):
        folder.mkdir()
        (folder / "all").write_text("content")

    with pytest.raises(OSError, match="killed"):
        cached_folder("kind/name", fail)
    assert not (tmp_path / "kind" / "name").exists() and not list(tmp_path.glob("kind/.*"))
    assert (cached_folder("kind/name", write) / "all").read_text() == "content"
    assert cached_folder("kind/name", fail) == tmp_path / "kind" / "name"  # it is there, so nothing is written


def test_a_reader_between_the_renames_stops_no_writer(tmp_path, monkeypatch):
    """It puts the old folder back, as after a kill; the new one takes its place all the same."""
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    rename, read = os.rename, []

    def interrupted(source, to):
        rename(source, to)
        if not read:
            read.append(1)
            recover(tmp_path / "target")

    monkeypatch.setattr(os, "rename", interrupted)
    replace_folder(tmp_path / "new", tmp_path / "target")
    assert (tmp_path / "target" / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[[str], Path]]:
    """(size) -> the folder of a file system of this size, made or resized."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        known = folder.is_dir()
        folder.mkdir(exist_ok=True)
        options = ["-o", f"remount,size={size}"] if known else ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        result = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"a file system cannot be mounted here: {result.stderr.strip()}")
        return folder

    if sys.platform != "linux" or os.geteuid():
        pytest.skip("only root on Linux may mount a small file system")
    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@pytest.mark.parametrize("size", ["20k", "2600k"])
def test_a_run_on_a_full_disk_ends_with_its_name_and_is_resumed(models, toy_files, tmp_path, mounted, capsys, size):
    """At its start, or in a later checkpoint: what was complete stays so, and with room the run is resumed."""
    run = mounted(size) / "run"
    options = ["--model", models["llama"], *toy_options(toy_files), "--lora_r", 64, "--max_steps", 6, "--save_strategy",
               "steps", "--save_steps", 1]  # fmt: skip
    with pytest.raises(SystemExit) as ended, cli_errors(RESUME_HINT):
        train(*options, "--output_dir", run)
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert ended.value.code == 2 and error.startswith(f"no space left on the disk while writing {run.parent}"), error
    kept = list_checkpoints(run)
    assert bool(kept) == (size != "20k") and all(damaged_file(checkpoint) is None for checkpoint in kept)
    mounted("64m")
    resumed = ["--resume_from_checkpoint", "latest"] if (run / "config.yaml").exists() else []
    train(*options, *resumed, "--output_dir", run)
    train(*options, "--output_dir", tmp_path / "elsewhere")
    assert_same_bits(run, tmp_path / "elsewhere")


def test_separators_of_lines_within_a_text_end_no_line_of_a_file(tmp_path):
    """U+0085 and U+2028 are in texts from the web, and JSON leaves them as they are. A line that a kill cut is left."""
    rows = [{"id": str(i), "text": f"a{mark}b"} for i, mark in enumerate("\u0085\u2028\u2029\x1c\x0b\x0c")]
    lines = "".join(f"{to_json(row)}\n" for row in rows).encode()
    (tmp_path / "rows.jsonl").write_bytes(lines + '{"id": "9", "text": "ä'.encode()[:-1])
    assert read_lines(tmp_path / "rows.jsonl") == rows


def test_a_label_with_a_separator_of_lines_is_trained_and_resumed(models, tmp_path):
    """The names of labels are in metrics.jsonl, which the picture and a resumed run read."""
    rows = [{"text": row["text"], "label": row["label"] + "\u0085\u2028"} for row in toy_rows(4)]
    options = ["--train_file", write_csv(tmp_path / "rows.csv", rows), "--model", models["llama"], "--approach", "head",
               "--max_steps", "2", "--output_dir", tmp_path / "run"]  # fmt: skip
    train(*options)
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    train(*options, "--resume_from_checkpoint", checkpoint)
    assert all(line for line in read_lines(tmp_path / "run" / "metrics.jsonl"))
