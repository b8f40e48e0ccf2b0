"""Run folders: where a run goes, which one is resumed, what a resumed run must have in common with its checkpoint."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.data.files import file_hash
from common.disk import (
    ADAPTER_FILES,
    BASELINE,
    MAJORITY_FILE,
    OUTPUTS,
    SUSPECTS,
    lock,
    read_json,
    recover,
    to_json,
    weights_folder,
    write_json,
    write_text,
)
from common.errors import InputError
from common.hub import weights_fingerprint
from common.log import describe_environment, say, warn
from common.options import binding_options, dump_config, options_hash

if TYPE_CHECKING:
    from accelerate import Accelerator
    from filelock import BaseFileLock

WRITTEN = (  # what a run has in its folder, besides config.yaml
    "adapter", "model", "checkpoints", "eval", "logs", "metrics.jsonl", "environment.json", "splits.json",
    "data_report.md", "data_report.json", "learning_curve.png", BASELINE, MAJORITY_FILE, SUSPECTS,
)  # fmt: skip


class Data(Protocol):
    """What a run notes of its data, whatever the task: where each split is from, and the counts of the data report."""

    sources: dict[str, dict[str, str]]
    report: dict[str, Any]


class RunFolder:
    """The folder of one run.

    To be made before the options are resolved: they identify the run for `--resume_from_checkpoint latest`.
    path: the folder. checkpoint: the one to resume from, or None. best: the folder of the best weights.
    resume_fingerprint: what must be the same for a checkpoint to be resumed: options, data, and what the script adds.
    Raises InputError where there is nothing to resume.
    """

    path: Path
    best: Path
    resume_fingerprint: dict[str, Any]
    _lock: "BaseFileLock"

    def __init__(self, config: Any) -> None:
        self.config, self.given = config, options_hash(config)
        self.resumed, self.checkpoint = find_resume(config) if config.resume_from_checkpoint else (None, None)

    def start(
        self,
        accelerator: "Accelerator",
        data: Data,
        base: str,
        *,
        splits: dict[str, Any],
        data_report: str,
        census: dict[str, Any],
        fingerprint: dict[str, Any],
    ) -> None:
        """Makes the folder, on all ranks the same, and writes what a run leaves before its first update.

        base: what `resolve_model` returned. splits: what tells which rows are in which split. census: of the model's
        weights. fingerprint: what must be the same to resume, besides options, data and base.
        """
        main = accelerator.is_main_process
        self.path = Path(_of_main_process(self.resumed or (new_run_folder(self.config) if main else None)))
        self.best = self.path / ("model" if self.config.full_finetuning else "adapter")
        if main:
            self._lock = lock(self.path / ".lock", str(self.path))
            self._check_unchanged()
        contents = {"weights of the base": weights_fingerprint(base, self.config.revision)[:12]}
        contents |= {f"content of {source['name']}": source["sha256"][:12] for source in data.sources.values()}
        if self.config.init_adapter:
            first = weights_folder(Path(self.config.init_adapter), "--init_adapter") / ADAPTER_FILES[1]
            contents["weights of --init_adapter"] = file_hash(first)[:12]
        self.resume_fingerprint = {**binding_options(self.config), **contents, **fingerprint}
        if self.resumed:
            where = self.checkpoint.name if self.checkpoint else "its start: no checkpoint yet"
            say(accelerator, f"Resuming {self.path} from {where}")
        if main:
            recover(self.best)
            if not self.checkpoint:
                self._write_start(data, splits, data_report, census, accelerator.num_processes)
        accelerator.wait_for_everyone()

    def _check_unchanged(self) -> None:
        """Raises InputError where another process has come first since the folder was looked at."""
        if self.resumed and find_resume(self.config) != (self.resumed, self.checkpoint):
            raise InputError(f"{self.path} was resumed by another process. Resume it again.")
        if not self.resumed and (self.path / "config.yaml").exists():
            raise InputError(f"{self.path} already holds a run, which another process has made. Choose another folder.")

    def _write_start(self, data: Data, splits: dict, data_report: str, census: dict, processes: int) -> None:
        header = f"# the options as resolved; `--config` reads them back\n# given: {self.given}\n"
        environment = {**describe_environment(processes), "data": data.sources, "census": census}
        for name in ("eval/test/baselines.json", MAJORITY_FILE, SUSPECTS):  # of a run killed before a checkpoint
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / BASELINE, ignore_errors=True)
        files = {
            # The first: it tells that the folder is a run's.
            "config.yaml": header + dump_config(replace(self.config, resume_from_checkpoint=None)),
            "environment.json": to_json(environment, indent=2),
            "splits.json": to_json({"sources": data.sources, **splits}),
            "data_report.md": data_report,
            "data_report.json": to_json(data.report, indent=2),
        }
        for name, content in files.items():
            write_text(self.path / name, content)  # else a kill leaves what a resumed run cannot read

    def finish(self) -> None:
        """Notes in environment.json that the run got to its end; frees the folder."""
        path = self.path / "environment.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**content, "finished": datetime.now(UTC).isoformat(timespec="seconds")})
        self._lock.release(force=True)


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
            f"--output_dir {config.output_dir} already holds a run. Choose another folder, or resume it with "
            f"`--resume_from_checkpoint {config.output_dir}`."
        )
    for name in WRITTEN if config.output_dir else ():
        if (Path(config.output_dir) / name).exists():
            raise InputError(
                f"--output_dir {config.output_dir}: there is {name} already, which no run has made and this one would "
                "replace. Choose another folder."
            )
    folder = Path(config.output_dir or OUTPUTS)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "a folder that you may not write to" if nearest.is_dir() else "a file"
        raise InputError(f"--output_dir {folder}: {nearest} is {what}. Choose another folder.")


def new_run_folder(config: Any) -> Path:
    """--output_dir, else the first free runs_folder/run_<i>; of a dry run, a temporary folder."""
    if config.dry_run:
        return Path(tempfile.mkdtemp(prefix="plainlora-"))
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
    """The run folder to resume, and the checkpoint to resume from (None: it has none yet, so it starts again).

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
                f"--resume_from_checkpoint {wanted} continues in {run_dir}, not in --output_dir {config.output_dir}: "
                "drop --output_dir."
            )
        if checkpoint:
            if damaged := damaged_file(checkpoint):
                raise InputError(f"--resume_from_checkpoint {wanted}: {damaged} is damaged. Name another checkpoint.")
            return run_dir, checkpoint
        if not (run_dir / "config.yaml").is_file():
            raise InputError(f"--resume_from_checkpoint {wanted}: {run_dir} is neither a run nor a checkpoint folder.")
    if not _unfinished(run_dir):
        raise InputError(f"--resume_from_checkpoint {wanted}: the run in {run_dir} is finished.")
    for checkpoint in reversed(list_checkpoints(run_dir)):
        if not (damaged := damaged_file(checkpoint)):
            return run_dir, checkpoint
        warn(f"{damaged} is damaged, so an earlier checkpoint is resumed.")
    return run_dir, None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [path.parent for path in run_dir.glob("checkpoints/step_*/state.json")]
    folders = [path for path in folders if path.name.removeprefix("step_").isdecimal()]  # no copies of a user's
    return sorted(folders, key=number_of)


def number_of(checkpoint: Path) -> int:
    """The updates that were made before it."""
    return int(checkpoint.name.removeprefix("step_"))


def checksum(content: dict[str, Any]) -> str:
    """SHA-256 of the content of a state.json, without its `checksum`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damaged_file(checkpoint: Path) -> Path | None:
    """A file of a checkpoint that is missing or not as it was written, or None."""
    try:
        content = read_json(checkpoint / "state.json")
    except InputError:
        return checkpoint / "state.json"
    if content.pop("checksum", None) != checksum(content):
        return checkpoint / "state.json"
    files = {checkpoint / name: digest for name, digest in content["files"].items()}
    return next((file for file, digest in files.items() if not file.is_file() or file_hash(file) != digest), None)


def _of_main_process(value: Any) -> Any:
    """The main process's value, on every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _unfinished(run_dir: Path) -> bool:
    return (run_dir / "config.yaml").is_file() and "finished" not in read_json(run_dir / "environment.json")


def _same_options(run_dir: Path, config: Any) -> bool:
    return f"# given: {options_hash(config)}\n" in (run_dir / "config.yaml").read_text(encoding="utf-8")


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("._")
