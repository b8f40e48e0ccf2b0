"""Checkpoints that hold the trained weights only, appear whole or not at all, and resume exactly."""

import contextlib
import errno
import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load
from torch.optim.lr_scheduler import LRScheduler

from common.data.files import file_hash, weights_hashes
from common.disk import read_json, replace_folder, write_json
from common.errors import InputError
from common.log import peak_memory
from common.measure.metrics import metric
from common.model.storage import load_weights, save_weights
from common.train.run_folder import RunFolder, checksum, list_checkpoints, number_of

FULL_DISK = 2**20  # bytes: with less left, a failed save is put down to the disk


@dataclass
class State:
    """Where a run stands; saved with every checkpoint. `seconds` are those of updates alone."""

    update: int = 0
    best_score: float | None = None
    best_update: int | None = None
    stale_evaluations: int = 0  # since the best one
    loss_sum: float = 0.0
    target_sum: float = 0.0
    window_loss: float = 0.0  # the same since the last line of metrics.jsonl
    window_targets: float = 0.0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_memory: int = 0  # bytes, when the last checkpoint was written

    def count(self, lengths: Sequence[int], seconds: float) -> None:
        """One update more, of rows with these lengths in tokens."""
        self.update += 1
        self.rows += len(lengths)
        self.tokens += sum(lengths)
        self.seconds += seconds

    def count_loss(self, loss: float, targets: float) -> None:
        """The mean loss of an update's targets."""
        self.loss_sum += loss * targets
        self.target_sum += targets
        self.window_loss += loss * targets
        self.window_targets += targets

    def take_window(self) -> float:
        """The mean loss since the last call."""
        mean = self.window_loss / self.window_targets
        self.window_loss = self.window_targets = 0.0
        return mean

    def improves(self, name: str, metrics: dict[str, Any]) -> bool:
        """Whether metric `name` is the best so far, which is noted (negated where lower is better).

        Raises InputError for one that was not measured.
        """
        if name not in metrics:
            raise InputError(f"--metric_for_best_model {name} was not measured. There are {', '.join(metrics)}.")
        score = metrics[name] if metric(name).higher_is_better else -metrics[name]
        if not math.isnan(score) and (self.best_score is None or score > self.best_score):
            self.best_score, self.best_update, self.stale_evaluations = score, self.update, 0
            return True
        self.stale_evaluations += 1
        return False

    def summary(self, flops_per_token: float) -> dict[str, float]:
        """The figures of the whole training; train_runtime has neither evaluation nor saving in it, the memory has.

        Tokens and total_flos are those of the rows: a shared prefix counts in each, computed once or not.
        """
        seconds = max(self.seconds, 1e-9)
        return {
            "train_loss": self.loss_sum / self.target_sum,
            "train_runtime": self.seconds,
            "train_samples_per_second": self.rows / seconds,
            "train_steps_per_second": self.update / seconds,
            "train_tokens_per_second": self.tokens / seconds,
            "total_flos": flops_per_token * self.tokens,
            "train_peak_memory_bytes": max(self.peak_memory, peak_memory()),
        }


def register_hooks(accelerator: Accelerator, scheduler: LRScheduler) -> None:
    """Makes `save_state` and `load_state` handle the trained weights only, not the base model's, and the scheduler.

    The scheduler's state is JSON: Accelerate would pickle it, and a pickle from elsewhere can run any code.
    """

    def save(models: list, weights: list, folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            save_weights(accelerator.unwrap_model(models[0]), Path(folder) / "weights")
            write_json(Path(folder) / "scheduler.json", scheduler.state_dict())

    def load(models: list, folder: str) -> None:
        load_weights(accelerator.unwrap_model(models.pop()), Path(folder) / "weights")
        scheduler.load_state_dict(read_json(Path(folder) / "scheduler.json"))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, run: RunFolder, settle: Callable[[], State], limit: int | None) -> None:
    """Writes checkpoints/step_<n>: complete under a temporary name first, then renamed; then prunes old ones.

    settle: gives the state, or stops the run where its last update was broken. limit: --save_total_limit.
    """
    state = settle()
    target = run.path / "checkpoints" / f"step_{state.update}"
    scratch = target.with_name(f".{target.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
    accelerator.wait_for_everyone()
    with _full_disk_named(run.path):
        accelerator.save_state(str(scratch))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = {str(p.relative_to(scratch)): file_hash(p) for p in sorted(scratch.rglob("*")) if p.is_file()}
            state.peak_memory = max(state.peak_memory, peak_memory())
            content = {"state": asdict(state), "resume_fingerprint": run.resume_fingerprint, "files": files,
                       "best": weights_hashes(run.best)}  # fmt: skip
            write_json(scratch / "state.json", {**content, "checksum": checksum(content)})
    if accelerator.is_main_process:
        replace_folder(scratch, target)
        _prune(run.path, state, limit)
    accelerator.wait_for_everyone()


def load_state(accelerator: Accelerator, run: RunFolder) -> State:
    """Restores weights, optimizer, scheduler and random numbers of the checkpoint to resume; a new run's state if none.

    With another number of processes than before, dropout draws other numbers. If the run got further than this
    checkpoint and replaced its best weights, there are none until the next evaluation: on a GPU, or with another number
    of processes, it may not find those again.
    Raises InputError where options or data differ from the checkpoint's, naming each.
    """
    if run.checkpoint is None:
        return State()
    saved = read_json(run.checkpoint / "state.json")
    before, now = saved["resume_fingerprint"], json.loads(json.dumps(run.resume_fingerprint))
    changed = [f"{name} was {before.get(name)}, is {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        raise InputError(f"{run.checkpoint} cannot be resumed with other options or data: {'; '.join(changed)}.")
    random_states = run.checkpoint / f"random_states_{accelerator.process_index}.pkl"
    try:
        accelerator.load_state(str(run.checkpoint))  # which passes over random numbers that it cannot restore
        restored = torch.equal(load(random_states)["torch_manual_seed"], torch.get_rng_state())
    except pickle.UnpicklingError as error:
        raise InputError(f"{run.checkpoint} holds more than numbers, so it was not read: {error}") from None
    except FileNotFoundError:  # this run has more processes than the one before
        restored = True
    if not restored:
        raise InputError(f"{random_states}: the random numbers could not be restored on this machine.")
    state = State(**saved["state"])
    # The run may have gone on and found better ones before it was stopped. None: an earlier version's checkpoint.
    if saved.get("best") not in (None, weights_hashes(run.best)):
        state.best_score = state.best_update = None
    return state


def save_best(accelerator: Accelerator, run: RunFolder, write: Callable[[Path], None]) -> None:
    """Replaces the run's trained weights by what `write(folder)` puts into a folder, complete or not at all."""
    if accelerator.is_main_process:
        target = run.best
        scratch = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        with _full_disk_named(target.parent):
            write(scratch)
        replace_folder(scratch, target)
    accelerator.wait_for_everyone()


@contextlib.contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    """torch and safetensors report a full disk by errors of their own: these become the OSError that it is."""
    try:
        yield
    except Exception as error:
        if shutil.disk_usage(folder).free > FULL_DISK:
            raise
        raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error


def _prune(run_dir: Path, state: State, limit: int | None) -> None:
    """Deletes the oldest checkpoints beyond `limit`, but never the best or the last.

    Later ones are damaged, as the run was resumed from an earlier one, and do not count.
    """
    folders = [folder for folder in list_checkpoints(run_dir) if number_of(folder) <= state.update]
    spare = [folder for folder in folders[:-1] if folder.name != f"step_{state.best_update}"]
    for folder in spare[: max(0, len(folders) - limit)] if limit else []:
        (folder / "state.json").unlink()  # without it a half-deleted folder is no checkpoint any more
        shutil.rmtree(folder)
