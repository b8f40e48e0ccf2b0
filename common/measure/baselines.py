"""What a trained model must beat on the same rows: its untrained base; for labels also majority class and TF-IDF."""

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from common.data.classification import ClassificationData, Example
from common.disk import BASELINE, MAJORITY_FILE, SUSPECTS, damage_named, read_json, replace_folder, write_json
from common.errors import InputError
from common.measure.gain import MAJORITY, TFIDF, ZERO_SHOT, write_predictions
from common.measure.label_answer import Answer
from common.measure.metrics import classification_metrics
from common.measure.suspects import write_suspects
from common.measure.tfidf import Tfidf
from common.model import base_model, lora
from common.model.classifier import Classifier, HeadClassifier, classification_prompt
from common.model.sharding import shard
from common.model.token_losses import TokenLosses
from common.options import BASE_CHANGING_INITS
from common.text.prompts import GENERATIVE_TEMPLATE, ClassificationPrompt

UNTRAINED = "untrained base"


def untrained(
    file: Path,
    model: nn.Module,
    path: str,
    config: Any,
    accelerator: Accelerator,
    rows: Sequence[Any],
    evaluate: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    """The untrained base of a trained `model` on some of the test rows, name -> metrics; kept in `file`.

    path: of the base. config: a script's. evaluate: (rows, what=..., model=a TokenLosses) -> metrics.
    """

    def measured() -> dict[str, Any]:
        some = _some(rows, config)
        with _untrained(model, path, config, accelerator) as base:
            return {_named(UNTRAINED, some, rows): evaluate(some, what=UNTRAINED, model=TokenLosses(base))}

    return _kept(file, accelerator, measured)


@contextlib.contextmanager
def _untrained(model: nn.Module, path: str, config: Any, accelerator: Accelerator) -> Iterator[nn.Module]:
    """The base of a trained model: without its adapter, or loaded again where it is not in there any more."""
    changed = config.full_finetuning or config.init_lora_weights in BASE_CHANGING_INITS
    if changed or isinstance(model, HeadClassifier):
        base = base_model.load_base(path, config, device=accelerator.device)[0].eval()
        if config.shard_model:
            shard(base.requires_grad_(False), accelerator.device)
        yield base
    else:
        with lora.without_adapter(model):
            yield model


def _some(rows: Sequence[Any], config: Any) -> list[Any]:
    """As many of the rows as --max_baseline_samples says, in their order."""
    order = np.random.default_rng(config.split_seed).permutation(len(rows))
    return [rows[i] for i in sorted(order[: config.max_baseline_samples].tolist())]


def _named(method: str, some: Sequence[Any], rows: Sequence[Any]) -> str:
    return method if len(some) == len(rows) else f"{method} ({len(some)} of {len(rows)} rows)"


def measure(
    run: Path,
    *,
    classifier: Classifier,
    data: ClassificationData,
    path: str,
    config: Any,
    accelerator: Accelerator,
    evaluate: Callable[..., tuple[Sequence[Answer], dict[str, Any]]],
) -> dict[str, Any]:
    """All baselines of a classifier on the test split, name -> metrics or "n/a"; kept in the run folder.

    They learn from the training rows alone. Left there: eval/test/baselines.json and their predictions; what
    `measure_kept` needs for other rows; suspects.csv. path: of the base model, which is measured on
    --max_baseline_samples rows. evaluate: (classifier, examples, what=...) -> answers, metrics.
    """
    folder, test = run / "eval" / "test", data.splits["test"]
    kind = data.labels, data.multi_label

    def measured() -> dict[str, Any]:
        results: dict[str, Any] = {MAJORITY: "n/a", TFIDF: "n/a"}
        if accelerator.is_main_process:  # the others wait; they show no results
            suspects = fit(run, data, config.split_seed)
            results |= measure_kept(run, folder, test, *kind)
            if suspects:
                results[TFIDF]["suspects"] = suspects
        results[ZERO_SHOT] = "n/a"
        if prompt := None if classifier.encoder else _zero_shot_prompt(classifier, data, config):
            some = _some(test, config)
            del results[ZERO_SHOT]
            with _untrained(classifier.model, path, config, accelerator) as model:
                base = replace(classifier, model=model, prompt=prompt)
                answers, metrics = evaluate(base, some, what=ZERO_SHOT)
            results[_named(ZERO_SHOT, some, test)] = metrics
            if accelerator.is_main_process:
                write_predictions(folder, ZERO_SHOT, some, [answer.labels for answer in answers], *kind)
        return results

    return _kept(folder / "baselines.json", accelerator, measured)


def fit(run: Path, data: ClassificationData, seed: int) -> int:
    """Keeps majority.json, TF-IDF where it can be fitted, and suspects.csv; says how many suspects there are.

    run: its folder.
    """
    train, labels = data.splits["train"], data.labels
    write_json(run / MAJORITY_FILE, {"labels": [labels[k] for k in majority(train)]})
    try:
        model, unseen = Tfidf.fit(train, len(labels), data.multi_label, seed)
    except ValueError:  # scikit-learn's, for texts without words, or one label in a small sample
        return 0
    with tempfile.TemporaryDirectory(dir=run, prefix=".tfidf-") as scratch:
        (Path(scratch) / BASELINE).mkdir()
        model.save(Path(scratch) / BASELINE)
        replace_folder(Path(scratch) / BASELINE, run / BASELINE)
    return write_suspects(run / SUSPECTS, train, unseen, labels, data.multi_label)


def measure_kept(
    run: Path, folder: Path, rows: Sequence[Example], labels: Sequence[str], multi_label: bool
) -> dict[str, Any]:
    """Majority class and TF-IDF of a run on whatever rows, name -> metrics; nothing is fitted.

    run: its folder; empty where it has no baselines. folder: of the evaluation, which gets their predictions.
    """
    gold, results = [row.labels for row in rows], dict[str, Any]()
    if names := read_json(run / MAJORITY_FILE):
        answers = [tuple(labels.index(name) for name in names["labels"])] * len(rows)
        write_predictions(folder, MAJORITY, rows, answers, labels, multi_label)
        results[MAJORITY] = classification_metrics(gold, answers, labels)
    if (run / BASELINE).is_dir():
        with damage_named(run / BASELINE):
            model = Tfidf.load(run / BASELINE)
        p = model.probabilities([row.text for row in rows])
        write_predictions(folder, TFIDF, rows, model.decide(p), labels, multi_label, p)
        results[TFIDF] = classification_metrics(gold, model.decide(p), labels)
    return results


def _zero_shot_prompt(
    classifier: Classifier, data: ClassificationData, config: Any
) -> ClassificationPrompt | None:
    """The default prompt, whatever the run's own; None where it does not fit into --max_length, as a head's may not."""
    kind: dict[str, Any] = {"labels": data.labels, "multi_label": data.multi_label, "max_length": config.max_length}
    try:
        prompt = classification_prompt(classifier.tokenizer, False, template=GENERATIVE_TEMPLATE, **kind)
        prompt.reserve(data.splits["train"])
    except InputError:
        return None
    return prompt


def _kept(file: Path, accelerator: Accelerator, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in the file; else what `measure` finds, which is written there for a run that is resumed."""
    known = file.exists()
    accelerator.wait_for_everyone()  # all have looked before one writes
    if known:
        return read_json(file)
    results = measure()
    if accelerator.is_main_process:
        write_json(file, results)
    accelerator.wait_for_everyone()
    return results


def majority(train: Sequence[Example]) -> tuple[int, ...]:
    """The most frequent label (or label combination) of the training rows; of several, the first."""
    counts = Counter(example.labels for example in train)
    return min(counts, key=lambda labels: (-counts[labels], labels))
