"""A dry run: a few real updates, evaluations and a save, and from these what the whole run will need."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from common.log import peak_memory, say, uses_cuda
from common.text.batches import Batch
from common.text.plan import Plan, rank_share
from common.train import loop
from common.train.run_folder import RunFolder

LONGEST, LEAST, MOST = 2, 3, 12  # updates on the longest rows that are made, and on usual ones
ENOUGH = 20  # seconds: after them, no more than LEAST usual updates are made
CANDIDATES = 16  # updates of the most padded tokens, which may be packs with fewer
LOOKED_AT = 256  # updates whose batches are made to count the tokens that are computed in all
TIMED = 4  # evaluation batches whose time is taken
ON_A_CPU = "; a whole run took up to a third more, as freed memory goes back late on a CPU"  # docs/runs.md


@dataclass(frozen=True)
class Evaluation:
    """A pass over the rows of a split.

    measure: called with some of the rows. lengths: tokens of each row; unset: what the rows say. at_once: a batch of
    the longest holds at most so many times --per_device_eval_batch_size rows.
    """

    rows: Sequence[Any]
    measure: Callable[[Sequence[Any]], Any]
    lengths: Sequence[int] | None = None
    at_once: int = 1


@dataclass(frozen=True)
class Needs:
    """What a run will need: the greatest memory of a process and the disk, in bytes; seconds of its parts."""

    memory: int
    disk: int
    checkpoints: int  # on the disk at the end
    training: float
    evaluation: float
    saving: float

    @property
    def seconds(self) -> float:
        return self.training + self.evaluation + self.saving


def predict(
    run: RunFolder,
    accelerator: Accelerator,
    plan: Plan,
    total: int,
    rows: Sequence[Any],
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    collate: Callable[[Sequence[tuple[Any, bool]]], Batch],
    loss_of: Callable[[torch.nn.Module, Batch], torch.Tensor],
    validation: Evaluation,
    test: Evaluation,
    keep_best: Callable[[], None],
    save: Callable[[], None],
    last: bool,
    fit_baselines: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Makes updates on the longest rows of the plan and on usual ones, evaluates, saves, and says what a run needs.

    Memory is the most that a process has held by then. Time is the seconds per computed token (what a pack shares
    counts once, padding counts) of usual updates times the computed tokens of all, and of each evaluation alike. Each
    evaluation is assumed to find better weights, which are saved. The test split counts again for the untrained base.
    fit_baselines: fits those that are no language model.
    Removes the run's temporary folder. Returns Needs as a dictionary.
    """
    config, batch_size = run.config, run.config.per_device_train_batch_size
    count = partial(_computed, rows=rows, batch_size=batch_size, accelerator=accelerator, collate=collate)
    longest, usual, tokens = _choose(plan, total, batch_size * accelerator.num_processes, count)
    update = partial(_update, rows=rows, accelerator=accelerator, model=model, optimizer=optimizer, collate=collate,
                     config=config, loss_of=loss_of)  # fmt: skip
    saves = _due(config.save_strategy, config.save_steps, plan, total)
    validations = _due(config.eval_strategy, config.eval_steps, plan, total)
    of_base = min(1.0, config.max_baseline_samples / max(1, len(test.rows))) * config.baselines
    try:
        for _ in range(LONGEST):
            update(longest)
        seconds, made = 0.0, 0
        while made < min(len(usual), LEAST if seconds > ENOUGH else MOST):
            seconds += max(gather_object([update(usual[made])]))  # the same on all processes
            made += 1
        training = seconds / sum(count(numbers) for numbers in usual[:made]) * tokens
        evaluation = _evaluate(validation, config.per_device_eval_batch_size, validations)
        evaluation += _evaluate(test, config.per_device_eval_batch_size, 1 + of_base)
        saving = _timed(keep_best) * max(1, validations) + _timed(save) * saves
        best, checkpoint = _size(run.best), _size(run.path / "checkpoints")
        if config.baselines and len(test.rows) and accelerator.is_main_process:
            evaluation += _timed(fit_baselines)
        memory = max(gather_object([peak_memory()]))
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(run.path, ignore_errors=True)
    kept = min(saves, max(config.save_total_limit, 2)) if config.save_total_limit else saves  # best and last stay
    needs = Needs(memory, best + kept * checkpoint, kept, training, evaluation, saving)
    _report(needs, accelerator, config, total)
    loop.finish(accelerator, model, optimizer, last=last)
    return asdict(needs)


def _report(needs: Needs, accelerator: Accelerator, config: Any, total: int) -> None:
    """Says what a run needs, and whether the disk has it."""
    folder = Path(config.output_dir or ".").absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    lines = [
        f"\nDry run: {LONGEST} updates on the longest rows, up to {MOST} on usual ones, evaluation and save worked.",
        "Prediction for the run:",
        f"- peak memory of a process: {_bytes(needs.memory)}{'' if uses_cuda() else ON_A_CPU}",
        f"- time from the first update: {_time(needs.seconds)}: {total} updates {_time(needs.training)}, evaluation "
        f"{_time(needs.evaluation)}, saving {_time(needs.saving)}",
        f"- disk: {_bytes(needs.disk)}, with {needs.checkpoints} checkpoints; {_bytes(free)} are free",
    ]
    if needs.disk > free:
        lines.append("- the disk is too small: set --save_total_limit, or another --output_dir")
    say(accelerator, "\n".join(lines))


def _due(strategy: str, steps: int | None, plan: Plan, total: int) -> int:
    return sum(loop.is_due(strategy, steps, update, plan.updates_per_epoch, total) for update in range(1, total + 1))


def _choose(
    plan: Plan, total: int, batch: int, count: Callable[[Sequence[int]], int]
) -> tuple[list[int], list[list[int]], float]:
    """The update with the largest micro-batch, MOST ones from short to long, mixed, and the tokens that all compute.

    batch: rows of a micro-batch on all processes. count: of the tokens that an update computes. Where there are more
    than LOOKED_AT updates, so many of them, evenly spaced, stand for all.
    """
    updates = list(plan.updates(0, total))
    largest = [max(plan.lengths[numbers].max() * min(batch, len(numbers)), 0) for numbers in updates]
    first = np.argsort(largest, kind="stable")[::-1][:CANDIDATES]
    longest = max((updates[i] for i in first), key=lambda numbers: count(numbers[:batch]))
    some = [updates[i] for i in np.linspace(0, total - 1, min(total, LOOKED_AT)).astype(int)]
    tokens = [count(numbers) for numbers in some]
    order, most = np.argsort(tokens, kind="stable"), min(len(tokens), MOST)
    middles = ((np.arange(most) + 0.5) * len(order) / most).astype(int)
    usual = np.random.default_rng(0).permutation(order[middles])
    return longest, [some[i] for i in usual], sum(tokens) / len(tokens) * total


def _computed(numbers: Sequence[int], rows: Sequence[Any], batch_size: int, accelerator: Accelerator, collate) -> int:
    """Tokens that the first process computes in an update of these rows: what a pack shares once, padding too."""
    shares = rank_share([rows[i] for i in numbers], batch_size, 0, accelerator.num_processes)
    return sum(collate(share).input_ids.numel() for share in shares)


def _update(
    numbers: Sequence[int],
    rows: Sequence[Any],
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    collate: Callable[[Sequence[tuple[Any, bool]]], Batch],
    config: Any,
    loss_of: Callable[[torch.nn.Module, Batch], torch.Tensor],
) -> float:
    """One update as in the loop of the scripts, and its seconds; but no freed memory is given back after it."""
    batch_size = config.per_device_train_batch_size
    started = time.perf_counter()
    model.train()
    micro_batches = loop.micro_batches([rows[i] for i in numbers], batch_size, accelerator, collate)
    target_count = accelerator.reduce(loop.count_targets(micro_batches), "sum")  # on all ranks
    loss_sum = torch.zeros_like(target_count)
    for i, batch in enumerate(micro_batches):
        with loop.sync_context(accelerator, model, last=i == len(micro_batches) - 1):
            loss = loss_of(model, batch)
            accelerator.backward(loss * accelerator.num_processes / target_count)  # DDP averages; undo it
        loss_sum += loss.detach()
    loss_sum = accelerator.reduce(loss_sum, "sum")
    norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
    names = (f"number {i}" for i in numbers)
    loop.finite_mean(loss_sum.item(), target_count.item(), float(norm), accelerator, 0, names)
    optimizer.step()
    optimizer.zero_grad()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def _evaluate(one: Evaluation, batch_size: int, times: float) -> float:
    """The seconds that `times` evaluations will take; begins with the longest rows, which need most memory."""
    lengths = np.asarray([row.length for row in one.rows] if one.lengths is None else one.lengths)
    order = np.argsort(-lengths, kind="stable")
    if not len(order) or not times:
        return 0.0
    one.measure([one.rows[i] for i in order[: one.at_once * batch_size]])
    few = np.unique(np.linspace(0, len(order) - 1, min(len(order), TIMED * batch_size)).astype(int))
    some = sorted(order[few].tolist())
    seconds = _timed(lambda: one.measure([one.rows[i] for i in some]))
    return seconds * lengths.sum() / lengths[some].sum() * times


def _timed(act: Callable[[], Any]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes(number: float) -> str:
    unit = next((unit for unit in ("B", "kB", "MB") if number < 1000 ** (1 + ("B", "kB", "MB").index(unit))), "GB")
    return f"{number / 1000 ** ('B', 'kB', 'MB', 'GB').index(unit):.3g} {unit}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
