"""Evaluations of several runs on the same rows -> differences with paired intervals, and what can be said of them.

    eval/<split>/ of each run  ->  rows joined by id  ->  a Measure of each  ->  differences  ->  table, sentences, JSON

The rows' files are those that `common.measure.report` writes. What is drawn for an interval are rows with a label,
conversations, and documents (or stretches of text); of a recipe with several seeds, its runs as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.data.report import markdown, table
from common.disk import read_json, read_lines
from common.errors import InputError
from common.measure.intervals import (
    Measure,
    difference,
    mcnemar,
    mean_measure,
    mean_of,
    mean_of_drawn,
    merged,
    percentiles,
    point,
    resampled,
    rows_to_see,
    sign_test,
    sums_of,
)
from common.measure.metrics import (
    METRICS,
    TASKS,
    headlines,
    interval,
    label_measure,
    loss_measure,
    overlap_measure,
    rows_right,
)
from common.measure.report import SHARES, value_text
from common.options import CAUSAL_LM, CHAT, CLASSIFICATION

MIN_SEEDS = 6  # of each recipe, for a sign test: with 5, even 5 of 5 have a p of 0.06
SIGNIFICANT = 0.05
TOLD_BY = {"mcnemar_p": "McNemar p", "sign_test_p": "sign test p"}


@dataclass
class Evaluation:
    """The evaluation of one run, as its files tell. rows: id -> a line of predictions.jsonl or blocks.jsonl."""

    folder: Path
    metrics: dict[str, Any]
    rows: dict[str, dict[str, Any]]


@dataclass
class Recipe:
    """What is compared: a run, or several runs of one recipe that differ in their seeds.

    folders: of their evaluations. seeds: None where not known. evaluations, measures: of each, once they are read.
    """

    folders: Sequence[Path]
    seeds: Sequence[int | None]
    evaluations: list[Evaluation] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)


def read_evaluation(folder: Path, task: str) -> Evaluation:
    """metrics.json and the rows of an evaluation. Raises InputError where the rows' file is missing."""
    file = folder / ("blocks.jsonl" if task == CAUSAL_LM else "predictions.jsonl")
    if not file.is_file():
        raise InputError(f"{file} is missing: evaluate the run again.")
    rows = {str(row["block"] if task == CAUSAL_LM else row["id"]): row for row in read_lines(file)}
    return Evaluation(folder, read_json(folder / "metrics.json"), rows)


def check_same_rows(first: Evaluation, other: Evaluation, task: str) -> None:
    """Raises InputError where two evaluations are not of the same rows, with the same gold: nothing could be paired."""
    both = f"{first.folder} and {other.folder}"
    remedy = "Compare on one file: give it as --test_file."
    sources = [each.metrics.get("source", {}) for each in (first, other)]
    if sources[0].get("sha256") != sources[1].get("sha256"):
        names = " and ".join(str(source.get("name")) for source in sources)
        raise InputError(f"{both} are of different files ({names}), or of one that has changed. {remedy}")
    if lacking := first.rows.keys() ^ other.rows.keys():
        hint = "Give one --block_size and --stride for both." if task == CAUSAL_LM else remedy
        raise InputError(f"{both} are not of the same rows: {len(lacking)} are in one alone, as {min(lacking)}. {hint}")
    fact = "predicted_tokens" if task == CAUSAL_LM else "gold"
    for id, row in first.rows.items():
        if _unordered(row[fact]) != _unordered(other.rows[id][fact]):
            if task == CAUSAL_LM:
                remedy = "Only models with one tokenizer, in the same windows, can be compared block by block."
            raise InputError(f"{both} differ in what is right in row {id} ({fact}). {remedy}")
    if first.metrics.get("per_token") != other.metrics.get("per_token"):  # their blocks may have as many tokens
        raise InputError(f"{both} have blocks of different texts. Only models with one tokenizer can be compared.")
    labels = [set(each.metrics.get("per_label", ())) for each in (first, other)]
    if labels[0] != labels[1]:
        names = ", ".join(sorted(labels[0] ^ labels[1]))
        raise InputError(f"{both} have different label sets ({names} is in one alone), so their F1 do not compare.")


def _unordered(gold: Any) -> Any:
    """Several labels in an order that does not depend on that of the run's labels."""
    return sorted(gold) if isinstance(gold, list) else gold


def measures_of(evaluations: Sequence[Evaluation], task: str) -> tuple[list[Measure], int]:
    """What each evaluation measures as a function of the units' weights, and how many units there are.

    Losses of answers are compared where every conversation has as many predicted tokens in all.
    """
    first = evaluations[0]
    rows = [[each.rows[id] for id in first.rows] for each in evaluations]  # joined by id
    if task == CLASSIFICATION:
        labels = list(first.metrics["per_label"])
        return [label_measure(*_labels(each, labels), len(labels)) for each in rows], len(first.rows)
    sums = [np.array([(row["nats"], row["predicted_tokens"]) for row in each], dtype=float) for each in rows]
    if task == CAUSAL_LM:
        units = [row["unit"] for row in rows[0]]
        by_unit = [sums_of(each, units) for each in sums]
        per_token = first.metrics.get("per_token")
        return [loss_measure(each[:, 0], each[:, 1], per_token) for each in by_unit], len(by_unit[0])
    comparable = all((each[:, 1] == sums[0][:, 1]).all() for each in sums)
    return [
        merged(
            *([loss_measure(*losses.T)] if comparable else []),
            overlap_measure([row["prediction"] for row in each], [row["gold"] for row in each]),
            mean_measure("stopped", np.array([row["stopped"] for row in each], dtype=float)),
        )
        for each, losses in zip(rows, sums, strict=True)
    ], len(first.rows)


def _labels(
    rows: Sequence[dict[str, Any]], labels: Sequence[str]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...] | None]]:
    """Gold and predicted label indices of lines of predictions.jsonl."""
    numbers = {label: k for k, label in enumerate(labels)}

    def indices(names: str | list[str] | None) -> tuple[int, ...] | None:
        if names is None:
            return None
        return tuple(sorted(numbers[name] for name in ([names] if isinstance(names, str) else names)))

    return [indices(row["gold"]) or () for row in rows], [indices(row["prediction"]) for row in rows]


def compare(task: str, split: str, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """The content of comparison.json: what each measures, and how all others differ from the first, with intervals.

    Raises InputError where they were not evaluated on the same rows.
    """
    for recipe in recipes.values():
        recipe.evaluations = [read_evaluation(folder, task) for folder in recipe.folders]
    every = [evaluation for recipe in recipes.values() for evaluation in recipe.evaluations]
    for other in every[1:]:
        check_same_rows(every[0], other, task)
    measures, units = measures_of(every, task)
    if units < 2:
        raise InputError(f"{every[0].folder} is of a single row or text, which tells no runs apart: give --test_file.")
    shown = [metric.name for metric in headlines(task) if metric.name in point(measures[0], units)]
    for recipe in recipes.values():
        recipe.measures, measures = measures[: len(recipe.folders)], measures[len(recipe.folders) :]
    first, *others = recipes
    facts: dict[str, Any] = {"unit": every[0].metrics.get("unit", "rows"), "units": units, "metrics": shown}
    return {
        "task": task,
        "split": split,
        "source": every[0].metrics["source"],
        **facts,
        "runs": {name: _values(recipe, **facts) for name, recipe in recipes.items()},
        "differences": [_difference(task, first, other, recipes, **facts) for other in others],
    }


def _values(recipe: Recipe, unit: str, units: int, metrics: Sequence[str]) -> dict[str, Any]:
    """The headline metrics of a run, as its evaluation tells them; of several seeds, their means."""
    values: dict[str, Any] = point(mean_of(recipe.measures), units)
    drawn = resampled(mean_of_drawn(recipe.measures, seed=1), units)
    intervals = {name: percentiles(drawn[name]) for name in metrics}
    if len(recipe.evaluations) == 1:  # Wilson's interval of a share, as its report has it
        own = recipe.evaluations[0].metrics
        intervals |= {name: interval(own, name) or intervals[name] for name in ("f1_micro", *SHARES) if name in metrics}
    folders = [str(folder) for folder in recipe.folders]
    values = {name: values[name] for name in metrics}
    return {"folders": folders, "seeds": len(folders), **values, "intervals_95": intervals}


def _difference(
    task: str, first: str, other: str, recipes: Mapping[str, Recipe], unit: str, units: int, metrics: Sequence[str]
) -> dict[str, Any]:
    """How much more `other` measures than `first`, and what that tells."""
    one, two = recipes[first], recipes[other]
    fixed = difference(mean_of(one.measures), mean_of(two.measures))
    values = point(fixed, units)
    drawn = resampled(difference(mean_of_drawn(one.measures, seed=1), mean_of_drawn(two.measures, seed=2)), units)
    intervals = {name: percentiles(drawn[name]) for name in metrics}
    compared = TASKS[task].compared if TASKS[task].compared in metrics else metrics[0]
    before = point(mean_of(one.measures), units)[compared]
    tests = _tests(one, two, compared, units)
    low, high = intervals[compared]
    found = tests["mcnemar_p"] <= SIGNIFICANT if "mcnemar_p" in tests else low > 0 or high < 0
    better = (values[compared] > 0) == METRICS[compared].higher_is_better
    step = METRICS[compared].point or abs(before) / 100
    by_rows = resampled(fixed, units)[compared]  # seeds as they are: more rows do not make their variance smaller
    entry = {
        "of": other,
        "from": first,
        **{name: values[name] for name in metrics},
        "intervals_95": intervals,
        "compared": compared,
        **tests,
        "verdict": ("better" if better else "worse") if found else "not distinguishable",
        "one_point": step,
        "units_for_one_point": rows_to_see(step, by_rows, units),
    }
    return entry | {"sentence": _sentence(entry, before, unit, units, len(one.folders), len(two.folders))}


def _tests(one: Recipe, two: Recipe, compared: str, units: int) -> dict[str, float]:
    """The p-values that can be had: McNemar's of two runs, or a sign test of recipes with enough common seeds."""
    if compared == "accuracy" and len(one.folders) == len(two.folders) == 1:
        ids, labels = one.evaluations[0].rows, list(one.evaluations[0].metrics["per_label"])
        lines = [[recipe.evaluations[0].rows[id] for id in ids] for recipe in (one, two)]
        right = [rows_right(*_labels(each, labels)) for each in lines]
        return {"mcnemar_p": mcnemar(*right)}
    if len(one.seeds) < MIN_SEEDS or None in one.seeds or set(one.seeds) != set(two.seeds):
        return {}
    values = [[point(each, units)[compared] for each in recipe.measures] for recipe in (one, two)]
    before, after = (dict(zip(each.seeds, v, strict=True)) for each, v in zip((one, two), values, strict=True))
    return {"sign_test_p": sign_test([after[seed] - before[seed] for seed in before])}


def _sentence(entry: dict[str, Any], before: float, unit: str, units: int, *seeds: int) -> str:
    """What is under the table. before: the compared metric of the first. seeds: how many each has."""
    known, change = METRICS[entry["compared"]], entry[entry["compared"]]
    low, high = entry["intervals_95"][entry["compared"]]
    told = "".join(f", {title} {entry[name]:.2g}" for name, title in TOLD_BY.items() if name in entry)
    verdict = f"{entry['verdict']} {'from' if entry['verdict'] == 'not distinguishable' else 'than'}"
    size, needed = "one point" if known.point else "1 %", entry["units_for_one_point"]
    text = (
        f"{entry['of']} is {verdict} {entry['from']} on these {units:,} {unit}: {known.title} {before + change:.4g} "
        f"against {before:.4g}, a difference of {change:+.3g} [{low:+.3g}, {high:+.3g}]{told}. "
    )
    if needed:
        text += f"To see a true difference of {size} ({entry['one_point']:.3g}), about {needed:,} {unit} are needed."
    elif not change:
        text += "They do not differ in any of them."
    if max(seeds) > 1:
        text += f" The interval is of recipes, with {seeds[1]} and {seeds[0]} seeds: it draws seeds and {unit}."
    if max(seeds) > 1 and min(seeds) == 1:
        text += " What the seed does to the one with a single run, it cannot tell."
    return text


def comparison_text(result: dict[str, Any]) -> str:
    """The table (recipes, then differences) and the sentences, as the terminal and comparison.md show them."""
    tests = [name for name in TOLD_BY if any(name in entry for entry in result["differences"])]
    rows = [
        [name, str(run["seeds"]), *(value_text(run, metric) for metric in result["metrics"]), *[""] * len(tests)]
        for name, run in result["runs"].items()
    ]
    for entry in result["differences"]:
        cells = [_signed(entry, metric) for metric in result["metrics"]]
        cells += [f"{entry[name]:.2g}" if name in entry else "" for name in tests]
        rows.append([f"{entry['of']} - {entry['from']}", "", *cells])
    header = [f"{result['split']} split", "seeds", *(METRICS[name].title for name in result["metrics"])]
    parts = [table([*header, *(TOLD_BY[name] for name in tests)], rows)]
    parts += [entry["sentence"] for entry in result["differences"]]
    if result["task"] == CHAT and "eval_loss" not in result["metrics"]:
        parts.append("Losses are left out: the runs do not predict the same tokens (other tokenizers or templates).")
    parts.append(f"95 % intervals: those of differences by a paired bootstrap over the {result['unit']}.")
    return "\n\n".join(parts)


def _signed(entry: dict[str, Any], name: str) -> str:
    low, high = entry["intervals_95"][name]
    return f"{entry[name]:+.3f} [{low:+.3f}, {high:+.3f}]"


def answers_table(answers: Sequence[dict[str, Any]], speeds: Mapping[str, float]) -> str:
    """Per category of prompts and run: mean length in tokens, and how many answers end by themselves.

    answers: category, prompt, answers (name -> answer, tokens, stopped). speeds: name -> tokens per second.
    """
    categories = dict.fromkeys(row["category"] for row in answers)
    rows = []
    for category in [*categories, "all"]:
        these = [row["answers"] for row in answers if category in (row["category"], "all")]
        cells = []
        for name in speeds:
            tokens = np.mean([row[name]["tokens"] for row in these])
            cells.append(f"{tokens:.0f} tokens, {sum(row[name]['stopped'] for row in these)} of {len(these)} end")
        rows.append([category, *cells])
    rows.append(["tokens/s", *(f"{speed:.1f}" for speed in speeds.values())])
    return table(["answers", *speeds], rows)


def answers_text(answers: Sequence[dict[str, Any]]) -> str:
    """The answers side by side, per category, as Markdown."""
    parts: list[str] = []
    for number, row in enumerate(answers):
        if not number or row["category"] != answers[number - 1]["category"]:
            parts.append(f"## {row['category']}")
        parts.append(_quoted(row["prompt"]))
        for name, answer in row["answers"].items():
            end = "ends by itself" if answer["stopped"] else "cut off"
            parts += [f"{markdown(name)} ({answer['tokens']} tokens, {end}):", _quoted(answer["answer"])]
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    return "\n".join(f"> {markdown(line)}" for line in text.splitlines() or [""])
