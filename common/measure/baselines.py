"""What a classifier must beat: the majority class, and TF-IDF with logistic regression, on the same rows."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.classification import ClassificationData, Example
from common.disk import write_json
from common.errors import InputError
from common.measure.metrics import classification_metrics, indicator
from common.model import base_model, lora
from common.model.classifier import Classifier, classification_prompt
from common.text.prompts import GENERATIVE_TEMPLATE

TFIDF = "TF-IDF + logistic regression"
UNTRAINED = "untrained base, zero-shot"


def measure(
    file: Path,
    classifier: Classifier,
    data: ClassificationData,
    path: str,
    config: Any,
    accelerator: Any,
    evaluate: Callable[..., tuple],
) -> dict[str, Any]:
    """All baselines on the test split; kept in `file`, so that a resumed run does not measure them again.

    The untrained base is asked with the default prompt, whatever the run's own; an encoder cannot be asked.
    evaluate(classifier, examples, what=...) -> answers, metrics.
    """
    known = file.exists()
    accelerator.wait_for_everyone()  # all have looked before one writes
    if known:
        return json.loads(file.read_text())
    train, test, labels = data.splits["train"], data.splits["test"], data.labels
    gold = [example.labels for example in test]
    results: dict[str, Any] = {"majority class": classification_metrics(gold, majority(train, test), labels)}
    try:
        answers = tfidf_logistic_regression(train, test, len(labels), data.multi_label)
        results[TFIDF] = classification_metrics(gold, answers, labels)
    except ValueError:  # scikit-learn's, for texts without a single word or one label left of a small sample
        results[TFIDF] = "n/a"
    results[UNTRAINED] = "n/a"
    if not classifier.encoder:
        try:
            prompt = classification_prompt(
                classifier.tokenizer,
                False,
                labels=labels,
                multi_label=data.multi_label,
                template=GENERATIVE_TEMPLATE,
                max_length=config.max_length,
            )
            prompt.reserve(train)
        except InputError:  # a head's --max_length may be too short for the instruction
            prompt = None
        if prompt:
            model = classifier.model
            if classifier.head or config.init_lora_weights in lora.BASE_CHANGING_INITS:
                model = base_model.load_base(path, config, device=accelerator.device)[0]
            base = Classifier(model, prompt, classifier.tokenizer, False, False, classifier.thresholds)
            with lora.without_adapter(model):
                results[UNTRAINED] = evaluate(base, test, what=UNTRAINED)[1]
    if accelerator.is_main_process:
        write_json(file, results)
    accelerator.wait_for_everyone()
    return results


def majority(train: Sequence[Example], test: Sequence[Example]) -> list[tuple[int, ...]]:
    """The most frequent label (or label combination) of the training rows, for every test row."""
    counts = Counter(example.labels for example in train)
    answer = min(counts, key=lambda labels: (-counts[labels], labels))
    return [answer] * len(test)


def tfidf_logistic_regression(
    train: Sequence[Example], test: Sequence[Example], labels: int, multi_label: bool
) -> list[tuple[int, ...]]:
    """TF-IDF of words and word pairs, logistic regression with C = 10; one a label at 0.5 for several labels."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
    features = vectorizer.fit_transform([example.text for example in train])
    model = LogisticRegression(C=10, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label without a row in a small training split
        if multi_label:
            target = indicator([example.labels for example in train], labels)
            fitted = OneVsRestClassifier(model).fit(features, target)
        else:
            fitted = model.fit(features, [example.labels[0] for example in train])
        predicted = fitted.predict(vectorizer.transform([example.text for example in test]))
    if multi_label:
        return [tuple(int(k) for k in np.flatnonzero(row)) for row in predicted]
    return [(int(k),) for k in predicted]
