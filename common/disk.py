"""What lies on disk: files and folders that appear complete or not at all; the cache; runs and their weights."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common.errors import InputError, why_unreadable

if TYPE_CHECKING:
    from filelock import BaseFileLock

OUTPUTS = Path("outputs")
TASK_FILE = "task.json"  # in a folder of trained weights: how they are used
WEIGHTS_FOLDERS = ("adapter", "model")  # in a run folder, the one or the other
# What --baselines leaves in the run folder of a classifier; TF-IDF also lies beside weights that it is blended with.
BASELINE, MAJORITY_FILE, SUSPECTS = "tfidf", "majority.json", "suspects.csv"
# What every task.json has, and that of a classifier.
TASK_FACTS = {"mixed_precision": str, "full_finetuning": bool, "model_options": dict}
LABEL_FACTS = {
    "approach": str, "encoder": bool, "labels": list, "multi_label": bool, "template": str,
    "few_shot": list, "max_length": int, "answer_tokens": int, "prompt_hash": str,
}  # fmt: skip
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json")
MODEL_FILES = ("config.json", "tokenizer_config.json")
NULLS = ("null", "Null", "NULL", "~")  # what YAML means by nothing, unquoted
COPY_AGAIN = "Copy the folder again, from where it is complete."


def read_text(path: Path, name: str, hint: str = "") -> str:
    """The text of a UTF-8 file, which an error calls `name`. hint: what else to do about a file that is not there."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{name}: {why_unreadable(error)}{hint}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{name}: the file is not UTF-8.") from None


class _Texts(yaml.BaseLoader):
    """Every scalar as its text; what is null is left out of a mapping, and a name that comes twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        node.value = [(key, value) for key, value in node.value if not _is_null(value)]
        return super().construct_mapping(node, deep)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULLS


def read_yaml(path: Path, name: str) -> Any:
    """The content of a YAML file, which an error calls `name`; every scalar as its text, without what is null."""
    try:
        return yaml.load(read_text(path, name), Loader=_Texts)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{name}{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON in which a number that is not finite is null, as JSON has no other word for it."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=indent, ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Gives an OSError inside the block, such as that of a full disk, the path that it lacks."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    with named(path):
        scratch.unlink(missing_ok=True)  # a link, in a folder from elsewhere
        scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, complete or not at all."""
    write_text(path, to_json(content, indent=2))


def lock(path: Path, what: str) -> "BaseFileLock":
    """Takes the lock file `path` until it is released or this process, which may take it again, ends in whatever way.

    Raises InputError that calls it `what` and names the process that holds it.
    """
    from filelock import FileLock, Timeout

    held = FileLock(path, timeout=0, is_singleton=True)
    try:
        held.acquire()
    except Timeout:
        raise InputError(
            f"{what} is being written by another process ({path.read_text().strip() or 'of another user'}). Wait "
            "until it has ended, or choose another place."
        ) from None
    with named(path):
        path.write_text(f"process {os.getpid()}")
    return held


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. Raises InputError for a damaged one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}). Copy it again, or delete it.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged (no object). Copy it again, or delete it.")
    return content


def replace_folder(new: Path, target: Path) -> None:
    """Puts a complete folder in place of another by renaming; `recover` repairs a kill between the two renames."""
    recover(target)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    for again in (True, False):
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(new, target)
            break
        except OSError:
            if not (again and target.exists()):  # it does if a reader has just put the old one back, by `recover`
                raise
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Restores `target` from its old copy if a kill came between the renames of `replace_folder`."""
    old = target.with_name(f".{target.name}.old")
    if not target.exists() and old.exists():
        os.rename(old, target)


def cached_folder(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` of the user's cache, which `write(new folder)` makes if it is missing.

    The cache is `$PLAINLORA_CACHE`, else `plainlora` in the user's cache folder. A lock keeps a second process waiting
    instead of writing too, and the folder appears by one rename, so that a kill leaves nothing that looks complete.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = Path(os.environ.get("PLAINLORA_CACHE") or base / "plainlora") / name
    if target.is_dir():
        return target
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
                write(Path(scratch) / "new")
                os.replace(Path(scratch) / "new", target)
    return target


def newest_run() -> Path | None:
    """The run folder under outputs/ whose trained weights are the newest."""
    weights = (path for path in OUTPUTS.glob(f"**/{TASK_FILE}") if path.parent.name in WEIGHTS_FOLDERS)
    found = [path for path in weights if (path.parent.parent / "config.yaml").is_file()]  # an export has none
    return max(found, key=lambda path: path.stat().st_mtime).parent.parent if found else None


def is_base_model(path: Path | None) -> bool:
    """Whether --run names a base model instead of a run: a hub id, or a folder that holds a model alone."""
    if path is None or not path.is_dir():
        return True
    return (path / "config.json").is_file() and not (path / TASK_FILE).is_file()


def weights_folder(run: Path, option: str = "--run") -> Path:
    """The folder of trained weights in a run folder, or `run` itself if it is one. option: where it is set."""
    for name in WEIGHTS_FOLDERS:
        recover(run / name)
    for folder in (run, *(run / name for name in WEIGHTS_FOLDERS)):
        if (folder / TASK_FILE).is_file():
            return folder
    raise InputError(f"{option} {run}: no trained weights there (no adapter/{TASK_FILE} or model/{TASK_FILE}).")


def load_task(folder: Path) -> dict[str, Any]:
    """What a folder of trained weights says about its use: task, labels, prompt, model options, ...

    Raises InputError where it is damaged.
    """
    with damage_named(folder):
        task = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise InputError(f"{folder / TASK_FILE}: task is missing or no str. {COPY_AGAIN}")
    return task


def check_complete(folder: Path, task: dict[str, Any]) -> None:
    """Raises InputError where a file of trained weights is missing, or something that task.json should say."""
    for name, kind in {**TASK_FACTS, **(LABEL_FACTS if "approach" in task or "labels" in task else {})}.items():
        if not isinstance(task.get(name), kind):
            raise InputError(f"{folder / TASK_FILE}: {name} is missing or no {kind.__name__}. {COPY_AGAIN}")
    for name in MODEL_FILES if task["full_finetuning"] else ADAPTER_FILES:
        if not (folder / name).is_file():
            if any(folder.glob("*.gguf")):
                raise InputError(f"{folder} is an export for llama.cpp and Ollama. Name the run that it was made from.")
            raise InputError(f"{folder / name} is missing. {COPY_AGAIN}")


@contextlib.contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Makes an error inside the block an InputError if a file of a model's folder is damaged: that is the cause."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, InputError) and (reason := _damage(folder)):
            raise InputError(f"{reason}. {COPY_AGAIN}") from error
        raise


def _damage(folder: Path) -> str | None:
    """What is wrong with the first JSON or safetensors file that cannot be read."""
    from safetensors import SafetensorError, safe_open  # imports no torch

    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            else:
                with safe_open(file, "np"):
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            return f"{file}: damaged ({error})"
    return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file, if there is one; without a last line that a kill has cut."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():  # of bytes: U+2028 in a text ends no line
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def train_figures(run_dir: Path) -> dict[str, Any]:
    """train_loss, train_runtime and the like, from the last line about training in metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = read_lines(path)
    figures: dict[str, Any] = next((line for line in reversed(lines) if "train_runtime" in line), {})
    return {name: value for name, value in figures.items() if name != "update"}
