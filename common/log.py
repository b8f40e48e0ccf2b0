"""What a run reports while it goes: progress bars, metrics.jsonl, trackers; what it costs and what it runs on."""

import contextlib
import importlib.util
import logging
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from common.disk import named, read_lines, to_json, write_text
from common.errors import InputError, printable

if TYPE_CHECKING:
    from accelerate import Accelerator

    from common.options import LoopConfig

# bitsandbytes reports at its import that an optional kernel package is missing, which changes nothing for a user.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn about it in every forked process
BAR = {"dynamic_ncols": True, "mininterval": 0.1 if sys.stderr.isatty() else 30}  # seconds; in a file each is a line
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "scikit-learn", "numpy")


class Training(Protocol):
    """What RunLog reads of a run's state: counts so far, and the mean loss since the last call of `take_window`."""

    update: int
    tokens: int
    seconds: float

    def take_window(self) -> float: ...


def chosen_trackers(report_to: list[str] | None) -> list[str]:
    """The trackers of --report_to, else TensorBoard if it is installed. Raises InputError for a missing one."""
    if report_to is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    names = [name for name in report_to if name != "none"]
    for name in names:
        if not importlib.util.find_spec(name):
            raise InputError(f"--report_to {name}: not installed. Run `pip install {name}`, or use --report_to none.")
    return names


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def warn(text: str) -> None:
    """Prints a warning to stderr, once whatever the number of processes."""
    if is_first_process():
        print(printable(f"warning: {text}"), file=sys.stderr, flush=True)


def say(accelerator: "Accelerator", text: str = "") -> None:
    """Prints once, whatever the number of processes, above a progress bar if there is one."""
    if accelerator.is_main_process:
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()


class RunLog:
    """The progress bar on the first process, metrics.jsonl, and Accelerate's trackers."""

    def __init__(self, run_dir: Path, accelerator: "Accelerator", config: "LoopConfig", total: int, start: int) -> None:
        self.path, self.accelerator, self.every = run_dir / "metrics.jsonl", accelerator, config.logging_steps
        main = accelerator.is_main_process
        if main and self.path.exists():  # a resumed run repeats what came after its checkpoint
            before = [line for line in read_lines(self.path) if line["update"] <= start and "train_runtime" not in line]
            write_text(self.path, "".join(f"{to_json(line)}\n" for line in before))
        accelerator.project_configuration.set_directories(str(run_dir))
        accelerator.project_configuration.logging_dir = str(run_dir / "logs")
        accelerator.init_trackers(config.run_name or "")
        self.bar = tqdm(total=total, initial=start, desc="train", unit="update", disable=not main, **BAR)

    def update(self, state: Training, loss: float, **values: float) -> None:
        """After each update: the bar shows its loss; every --logging_steps, a line has the mean since the last one."""
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update()
        if state.update % self.every == 0:
            speed = {"tokens_per_second": state.tokens / state.seconds}
            self.write(state.update, {"loss": state.take_window(), **values, **speed})

    def write(self, update: int, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl; its numbers go to the trackers, too."""
        if self.accelerator.is_main_process:
            with named(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(to_json({"update": update, **values}) + "\n")
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=update)

    def close(self) -> None:
        self.bar.close()


class Progress:
    """A bar for a pass over rows, on the first process; call it with the number of rows done."""

    def __init__(self, accelerator: "Accelerator", what: str, total: int, unit: str = "row") -> None:
        style = {"unit": unit, "unit_scale": unit != "row", "leave": False, **BAR}
        self.bar = tqdm(total=total, desc=what, disable=not accelerator.is_main_process, **style)

    def __call__(self, rows: int) -> None:
        self.bar.update(rows)
        if self.bar.n >= self.bar.total:
            self.close()

    def close(self) -> None:
        """Removes the bar."""
        self.bar.close()


def describe_environment(processes: int) -> dict[str, Any]:
    """Versions, commit, hardware, threads and time of this run."""
    import torch

    return {
        "command": " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if uses_cuda() else None,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
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


def evaluation_cost(rows: int, started: float) -> dict[str, float]:
    """eval_runtime in seconds since `started` (a perf_counter), examples_per_second, and peak_memory_bytes.

    The memory is that of the process so far: of a training script's evaluation, the training's as well.
    """
    seconds = time.perf_counter() - started
    return {
        "eval_runtime": seconds,
        "examples_per_second": rows / seconds,
        "peak_memory_bytes": peak_memory(),
    }


def uses_gpu() -> bool:
    """Whether there is a GPU, and the launcher (configs/accelerate/cpu.yaml) does not keep the run off it."""
    import torch
    from accelerate.utils import parse_flag_from_env

    return torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def uses_cuda() -> bool:
    """Whether that GPU is one of CUDA's."""
    import torch

    return torch.cuda.is_available() and uses_gpu()


def set_threads(wanted: int | None, processes: int = 1) -> None:
    """As many threads as --num_threads says; unset: the cores that this process may use, shared by the processes here.

    `accelerate launch` gives every process on a CPU a single one.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(wanted or max(1, cores // processes))


def peak_memory() -> int:
    """Bytes that the GPU's allocator held at most since the last reset, or on a CPU this process's resident set."""
    import torch

    if uses_cuda():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Lets `peak_memory` begin anew, for the next of several runs; on a CPU only where the system can (Linux)."""
    import torch

    if uses_cuda():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
