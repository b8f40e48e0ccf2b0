"""Classifiers as train_cls.py builds them, and what they answer."""

from pathlib import Path

import torch

import train_cls
from common.data.classification import Example
from common.measure.scoring import classify
from common.model import base_model, classifier, lora
from common.model.classifier import Classifier
from common.text.prompts import GENERATIVE_TEMPLATE, HEAD_TEMPLATE
from helpers.rows import toy_rows

LABELS = ["sport", "science", "music"]
TEXTS = [row["text"] for row in toy_rows(2)]


def make(path: Path, approach: str = "head", **options) -> tuple[Classifier, train_cls.Config]:
    """A classifier as train_cls.py builds it; fp32 unless options say otherwise."""
    options = {"mixed_precision": "no", "load_in_4bit": False, "lora_r": 4, "max_length": 200, **options}
    config = train_cls.Config(model=str(path), approach=approach, **options)
    encoder, head = base_model.is_encoder(str(path), config), approach == "head"
    base_model.resolve_options(config, encoder, config.approach == "head")
    tokenizer = base_model.load_tokenizer(str(path), config)
    prompt = classifier.classification_prompt(
        tokenizer,
        encoder,
        labels=LABELS,
        multi_label=False,
        template=HEAD_TEMPLATE if head else GENERATIVE_TEMPLATE,
        max_length=config.max_length,
    )
    torch.manual_seed(0)
    model, missing = base_model.load_base(str(path), config, labels=LABELS if head else None, device="cpu")
    if not config.full_finetuning:
        model = lora.add_lora(model, config, missing, head)
    model = classifier.HeadClassifier(model, encoder) if head else model
    return Classifier(model, prompt, tokenizer), config


def probabilities(classifier: Classifier) -> list[list[float]]:
    examples = [Example(str(i), text, ()) for i, text in enumerate(TEXTS)]
    answers = classify(classifier, examples, device="cpu", batch_size=3, labeled=False)
    return [answer.probabilities for answer in answers]
