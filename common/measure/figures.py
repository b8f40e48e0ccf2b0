"""Pictures, drawn with matplotlib where it is installed."""

import importlib.util
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.log import say


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def say_what_is_missing(accelerator: Any, report_to: list[str] | None) -> None:
    """Says which optional packages are not installed, and the command that adds them."""
    missing = [] if can_draw() else ["matplotlib"]
    if report_to is None and not importlib.util.find_spec("tensorboard"):
        missing.append("tensorboard")
    if missing:
        later = "" if can_draw() else " `evaluate.py --run RUN` can draw the confusion matrix later."
        command = f"`pip install {' '.join(missing)}`"
        say(accelerator, f"Not installed: {', '.join(missing)}. {command} adds what it draws or logs.{later}\n")


def draw_bars(path: Path, results: dict[str, dict[str, Any]], metric: str) -> None:
    """One bar a method, with its 95 % interval."""
    plt = pyplot()
    values = [entry[metric] for entry in results.values()]
    bounds = [entry["intervals_95"][metric] for entry in results.values()]
    errors = np.array([[v - low, high - v] for v, (low, high) in zip(values, bounds, strict=True)]).T.clip(min=0)
    figure, axes = plt.subplots(figsize=(6, 1 + 0.5 * len(values)), layout="constrained")
    axes.barh(list(results), values, xerr=errors, color="tab:blue", capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel=metric)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_confusion(path: Path, matrix: np.ndarray, labels: Sequence[str], multi_label: bool) -> None:
    """Gold by prediction, shares of each gold row; for several labels, each label's right and wrong decisions."""
    plt = pyplot()
    labels = [label.replace("$", r"\$") for label in labels]  # no formulas
    if multi_label:
        shown = matrix.reshape(len(labels), 4).astype(float)
        columns, rows, title = ["true no", "false yes", "false no", "true yes"], list(labels), "decisions by label"
    else:
        used = len(labels) + bool(matrix[-1].sum() or matrix[:, -1].sum())
        shown = matrix[:used, :used].astype(float)
        rows = columns = [*labels, "(no label)"][:used]
        title = "gold by prediction"
    share = shown / np.maximum(shown.sum(1, keepdims=True), 1)
    size = min(30, 3 + 0.35 * max(len(columns), 6)), min(30, 2.5 + 0.35 * max(len(rows), 6))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="prediction", ylabel="gold" if not multi_label else "label", title=title)
    if len(rows) <= 30:
        for i, j in np.ndindex(shown.shape):
            color = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, f"{shown[i, j]:.0f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, label="share of the row")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label in a script that the font lacks
        figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_learning_curve(path: Path, metrics_file: Path, metric: str) -> None:
    """Training loss, and the validation metric, over the updates."""
    if not can_draw():
        return
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    train = [(line["update"], line["loss"]) for line in lines if "loss" in line]
    evaluated = [(line["update"], line[metric]) for line in lines if metric in line]
    if not train and not evaluated:  # fewer updates than --logging_steps
        return
    plt = pyplot()
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    if train:
        left.plot(*zip(*train, strict=True), color="tab:gray", label="training loss")
    left.set(xlabel="update", ylabel="loss per target")
    if evaluated:
        right = left.twinx()
        right.plot(*zip(*evaluated, strict=True), "o-", color="tab:blue", label=f"validation {metric}")
        right.set_ylabel(metric)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib's, for files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
