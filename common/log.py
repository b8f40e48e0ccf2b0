"""What a run leaves behind while it goes: a progress line, metrics.jsonl, trackers, and facts about the machine."""

import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.errors import InputError

# bitsandbytes reports at import that an optional kernel package is missing, which changes nothing for a user.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "scikit-learn", "numpy")


def chosen_trackers(report_to: list[str] | None) -> list[str]:
    """Trackers to use: those asked for, else TensorBoard where it is installed. Raises InputError for a missing one."""
    if report_to is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    names = [name for name in report_to if name != "none"]
    for name in names:
        if not importlib.util.find_spec(name):
            raise InputError(f"--report_to {name}: not installed. Run `pip install {name}`, or use --report_to none.")
    return names


def say(accelerator: Any, text: str = "") -> None:
    """Prints once, whatever the number of processes, above a progress bar if there is one."""
    if accelerator.is_main_process:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class RunLog:
    """The progress bar on the first process, metrics.jsonl, and Accelerate's trackers."""

    def __init__(self, run_dir: Path, accelerator: Any, config: Any, total: int, start: int) -> None:
        from tqdm import tqdm

        self.path, self.accelerator, self.every = run_dir / "metrics.jsonl", accelerator, config.logging_steps
        main = accelerator.is_main_process
        if main and self.path.exists():  # a resumed run repeats what came after its checkpoint, so those lines go
            whole = [
                line for line in self.path.read_text().splitlines() if line.endswith("}")
            ]  # not cut by a full disk
            lines = [line for line in whole if json.loads(line)["update"] <= start]
            scratch = self.path.with_name(".metrics.jsonl.tmp")
            scratch.write_text("".join(f"{line}\n" for line in lines))
            os.replace(scratch, self.path)
        accelerator.project_configuration.set_directories(str(run_dir))
        accelerator.project_configuration.logging_dir = str(run_dir / "logs")
        accelerator.init_trackers(config.run_name or "")
        self.bar = tqdm(total=total, initial=start, desc="train", unit="update", disable=not main, dynamic_ncols=True)

    def update(self, state: Any, loss: float, **values: float) -> None:
        """One update further: the bar shows its loss, every `--logging_steps` a line has the mean since the last."""
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update()
        if state.update % self.every == 0:
            speed = {"tokens_per_second": state.tokens / state.seconds}
            self.write(state.update, {"loss": state.take_window(), **values, **speed})

    def write(self, update: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers to the trackers."""
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"update": update, **values}) + "\n")
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=update)

    def close(self) -> None:
        self.bar.close()


class Progress:
    """A bar for a pass over rows, on the first process; call it with the number of rows done."""

    def __init__(self, accelerator: Any, what: str, total: int, unit: str = "row") -> None:
        from tqdm import tqdm

        shown = accelerator.is_main_process
        self.bar = tqdm(
            total=total,
            desc=what,
            unit=unit,
            unit_scale=unit != "row",
            leave=False,
            disable=not shown,
            dynamic_ncols=True,
        )

    def __call__(self, rows: int) -> None:
        self.bar.update(rows)
        if self.bar.n >= self.bar.total:
            self.close()

    def close(self) -> None:
        """Takes the bar away."""
        self.bar.close()


def describe_environment(processes: int) -> dict[str, Any]:
    """Versions, commit, hardware, threads and time of this run."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "command": " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _commit() -> str | None:
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
