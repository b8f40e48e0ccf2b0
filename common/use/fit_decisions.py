"""Fitting how a classifier's probabilities become answers, and keeping it beside the weights."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.classification import Example
from common.disk import BASELINE, TASK_FILE, load_task, read_lines, write_json
from common.errors import InputError
from common.measure.decisions import Decision, calibration, fit
from common.measure.label_answer import Answer
from common.measure.metrics import METRICS, indicator
from common.measure.tfidf import Tfidf
from common.use.runs import DECISION, Run


def check_fit(config: Any, run: Run, rows: Sequence[Example]) -> None:
    """Raises InputError where a blend is wanted of a run without a TF-IDF baseline, or a cut by a single row."""
    if config.blend_baseline and not (run.run_folder / BASELINE).is_dir():
        raise InputError(f"--blend_baseline: {run.name} has no {BASELINE}/, which --baselines true leaves there.")
    if config.min_precision is not None and len(rows) < 2:
        raise InputError("--min_precision: half of the rows fit, the others test, and there is only one row.")


def fit_decisions(config: Any, run: Run, examples: Sequence[Example], answers: Sequence[Answer]) -> str:
    """Fits a decision to undecided `answers` of the validation split and saves it with the run; says what it is.

    config: of evaluate.py, as `check_fit` wants it.
    """
    assert run.folder
    labels, multi_label = run.trained["labels"], run.trained["multi_label"]
    model, gold = np.array([answer.probabilities for answer in answers]), [example.labels for example in examples]
    baseline = Tfidf.load(run.run_folder / BASELINE) if config.blend_baseline else None
    other = baseline.probabilities([example.text for example in examples]) if baseline else None
    decision = fit(
        model, gold, multi_label=multi_label, baseline=other, min_precision=config.min_precision,
        confidence=config.confidence, seed=config.split_seed,
    )  # fmt: skip
    if run.folder != run.run_folder:  # a copied adapter or a merged model has the only one
        shutil.rmtree(run.folder / BASELINE, ignore_errors=True)
        if decision.blend:
            shutil.copytree(run.run_folder / BASELINE, run.folder / BASELINE)
    write_json(run.folder / TASK_FILE, {**load_task(run.folder), DECISION: decision.saved()})
    before, after = (
        calibration(p, indicator(gold, len(labels)), multi_label) for p in (model, decision.probabilities(model, other))
    )
    changed = "; ".join(f"{METRICS[x].title} {before[x]:.3f} -> {after[x]:.3f}" for x in ("ece", "brier_score", "nll"))
    part = "all of" if decision.fitted["rows"] == len(examples) else "half of"
    lines = [f"On the {len(examples)} validation rows, {part} which it was fitted to: {changed}."]
    return "\n".join([*describe(decision, labels), *lines, *_chosen_by(run.run_folder)])


def describe(decision: Decision, labels: Sequence[str]) -> list[str]:
    """For people: what was fitted, and what the cut promises."""
    lines = []
    if decision.blend:
        lines.append(f"Blend: {1 - decision.blend:.2f} of the model, {decision.blend:.2f} of TF-IDF.")
    if decision.multi_label:
        pairs = zip(labels, decision.thresholds, strict=True)
        lines.append("Thresholds: " + ", ".join(f"{label} {value:.3f}" for label, value in pairs) + ".")
    else:
        lines.append(f"Temperature: {decision.temperature:.3f}.")
    if promise := decision.fitted.get("promise"):
        right, sure = (f"{100 * promise[name]:.6g}%" for name in ("min_precision", "confidence"))
        wanted = f"{right} of the answers given are right, with {sure}"
        seen = f"{promise['wrong']} of {promise['accepted']} answers wrong among {promise['tested_rows']} rows"
        if decision.cut is None:
            lines.append(
                f"No cut: that {wanted} confidence cannot be promised ({seen}; without an error, "
                f"{promise['needed']} answers are needed). Give more validation rows or a lower --min_precision."
            )
        else:
            certainty = "certainty" if decision.multi_label else "probability"
            lines.append(
                f"Cut: answers with a {certainty} below {decision.cut:.4f} are not given. Then at least {wanted} "
                f"confidence, for rows like these on the whole, not for every label ({seen})."
            )
    return lines


def _chosen_by(run: Path) -> list[str]:
    """A warning where the same rows have chosen the weights, which makes them look a little better than others."""
    times = sum(line.get("split") == "validation" for line in read_lines(run / "metrics.jsonl"))
    if times < 2:
        return []
    return [f"These rows also chose the best of {times} evaluations' weights, so new rows may do slightly worse."]
