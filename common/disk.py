"""What lies on disk: files and folders that appear whole or not at all; where runs and their weights are."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from common.errors import InputError

OUTPUTS = Path("outputs")
TASK_FILE = "task.json"  # in a folder of trained weights


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json.dumps(content, indent=2))
    os.replace(scratch, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def replace_folder(new: Path, target: Path) -> None:
    """Puts a complete folder in the place of another by renaming; `recover` mends a kill between the two renames."""
    recover(target)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Brings `target` back from its old copy if a kill came between the renames of `replace_folder`."""
    old = target.with_name(f".{target.name}.old")
    if not target.exists() and old.exists():
        os.rename(old, target)


def train_figures(run_dir: Path) -> dict[str, Any]:
    """train_loss, train_runtime and the like, from the last line about training in metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    figures = next((line for line in reversed(lines) if "train_runtime" in line), {})
    return {name: value for name, value in figures.items() if name != "update"}


def newest_run() -> Path | None:
    """The run folder under outputs/ whose trained weights are the newest."""
    found = list(OUTPUTS.glob(f"**/{TASK_FILE}"))
    found = [path for path in found if path.parent.name in ("adapter", "model")]
    return max(found, key=lambda path: path.stat().st_mtime).parent.parent if found else None


def is_base_model(path: Path | None) -> bool:
    """Whether --run names no run but a base model: a hub id, or a folder that holds a model alone."""
    if path is None or not path.is_dir():
        return True
    return (path / "config.json").is_file() and not (path / TASK_FILE).is_file()


def load_task(folder: Path) -> dict[str, Any]:
    """What a folder of trained weights says of its use."""
    return json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))


def weights_folder(run: Path) -> Path:
    """The folder of trained weights of a run (`adapter` or `model`), or `run` itself if it is one."""
    for name in ("adapter", "model"):
        recover(run / name)
    for folder in (run, run / "adapter", run / "model"):
        if (folder / TASK_FILE).is_file():
            return folder
    raise InputError(f"--run {run}: no trained weights there (no adapter/task.json or model/task.json).")
