"""Pictures, drawn with matplotlib where it is installed."""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.disk import read_lines
from common.log import say
from common.measure.metrics import interval

if TYPE_CHECKING:
    from accelerate import Accelerator


COLUMNS = 3  # of panels
MANY = 30  # labels from which on zeros are left out


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def say_what_is_missing(accelerator: "Accelerator", report_to: list[str] | None) -> None:
    """Says which optional packages are not installed, and the command that adds them."""
    missing = [] if can_draw() else ["matplotlib"]
    if report_to is None and not importlib.util.find_spec("tensorboard"):
        missing.append("tensorboard")
    if missing:
        later = "" if can_draw() else " `evaluate.py --run RUN` can draw the confusion matrix later."
        command = f"`pip install {' '.join(missing)}`"
        say(accelerator, f"Not installed: {', '.join(missing)}. {command} adds what it draws or logs.{later}\n")


def draw_bars(path: Path, results: Mapping[str, dict[str, Any] | str], name: str) -> None:
    """One bar per method that has the metric of this name, with its 95 % interval where there is one."""
    measured = {method: entry for method, entry in results.items() if isinstance(entry, dict) and name in entry}
    values = [entry[name] for entry in measured.values()]
    bounds = [interval(entry, name) or (entry[name], entry[name]) for entry in measured.values()]
    errors = np.array([[v - low, high - v] for v, (low, high) in zip(values, bounds, strict=True)]).T.clip(min=0)
    with _picture(path, (6, 1 + 0.5 * len(values))) as axes:
        axes.barh(list(measured), values, xerr=errors, color="tab:blue", capsize=3)
        axes.invert_yaxis()
        axes.set(xlabel=name)


def draw_differences(path: Path, differences: Mapping[str, Mapping[str, Sequence[float]]], first: str) -> None:
    """A panel per metric: how much more each one measures than `first`, with its 95 % interval, against 0.

    differences: metric's title -> name -> (difference, low, high).
    """
    count = max(map(len, differences.values()))
    lines = -(-len(differences) // COLUMNS)
    with _picture(path, (3.2 * COLUMNS, lines * (1.4 + 0.4 * count)), (lines, COLUMNS)) as panels:
        for axes in panels.flat[len(differences) :]:
            axes.axis("off")
        for axes, (title, entries) in zip(panels.flat, differences.items(), strict=False):
            for place, (value, low, high) in enumerate(entries.values()):
                reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axes.errorbar(value, place, xerr=reach, fmt="o", capsize=3)
            axes.axvline(0, color="gray", linewidth=1)
            axes.set_yticks(range(len(entries)), list(entries) if axes in panels[:, 0] else [])
            axes.set_ylim(len(entries) - 0.5, -0.5)
            axes.set(title=title, xlabel=f"difference from {first}")


def draw_speed(path: Path, runs: Mapping[str, tuple[float, float]], name: str) -> None:
    """One dot per run: (training tokens per second, value of the metric of this name)."""
    with _picture(path, (6, 4)) as axes:
        for run, point in runs.items():
            axes.plot(*point, "o")
            axes.annotate(run, point, (4, 4), textcoords="offset points")
        axes.set(xlabel="training tokens per second", ylabel=name)


def draw_confusion(path: Path, matrix: np.ndarray, labels: Sequence[str], multi_label: bool) -> None:
    """Gold by prediction, as shares of each gold row; for several labels, each label's right and wrong decisions.

    matrix: of `confusion_matrix`.
    """
    labels = [label.replace("$", r"\$") for label in labels]  # no formulas
    if multi_label:
        shown = matrix.reshape(len(labels), 4).astype(float)
        columns, rows = ["true no", "false yes", "false no", "true yes"], labels
        named = {"xlabel": "prediction", "ylabel": "label", "title": "decisions by label"}
    else:
        used = len(labels) + bool(matrix[-1].sum() or matrix[:, -1].sum())
        shown = matrix[:used, :used].astype(float)
        rows = columns = [*labels, "(no label)"][:used]
        named = {"xlabel": "prediction", "ylabel": "gold", "title": "gold by prediction"}
    share = shown / np.maximum(shown.sum(1, keepdims=True), 1)
    size = min(30, 3 + 0.35 * max(len(columns), 6)), min(30, 2.5 + 0.35 * max(len(rows), 6))
    with _picture(path, size) as axes:
        image = axes.imshow(share**0.5, cmap="Blues", vmin=0, vmax=1, aspect="auto")  # small shares are seen
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(**named)
        for i, j in np.argwhere(shown > 0) if len(rows) > MANY else np.ndindex(shown.shape):
            color = "white" if share[i, j] ** 0.5 > 0.6 else "black"
            axes.text(j, i, f"{shown[i, j]:.0f}", ha="center", va="center", color=color, fontsize=8)
        shares = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
        bar = axes.figure.colorbar(image, label="share of the row", ticks=[share**0.5 for share in shares])
        bar.ax.set_yticklabels([f"{share:g}" for share in shares])


def draw_reliability(path: Path, bins: Sequence[Sequence[float]]) -> None:
    """What probabilities say against what is true. bins: [mean probability, share right, answers] of each."""
    said, true, count = map(np.array, zip(*bins, strict=True))
    with _picture(path, (4.5, 4)) as axes:
        axes.plot([0, 1], [0, 1], color="tab:gray", linewidth=1)
        axes.scatter(said, true, s=20 + 180 * count / count.max(), color="tab:blue", alpha=0.7)
        axes.set(xlabel="probability of the answer", ylabel="share right", xlim=(0, 1.03), ylim=(0, 1.03))
        axes.set_title("areas: number of answers", fontsize=9)


def draw_risk_coverage(path: Path, certainty: np.ndarray, right: np.ndarray) -> None:
    """The share of wrong answers among the most certain ones, by how many these are. certainty, right: [rows]."""
    wrong = ~right[np.argsort(-certainty, kind="stable")]
    given = np.arange(1, len(wrong) + 1)
    with _picture(path, (5, 4)) as axes:
        axes.plot(given / len(wrong), np.cumsum(wrong) / given, color="tab:blue")
        axes.set(xlabel="share of rows answered, the most certain first", ylabel="share of these wrong")
        axes.set(xlim=(0, 1), ylim=(0, None))


def draw_learning_curve(run: Path, name: str) -> None:
    """learning_curve.png of a run folder: training loss and the validation metric of this name, over the updates."""
    lines = read_lines(run / "metrics.jsonl")
    trained = [(line["update"], line["loss"]) for line in lines if "loss" in line]
    evaluated = [(line["update"], line[name]) for line in lines if name in line]
    if not can_draw() or not (trained or evaluated):  # fewer updates than --logging_steps
        return
    with _picture(run / "learning_curve.png", (7, 4)) as axes:
        if trained:
            axes.plot(*zip(*trained, strict=True), color="tab:gray", label="training loss")
        axes.set(xlabel="update", ylabel="loss per target")
        if evaluated:
            right = axes.twinx()
            right.plot(*zip(*evaluated, strict=True), "o-", color="tab:blue", label=f"validation {name}")
            right.set_ylabel(name)
        axes.figure.legend(loc="outside upper center", ncols=2)


@contextlib.contextmanager
def _picture(path: Path, size: tuple[float, float], panels: tuple[int, int] = (1, 1)) -> Iterator[Any]:
    """matplotlib axes to draw on (of several panels, an array), saved to `path` at the end. size: in inches."""
    plt = pyplot()
    figure, axes = plt.subplots(*panels, figsize=size, layout="constrained", squeeze=panels == (1, 1))
    yield axes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks
        figure.savefig(path, dpi=120)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
