"""Trains once with every combination of some options, and compares the runs on the validation rows, never on the test.

    python benchmarks/sweep.py --grid learning_rate=5e-4,1e-3,2e-3 lora_r=8,16,64 --output_dir outputs/sweep \
        train_cls.py --train_file train.csv --validation_file validation.csv --label_column topic --test_fraction 0

A run that is finished is not repeated, one that was stopped is resumed. Writes sweep.md, sweep.jsonl and, for the first
option of the grid, sweep.png.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.data.report import table  # noqa: E402
from common.disk import read_json, read_lines  # noqa: E402
from common.measure import figures  # noqa: E402

COLUMNS = {"eval_loss": "validation loss", "accuracy": "accuracy", "f1_micro": "micro-F1", "f1_macro": "macro-F1"}


def train(script: list[str], settings: dict[str, str], folder: Path) -> dict[str, Any]:
    """The figures of a run: of its last evaluation on the validation rows, and seconds of its updates."""
    if "finished" not in read_json(folder / "environment.json"):  # weights are there from the first evaluation on
        resume = ["--resume_from_checkpoint", "latest"] if (folder / "config.yaml").is_file() else []
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        subprocess.run([sys.executable, *script, *options, *resume, "--output_dir", str(folder)], check=True)
    lines = read_lines(folder / "metrics.jsonl")
    last = [line for line in lines if line.get("split") == "validation"][-1]
    seconds = sum(line.get("train_runtime", 0) for line in lines)
    return {**settings, **{name: last[name] for name in COLUMNS if name in last}, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--grid", nargs="+", required=True, metavar="OPTION=A,B", help="options and their values")
    parser.add_argument("--output_dir", type=Path, required=True, help="one folder per run is made in it")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a training script with the options of all runs")
    options = parser.parse_args()
    grid = {name: values.split(",") for name, _, values in (entry.partition("=") for entry in options.grid)}
    rows = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        name = "_".join(f"{name}_{value}" for name, value in settings.items())
        rows.append(train(options.script, settings, options.output_dir / name))
        text = table([COLUMNS.get(name, name) for name in rows[0]], [[shown(v) for v in row.values()] for row in rows])
        (options.output_dir / "sweep.md").write_text(f"{text}\n", encoding="utf-8")
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (options.output_dir / "sweep.jsonl").write_text(lines, encoding="utf-8")
    print(text)
    if figures.can_draw():
        draw(rows, list(grid), options.output_dir / "sweep.png")


def shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def draw(rows: list[dict[str, Any]], names: list[str], file: Path) -> None:
    """Validation loss against the first option of the grid; a line for each setting of the others."""
    lines: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        label = ", ".join(f"{name} {row[name]}" for name in names[1:])
        lines.setdefault(label, []).append((row[names[0]], row["eval_loss"]))
    figure, axes = figures.pyplot().subplots(figsize=(6, 4), layout="constrained")
    for label, points in lines.items():
        axes.plot([value for value, _ in points], [loss for _, loss in points], marker="o", label=label)
    axes.set(xlabel=names[0], ylabel=COLUMNS["eval_loss"])
    if len(names) > 1:
        axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
