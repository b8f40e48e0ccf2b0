"""A damaged folder of trained weights, or of a base: one paragraph that names the file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import train_chat

from common import open_run
from common.errors import InputError


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def written(text: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(text)


def without(*names: str) -> Callable[[Path], object]:
    def drop(file: Path) -> None:
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in names}))

    return drop


def with_value(**values: object) -> Callable[[Path], object]:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))


MUTATIONS = [
    ("adapter/task.json", cut),
    ("adapter/task.json", written("")),
    ("adapter/task.json", written("[]")),
    ("adapter/task.json", without("task")),
    ("adapter/task.json", without("model_options")),
    ("adapter/task.json", without("template")),
    ("adapter/task.json", with_value(labels="sport")),
    ("adapter/task.json", with_value(mixed_precision=None)),
    ("adapter/adapter_config.json", cut),
    ("adapter/adapter_config.json", Path.unlink),
    ("adapter/adapter_model.safetensors", cut),
    ("adapter/adapter_model.safetensors", written("")),
    ("adapter/adapter_model.safetensors", Path.unlink),
    ("adapter/tokenizer.json", cut),
    ("adapter/tokenizer_config.json", cut),
    ("adapter/tokenizer_config.json", Path.unlink),
    ("adapter/adapter_config.json", with_value(r=8)),
    ("base/config.json", cut),
    ("base/model.safetensors", cut),
    ("base/model.safetensors", written("no tensors")),
]


@pytest.fixture(scope="module")
def complete(models, chat_files, trained, tmp_path_factory) -> dict[str, Path]:
    """kind -> a folder with adapter/ and base/, which the adapter names."""
    folders = {}
    base = tmp_path_factory.mktemp("damage")
    train_chat("--model", models["llama"], *chat_files, "--max_steps", 1, "--output_dir", base / "run")
    for kind, run in (("labels", trained("llama", "generative", "single")), ("chat", base / "run")):
        folder = folders[kind] = base / kind
        shutil.copytree(run / "adapter", folder / "adapter")
        shutil.copytree(models["llama"], folder / "base")
        with_value(model_options=json.loads((folder / "adapter/task.json").read_text())["model_options"]
                   | {"model": "base"})(folder / "adapter/task.json")  # fmt: skip
    return folders


def load(kind: str) -> None:
    run = open_run("adapter")
    run.classifier() if kind == "labels" else run.chat()


@pytest.mark.parametrize("kind", ["labels", "chat"])
def test_undamaged_folders_load(kind, complete, monkeypatch):
    monkeypatch.chdir(complete[kind])
    load(kind)


@pytest.mark.parametrize(
    ("kind", "name", "damage"),
    [("labels", *mutation) for mutation in MUTATIONS] + [("chat", "adapter/generation_config.json", cut)],
)
def test_a_damaged_file_is_named(kind, name, damage, complete, tmp_path, monkeypatch):
    shutil.copytree(complete[kind], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    damage(Path(name))
    with pytest.raises(InputError) as caught:
        load(kind)
    named = Path(name).parent if damage.__name__ == "<lambda>" and "config" in name else Path(name)
    assert str(named) in str(caught.value) and "\n\n" not in str(caught.value)
