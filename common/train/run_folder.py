"""Run folders: where a run goes, which one is resumed or evaluated, and folders that appear whole or not at all."""

import hashlib
import json
import os
import re
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.disk import OUTPUTS, write_json
from common.errors import InputError
from common.log import describe_environment
from common.options import dump_config

# Options that change nothing about a run's numbers, or only together with the rows per update.
FREE_OPTIONS = {
    "resume_from_checkpoint", "output_dir", "run_name", "report_to", "num_threads", "logging_steps", "save_strategy",
    "save_steps", "save_total_limit", "dry_run", "baselines", "seeds", "per_device_eval_batch_size",
    "per_device_train_batch_size", "gradient_accumulation_steps", "sample_prompt",
}  # fmt: skip


def binding_options(config: Any) -> dict[str, Any]:
    """The options that must be the same for a run to be resumed."""
    return {name: value for name, value in asdict(config).items() if name not in FREE_OPTIONS}


def options_hash(config: Any) -> str:
    """SHA-256 of `binding_options`."""
    return hashlib.sha256(json.dumps(binding_options(config), sort_keys=True).encode()).hexdigest()


def runs_folder(config: Any) -> Path:
    """outputs/<model>/<dataset>, where the runs of this model and data set are."""
    model = Path(config.model).stem if config.model.endswith(".gguf") else Path(config.model).name
    data = config.dataset_name or config.train_file
    name = config.demo if not data else Path(data).parent.name if Path(data).stem == "train" else Path(data).stem
    return OUTPUTS / _slug(model) / (_slug(name) or "data")


def check_output_dir(config: Any) -> None:
    """Refuses to write a new run over an old one, or where nothing can be written."""
    if config.output_dir and (Path(config.output_dir) / "config.yaml").exists():
        raise InputError(
            f"--output_dir {config.output_dir} already holds a run. Choose another folder, or go on with it by "
            f"`--resume_from_checkpoint {config.output_dir}`."
        )
    folder = Path(config.output_dir or OUTPUTS)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "a folder that you may not write to" if nearest.is_dir() else "a file"
        raise InputError(f"--output_dir {folder}: {nearest} is {what}. Choose another folder.")


def new_run_folder(config: Any) -> Path:
    """--output_dir, else the first free runs_folder/run_<i>."""
    if config.output_dir:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        return Path(config.output_dir)
    parent = runs_folder(config)
    parent.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name[4:]) for path in parent.glob("run_*") if path.name[4:].isdecimal()), default=0)
    while True:
        try:
            (parent / f"run_{number}").mkdir()
            return parent / f"run_{number}"
        except FileExistsError:  # another run started at the same time
            number += 1


def find_resume(config: Any) -> tuple[Path, Path | None]:
    """The run folder to go on in, and the checkpoint to go on from (None: it has none yet, so it starts anew).

    `latest` looks in --output_dir, else for the newest unfinished run with the same options; a path names a run or a
    checkpoint folder. Raises InputError where there is nothing to resume.
    """
    wanted = config.resume_from_checkpoint
    if wanted == "latest" and not config.output_dir:
        parent = runs_folder(config)
        runs = [path for path in parent.glob("run_*") if _unfinished(path) and _same_options(path, config)]
        if not runs:
            raise InputError(f"--resume_from_checkpoint latest: no unfinished run with these options in {parent}.")
        run_dir = max(runs, key=lambda path: (path / "config.yaml").stat().st_mtime)
    else:
        run_dir = Path(config.output_dir if wanted == "latest" else wanted)
        checkpoint = run_dir if (run_dir / "state.json").is_file() else None
        run_dir = run_dir.resolve().parent.parent if checkpoint else run_dir
        if config.output_dir and run_dir.resolve() != Path(config.output_dir).resolve():
            raise InputError(
                f"--resume_from_checkpoint {wanted} goes on in {run_dir}, not in --output_dir {config.output_dir}: "
                "drop --output_dir."
            )
        if checkpoint:
            return run_dir, checkpoint
        if not (run_dir / "config.yaml").is_file():
            raise InputError(f"--resume_from_checkpoint {wanted}: {run_dir} is neither a run nor a checkpoint folder.")
    if not _unfinished(run_dir):
        raise InputError(f"--resume_from_checkpoint {wanted}: the run in {run_dir} is finished.")
    return run_dir, next(iter(reversed(list_checkpoints(run_dir))), None)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [path.parent for path in run_dir.glob("checkpoints/step_*/state.json")]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))


def write_start(
    run_dir: Path, config: Any, given: str, data: Any, splits: dict, data_report: str, processes: int, census: dict
) -> None:
    """What a run leaves before its first update: options, environment, splits and the data report.

    given: `options_hash` of the options before they were resolved; it identifies the run for `latest`. splits: what
    tells which rows are in which split.
    """
    header = f"# the options as resolved; `--config` reads them back\n# given: {given}\n"
    environment = {**describe_environment(processes), "data": data.sources, "census": census}
    (run_dir / "eval" / "test" / "baselines.json").unlink(missing_ok=True)  # of a run killed before any checkpoint
    files = {
        "environment.json": json.dumps(environment, indent=2),
        "splits.json": json.dumps({"sources": data.sources, **splits}, ensure_ascii=False),
        "data_report.md": data_report,
        "data_report.json": json.dumps(data.report, indent=2, ensure_ascii=False),
        "config.yaml": header + dump_config(config),
    }
    for name, content in files.items():
        (run_dir / name).write_text(content, encoding="utf-8")


def mark_finished(run_dir: Path) -> None:
    """Notes in environment.json that the run got to its end."""
    path = run_dir / "environment.json"
    content = {**json.loads(path.read_text()), "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    write_json(path, content)


def _unfinished(run_dir: Path) -> bool:
    environment = run_dir / "environment.json"
    return (run_dir / "config.yaml").is_file() and "finished" not in json.loads(environment.read_text())


def _same_options(run_dir: Path, config: Any) -> bool:
    return f"# given: {options_hash(config)}\n" in (run_dir / "config.yaml").read_text(encoding="utf-8")


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("._")
