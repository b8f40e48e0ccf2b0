"""Runs side by side, of any task: one table as Markdown and CSV, and pictures of quality and speed."""

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.data.report import table
from common.disk import weights_folder
from common.errors import InputError
from common.measure.figures import can_draw, draw_bars, pyplot
from common.measure.report import CLASSIFICATION, PERPLEXITY
from common.options import read_yaml

SEED_COLUMNS = {
    "epochs": "epochs", "train_loss": "train loss", "eval_loss": "eval loss", "accuracy": "accuracy",
    "f1_micro": "micro-F1", "f1_macro": "macro-F1", "perplexity": "perplexity",
    "train_runtime": "train s", "eval_runtime": "eval s",
    "train_steps_per_second": "steps/s", "train_samples_per_second": "samples/s",
}  # fmt: skip


def write_seed_table(file: Path, runs: dict[int, dict[str, Any] | str]) -> None:
    """Prints and writes one row a seed (a text: why it failed), then mean and standard deviation."""
    done = [metrics for metrics in runs.values() if not isinstance(metrics, str)]
    columns = [key for key in SEED_COLUMNS if any(key in metrics for metrics in done)]
    rows, notes = [], []
    for seed, metrics in runs.items():
        if isinstance(metrics, str):
            notes.append(f"Seed {seed} {metrics}")
            metrics = {}
        rows.append([str(seed), *(f"{metrics[key]:.4g}" if key in metrics else "failed" for key in columns)])
    if len(done) > 1:
        spread = [[metrics[key] for metrics in done] for key in columns]
        rows.append(["mean ± sd", *(f"{statistics.mean(v):.4g} ± {statistics.stdev(v):.2g}" for v in spread)])
    text = "\n".join([table(["seed", *(SEED_COLUMNS[key] for key in columns)], rows), *notes])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nWritten to {file}")


COLUMNS = ("run", "model", "training", "r, alpha", "trained", "epochs", "s an epoch", "tokens/s")
LAST = ("memory", "weights")


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The evaluated runs in these folders, at any depth. Raises InputError where there is none."""
    found = {file.parents[2] for folder in folders for file in folder.glob("**/eval/test/metrics.json")}
    runs = sorted(run for run in found if (run / "config.yaml").is_file())  # a base model's evaluation has none
    if not runs:
        raise InputError(f"{', '.join(map(str, folders))}: no run there has test metrics (eval/test/metrics.json).")
    return runs


def describe(run: Path) -> dict[str, Any]:
    """One run's row: what was trained, how fast, how well. Figures are numbers; bytes and seconds as such."""
    config = read_yaml(run / "config.yaml")
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    metrics = json.loads((run / "eval" / "test" / "metrics.json").read_text(encoding="utf-8"))
    baselines = run / "eval" / "test" / "baselines.json"
    metric = next(name for name in (*CLASSIFICATION, *PERPLEXITY) if name in metrics)
    whole = config["full_finetuning"] == "true"
    bits = "4-bit " if config["load_in_4bit"] == "true" else "8-bit " if config["load_in_8bit"] == "true" else ""
    return {
        "run": run.name,
        "model": Path(config["model"]).name,
        "bits": bits,
        "training": "full" if whole else bits + ("DoRA" if config["use_dora"] == "true" else "LoRA"),
        "r, alpha": "" if whole else f"{config['lora_r']}, {float(config['lora_alpha']):g}",
        "trained": environment["census"]["trainable"],
        "epochs": metrics["epochs"],
        "s an epoch": metrics["train_runtime"] / metrics["epochs"],
        "tokens/s": metrics["train_tokens_per_second"],
        "metric": metric,
        "value": metrics[metric],
        "interval": metrics["intervals_95"][metric],
        "memory": metrics["peak_memory_bytes"],
        "weights": sum(file.stat().st_size for file in weights_folder(run).glob("*.safetensors")),
        "baselines": json.loads(baselines.read_text(encoding="utf-8")) if baselines.exists() else {},
    }


def write_table(folders: Sequence[Path], target: Path) -> str:
    """Writes table.md, table.csv and, with matplotlib, quality.png and speed.png; returns the Markdown table.

    Raises InputError where the runs have no headline figure in common.
    """
    runs = [describe(run) for run in find_runs(folders)]
    metrics = {entry["metric"] for entry in runs}
    if len(metrics) > 1:
        raise InputError(f"The runs are of different tasks ({', '.join(sorted(metrics))}): give those of one.")
    (metric,) = metrics
    header = [*COLUMNS, metric, *LAST]
    rows = [
        [
            *(entry[name] for name in ("run", "model", "training", "r, alpha")),
            f"{entry['trained']:,}", f"{entry['epochs']:.3g}", f"{entry['s an epoch']:.0f}", f"{entry['tokens/s']:.0f}",
            _figure(entry["value"], entry["interval"]),
            f"{entry['memory'] / 2**20:.0f} MB", f"{entry['weights'] / 2**20:.1f} MB",
        ]
        for entry in runs
    ]  # fmt: skip
    seen = set()
    for entry in runs:
        for name, figures in entry["baselines"].items():
            if metric in figures:
                cell = _figure(figures[metric], figures["intervals_95"][metric])
                row = (name, entry["model"], f"{entry['bits']}base" if "untrained" in name else "", cell)
                if row not in seen:  # the same base, measured by several runs
                    rows.append([*row[:3], *[""] * (len(COLUMNS) - 3), cell, *[""] * len(LAST)])
                seen.add(row)
    text = table(header, rows)
    target.mkdir(parents=True, exist_ok=True)
    (target / "table.md").write_text(text + "\n", encoding="utf-8")
    with open(target / "table.csv", "w", encoding="utf-8", newline="") as file:
        numbers = csv.writer(file)
        numbers.writerow([*COLUMNS, metric, "low_95", "high_95", "memory_bytes", "weights_bytes"])
        for entry in runs:
            figures = [entry["value"], *entry["interval"], entry["memory"], entry["weights"]]
            numbers.writerow([*(entry[name] for name in COLUMNS), *figures])
    if can_draw():
        draw(runs, metric, target)
    return text


def _figure(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def draw(runs: list[dict[str, Any]], metric: str, target: Path) -> None:
    """quality.png, a bar a run; speed.png, tokens a second against quality."""
    named = {entry["run"]: {metric: entry["value"], "intervals_95": {metric: entry["interval"]}} for entry in runs}
    draw_bars(target / "quality.png", named, metric)
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for entry in runs:
        axes.plot(entry["tokens/s"], entry["value"], "o")
        axes.annotate(entry["run"], (entry["tokens/s"], entry["value"]), (4, 4), textcoords="offset points")
    axes.set(xlabel="training tokens a second", ylabel=metric)
    figure.savefig(target / "speed.png", dpi=120)
    plt.close(figure)
