"""Runs side by side, of any task: seeds of one call, and runs as one table in Markdown and CSV, with pictures."""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.report import table
from common.disk import load_task, read_json, read_lines, weights_folder
from common.errors import InputError
from common.measure import figures
from common.measure.metrics import METRICS, TASKS, classification_metrics, headlines, interval
from common.measure.report import results_table, value_text, write_sheet
from common.options import CLASSIFICATION, TrainingConfig, read_saved

LOSSES = {"epochs": "epochs", "train_loss": "train loss", "eval_loss": "eval loss"}
SPEEDS = {
    "train_runtime": "train s", "eval_runtime": "eval s",
    "train_steps_per_second": "steps/s", "train_samples_per_second": "samples/s",
}  # fmt: skip
FORMS = {"trained": "{:,}", "epochs": "{:.3g}", "s per epoch": "{:.0f}", "tokens/s": "{:.0f}"}  # in Markdown


def write_seed_table(file: Path, runs: dict[int, dict[str, Any] | str], what: str = "seed") -> None:
    """Prints and writes one row per seed (a text: why it failed), then mean and standard deviation.

    what: `seed` or `fold`; of folds, which test different rows, also the metrics of all their predictions together.
    """
    done = [metrics for metrics in runs.values() if isinstance(metrics, dict)]
    titles = LOSSES | {name: known.title for name, known in METRICS.items() if name not in LOSSES} | SPEEDS
    titles = {key: title for key, title in titles.items() if any(key in metrics for metrics in done)}
    rows, notes = [], []
    for seed, metrics in runs.items():
        if isinstance(metrics, str):
            notes.append(f"{what.capitalize()} {seed} {metrics}")
            rows.append([str(seed), *["failed"] * len(titles)])
        else:
            rows.append([str(seed), *(f"{metrics[key]:.4g}" if key in metrics else "-" for key in titles)])
    if len(done) > 1:
        rows.append(["mean ± sd", *(_spread([metrics[key] for metrics in done if key in metrics]) for key in titles)])
    text = "\n".join([table([what, *titles.values()], rows), *notes])
    if what == "fold" and len(done) == len(runs):
        text += f"\n\n{_pooled([Path(metrics['run_folder']) for metrics in done])}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nWritten to {file}")


def _pooled(folders: Sequence[Path]) -> str:
    """The results table of all folds' predictions: every row answered once, by a run that was not trained on it."""
    labels = load_task(weights_folder(folders[0]))["labels"]
    gold, predicted = [], []
    for folder in folders:
        for row in read_lines(folder / "eval/test/predictions.jsonl"):
            gold.append(_indices(row["gold"], labels))
            predicted.append(_indices(row["prediction"], labels))
    metrics = classification_metrics(gold, predicted, labels)
    return results_table({f"all {len(gold)} rows": metrics}, "all folds'", headlines(CLASSIFICATION))


def _indices(names: str | list[str], labels: Sequence[str]) -> tuple[int, ...]:
    return tuple(labels.index(name) for name in ([names] if isinstance(names, str) else names))


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}" if len(values) > 1 else "-"


@dataclass
class Run:
    """One run of the table."""

    described: dict[str, Any]  # title -> value, None where its files do not tell
    metrics: dict[str, Any]  # of the test split
    compared: str  # the metric that it is compared by
    base: str  # "4-bit base", "8-bit base" or "base"
    weights: int  # bytes
    baselines: dict[str, dict[str, Any] | str]


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The evaluated runs in these folders, at any depth. Raises InputError where there is none."""
    found = {file.parents[2] for folder in folders for file in folder.glob("**/eval/test/metrics.json")}
    runs = sorted(run for run in found if (run / "config.yaml").is_file())  # a base model's evaluation has none
    if not runs:
        raise InputError(f"{', '.join(map(str, folders))}: no run there has test metrics (eval/test/metrics.json).")
    return runs


def read_run(folder: Path) -> Run:
    """A run, from its files. Raises InputError where there are no trained weights, or no metric to compare it by."""
    config, weights = TrainingConfig(**read_saved(folder)), weights_folder(folder)
    metrics, environment = read_json(folder / "eval/test/metrics.json"), read_json(folder / "environment.json")
    epochs, runtime = metrics.get("epochs"), metrics.get("train_runtime")
    bits = "4-bit " if config.load_in_4bit else "8-bit " if config.load_in_8bit else ""
    adapter = f"{bits}{'DoRA' if config.use_dora else 'LoRA'}"
    described = {
        "run": folder.name,
        "model": Path(config.model).name,
        "training": "full" if config.full_finetuning else adapter,
        "r, alpha": "" if config.full_finetuning else f"{config.lora_r}, {config.lora_alpha:g}",
        "trained": environment.get("census", {}).get("trainable"),
        "epochs": epochs,
        "s per epoch": runtime / epochs if runtime and epochs else None,
        "tokens/s": metrics.get("train_tokens_per_second"),
    }
    compared = _compared(folder, load_task(weights)["task"], config.metric_for_best_model, metrics)
    size = sum(file.stat().st_size for file in weights.glob("*.safetensors"))
    return Run(described, metrics, compared, f"{bits}base", size, read_json(folder / "eval/test/baselines.json"))


def _compared(folder: Path, task: str, chosen_by: str | None, metrics: dict[str, Any]) -> str:
    """What runs of this task are compared by; for one that is not registered, what chose the best weights."""
    for name in (TASKS[task].compared if task in TASKS else None, chosen_by):
        if name in metrics:
            return name
    raise InputError(f"{folder}: its test metrics have none to compare runs of the task {task} by.")


def write_table(folders: Sequence[Path], target: Path) -> str:
    """Writes table.md, table.csv and, with matplotlib, quality.png and speed.png; returns the Markdown table.

    Raises InputError where the runs are not compared by the same metric.
    """
    found = [folder.absolute() for folder in find_runs(folders)]
    runs = [read_run(folder) for folder in found]
    if len({folder.name for folder in found}) < len(found):
        parent = os.path.commonpath(found)
        for run, folder in zip(runs, found, strict=True):
            run.described["run"] = folder.relative_to(parent).as_posix()
    compared = sorted({run.compared for run in runs})
    if len(compared) > 1:
        raise InputError(f"The runs are of different tasks ({', '.join(compared)}): give those of one.")
    name = compared[0]
    text = _markdown(runs, name)
    target.mkdir(parents=True, exist_ok=True)
    (target / "table.md").write_text(text + "\n", encoding="utf-8")
    rows = []
    for run in runs:
        low, high = interval(run.metrics, name) or ("", "")
        memory = run.metrics.get("train_peak_memory_bytes")
        measured = {name: run.metrics[name], "low_95": low, "high_95": high}
        rows.append({**run.described, **measured, "memory_bytes": memory, "weights_bytes": run.weights})
    write_sheet(target / "table.csv", rows, list(rows[0]))
    if figures.can_draw():
        figures.draw_bars(target / "quality.png", {run.described["run"]: run.metrics for run in runs}, name)
        speeds = {run.described["run"]: (run.described["tokens/s"], run.metrics[name]) for run in runs}
        known = {run: point for run, point in speeds.items() if point[0] is not None}
        figures.draw_speed(target / "speed.png", known, name)
    return text


def _markdown(runs: Sequence[Run], name: str) -> str:
    """The runs, then what their baselines reached; a baseline that several runs measured alike is shown once."""
    rows, baselines = [], {}
    for run in runs:
        described = run.described.items()
        cells = ["-" if value is None else FORMS.get(title, "{}").format(value) for title, value in described]
        held = run.metrics.get("train_peak_memory_bytes")
        memory = "-" if held is None else f"{held / 1e6:.0f} MB"
        rows.append([*cells, value_text(run.metrics, name), memory, f"{run.weights / 1e6:.1f} MB"])
        for method, metrics in run.baselines.items():
            if isinstance(metrics, dict) and name in metrics:
                start = (method, run.described["model"], run.base if "untrained" in method else "")
                row = (*start, *[""] * (len(cells) - 3), value_text(metrics, name), "", "")
                baselines[row] = row
    return table([*runs[0].described, name, "memory", "weights"], [*rows, *baselines.values()])
