"""What fitted decisions are worth, from the probabilities that a classifier has given: no model is run.

    python evaluate.py --run RUN --split validation --max_eval_samples 1000      # before any --fit_decisions
    python evaluate.py --run RUN                                                 # the test split
    python benchmarks/decisions.py --run RUN --min_precision 0.95

Fits temperature or thresholds, and the blend with TF-IDF, to the validation rows, and measures them on the test rows.
The promise of the cut is put to the test on halves of all these rows, drawn --splits times: one half fits, the other
shows how many of the accepted answers are wrong. A half is finite: a cut that is just as good as promised fails there
about every other time.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from common import open_run  # noqa: E402
from common.data.report import table  # noqa: E402
from common.disk import read_lines  # noqa: E402
from common.errors import InputError, cli_errors  # noqa: E402
from common.measure.decisions import Decision, calibration, fit  # noqa: E402
from common.measure.gain import FILES, FOLDER, TFIDF  # noqa: E402
from common.measure.intervals import difference, percentiles, point, resampled  # noqa: E402
from common.measure.metrics import METRICS, indicator, label_measure, rows_right  # noqa: E402
from common.measure.tfidf import Tfidf  # noqa: E402
from common.options import CLASSIFICATION, option, parse_config  # noqa: E402
from common.use.runs import DECISION, Run  # noqa: E402

MEASURED = ("accuracy", "f1_micro", "f1_macro")
CALIBRATED = ("ece", "brier_score", "nll")


@dataclass
class Config:
    """decisions"""

    run: str | None = option(None, "run folder of train_cls.py")
    min_precision: float = option(0.95, "right answers that the cut is to promise", at_least=0.5, at_most=0.999)
    confidence: float = option(0.9, "of the promise", at_least=0.5, at_most=0.999)
    splits: int = option(20, "halvings that put the promise to the test", at_least=1)


@dataclass
class Rows:
    """Evaluated rows: gold label indices, and the probabilities of model and TF-IDF, [rows, labels] each."""

    gold: list[tuple[int, ...]]
    model: np.ndarray
    tfidf: np.ndarray

    def some(self, chosen: np.ndarray) -> "Rows":
        return Rows([self.gold[i] for i in np.flatnonzero(chosen)], self.model[chosen], self.tfidf[chosen])


def read_rows(run: Run, split: str) -> Rows:
    """The rows of an evaluation. Raises InputError where it is missing, or was decided already."""
    folder, labels = run.run_folder / "eval" / split, run.trained["labels"]
    lines = read_lines(folder / "predictions.jsonl")
    baseline = {line["id"]: line["probabilities"] for line in read_lines(folder / FOLDER / FILES[TFIDF])}
    if not lines or not baseline:
        raise InputError(f"{folder} lacks predictions or those of TF-IDF: evaluate.py --run RUN --split {split}")
    number = {label: k for k, label in enumerate(labels)}
    names = [[line["gold"]] if isinstance(line["gold"], str) else line["gold"] for line in lines]
    return Rows(
        [tuple(sorted(number[name] for name in row)) for row in names],
        np.array([[line["probabilities"][label] for label in labels] for line in lines]),
        np.array([[baseline[line["id"]][label] for label in labels] for line in lines]),
    )


def fitted(rows: Rows, run: Run, blend: bool, min_precision: float | None = None, confidence: float = 0.9) -> Decision:
    baseline = rows.tfidf if blend else None
    return fit(rows.model, rows.gold, multi_label=run.trained["multi_label"], baseline=baseline,
               min_precision=min_precision, confidence=confidence)  # fmt: skip


def measured(config: Config, run: Run) -> str:
    """The tables, of what was fitted to the validation rows, on the test rows."""
    validation, test = read_rows(run, "validation"), read_rows(run, "test")
    labels, multi_label = run.trained["labels"], run.trained["multi_label"]
    baseline = Tfidf.load(run.run_folder / "tfidf")
    alone, blend = fitted(validation, run, blend=False), fitted(validation, run, blend=True)
    answers: dict[str, tuple[np.ndarray, list[tuple[int, ...]]]] = {
        "model": (test.model, Decision.unfitted(multi_label, len(labels)).labels(test.model)),
        "model, fitted": (p := alone.probabilities(test.model, None), alone.labels(p)),
        TFIDF: (test.tfidf, baseline.decide(test.tfidf)),
        "blend, fitted": (p := blend.probabilities(test.model, test.tfidf), blend.labels(p)),
    }
    measures = {name: label_measure(test.gold, found, len(labels)) for name, (_, found) in answers.items()}
    rows = []
    for name, (p, _) in answers.items():
        values, drawn = point(measures[name], len(test.gold)), resampled(measures[name], len(test.gold))
        sure = calibration(p, indicator(test.gold, len(labels)), multi_label)
        shown = [f"{values[x]:.3f} [{low:.3f}, {high:.3f}]" for x in MEASURED for low, high in [percentiles(drawn[x])]]
        rows.append([name, *shown, *(f"{sure[x]:.3f}" for x in CALIBRATED)])
    heads = [METRICS[x].title for x in (*MEASURED, *CALIBRATED)]
    lines = [table([f"test split ({len(test.gold)} rows)", *heads], rows), ""]
    settings = f"Temperature {blend.temperature:.3f} (of the model alone {alone.temperature:.3f})"
    if multi_label:
        settings = f"Thresholds {np.round(blend.thresholds, 3).tolist()}"
    lines.append(f"Fitted to {len(validation.gold)} validation rows: TF-IDF's weight {blend.blend:.2f}. {settings}.")
    for name in ("model, fitted", TFIDF):
        gained = difference(measures[name], measures["blend, fitted"])
        values, drawn = point(gained, len(test.gold)), resampled(gained, len(test.gold))
        shown = [f"{METRICS[x].title} {values[x]:+.3f} [{low:+.3f}, {high:+.3f}]"
                 for x in MEASURED for low, high in [percentiles(drawn[x])]]  # fmt: skip
        lines.append(f"Blend against {name}, paired: {', '.join(shown)}.")
    return "\n".join([*lines, *promises(config, run, validation, test)])


def promises(config: Config, run: Run, *parts: Rows) -> list[str]:
    """How often the cut kept its promise on rows that it was not fitted to."""
    both = Rows([g for part in parts for g in part.gold], *(
        np.concatenate([getattr(part, name) for part in parts]) for name in ("model", "tfidf")))  # fmt: skip
    lines = []
    for blend in (False, True):
        kept, cuts, accepted = 0, 0, []
        for seed in range(config.splits):
            half = np.random.default_rng(seed).permutation(len(both.gold)) < len(both.gold) // 2
            seen, new = both.some(half), both.some(~half)
            decision = fitted(seen, run, blend, config.min_precision, config.confidence)
            if decision.cut is None:
                continue
            p = decision.probabilities(new.model, new.tfidf if blend else None)
            given = decision.certainty(p) >= decision.cut
            right = given & rows_right(new.gold, decision.labels(p))
            cuts, kept = cuts + 1, kept + bool(right.sum() >= config.min_precision * given.sum() - 1e-9)
            accepted.append(given.mean())
        share = f"; {np.mean(accepted):.0%} of the rows answered on average" if accepted else ""
        lines.append(
            f"Cut of the {'blend' if blend else 'model'} for {config.min_precision:.0%} right answers with "
            f"{config.confidence:.0%} confidence: found in {cuts} of {config.splits} halvings, promise kept on the "
            f"other half in {kept}{share}."
        )
    return lines


def check(run: Run) -> None:
    """Raises InputError for what has no undecided probabilities."""
    if run.task != CLASSIFICATION or run.folder is None:
        raise InputError(f"{run.name}: give a run of train_cls.py.")
    if run.trained.get(DECISION):
        raise InputError(f"{run.name} has a fitted decision, so its answers are decided on: use a copy without it.")


def main() -> None:
    config = parse_config(Config)
    run = open_run(config.run)
    check(run)
    print(measured(config, run))


if __name__ == "__main__":
    with cli_errors():
        main()
