"""What a trained model must beat on the same rows: its untrained base; for labels also majority class and TF-IDF."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from common.data.classification import ClassificationData, Example
from common.disk import read_json, write_json
from common.errors import InputError
from common.measure.label_answer import Answer
from common.measure.metrics import classification_metrics, indicator
from common.model import base_model, lora
from common.model.classifier import Classifier, HeadClassifier, classification_prompt
from common.model.token_losses import TokenLosses
from common.options import BASE_CHANGING_INITS
from common.text.prompts import GENERATIVE_TEMPLATE, ClassificationPrompt

UNTRAINED = "untrained base"
TFIDF = "TF-IDF + logistic regression"
ZERO_SHOT = "untrained base, zero-shot"


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
        yield base_model.load_base(path, config, device=accelerator.device)[0].eval()
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
    file: Path,
    *,
    classifier: Classifier,
    data: ClassificationData,
    path: str,
    config: Any,
    accelerator: Accelerator,
    evaluate: Callable[..., tuple[Sequence[Answer], dict[str, Any]]],
) -> dict[str, Any]:
    """All baselines of a classifier on the test split, name -> metrics or "n/a"; kept in `file`.

    path: of the base model, which is measured on --max_baseline_samples rows. evaluate: (classifier, examples,
    what=...) -> answers, metrics.
    """
    train, test, labels = data.splits["train"], data.splits["test"], data.labels
    gold = [example.labels for example in test]

    def measured() -> dict[str, Any]:
        metrics = classification_metrics(gold, majority(train, test), labels)
        results: dict[str, Any] = {"majority class": metrics, TFIDF: "n/a", ZERO_SHOT: "n/a"}
        with contextlib.suppress(ValueError):  # scikit-learn's, for texts without words, or one label in a small sample
            found = tfidf_logistic_regression(train, test, len(labels), data.multi_label)
            results[TFIDF] = classification_metrics(gold, found, labels)
        if prompt := None if classifier.encoder else _zero_shot_prompt(classifier, data, config):
            some = _some(test, config)
            del results[ZERO_SHOT]
            with _untrained(classifier.model, path, config, accelerator) as model:
                base = replace(classifier, model=model, prompt=prompt)
                results[_named(ZERO_SHOT, some, test)] = evaluate(base, some, what=ZERO_SHOT)[1]
        return results

    return _kept(file, accelerator, measured)


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


def majority(train: Sequence[Example], test: Sequence[Example]) -> list[tuple[int, ...]]:
    """The most frequent label (or label combination) of the training rows, for every test row."""
    counts = Counter(example.labels for example in train)
    return [min(counts, key=lambda labels: (-counts[labels], labels))] * len(test)


def tfidf_logistic_regression(
    train: Sequence[Example], test: Sequence[Example], labels: int, multi_label: bool
) -> list[tuple[int, ...]]:
    """TF-IDF of words and word pairs, logistic regression with C = 10; for several labels one per label, at 0.5.

    Raises ValueError for texts without words, or where one label is left.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # here, as only classification needs it
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
    regression = LogisticRegression(C=10, max_iter=1000)
    model = make_pipeline(vectorizer, OneVsRestClassifier(regression) if multi_label else regression)
    gold = [example.labels for example in train]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label without a row in a small training split
        model.fit([example.text for example in train], indicator(gold, labels) if multi_label else [k for (k,) in gold])
        predicted = model.predict([example.text for example in test])
    if multi_label:
        return [tuple(int(k) for k in np.flatnonzero(row)) for row in predicted]
    return [(int(k),) for k in predicted]
