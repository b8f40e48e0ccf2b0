"""Label scores of tiny models, by every way to answer."""

import json

import torch
import transformers

from common.data.classification import Example
from common.measure import scoring
from common.measure.metrics import summarize
from common.model import attention, classifier
from common.model.classifier import Classifier, HeadClassifier
from common.text.prompts import GENERATIVE_TEMPLATE, HEAD_TEMPLATE
from helpers.rows import toy_rows

# A label that begins another one, shared first tokens, one token and several.
LABELS = ["match", "match goal", "match coach", "sport", "quark enzyme violin"]
TEXTS = [row["text"] for row in toy_rows(3)]  # 9 texts of 4 to 12 words
_loaded: dict[str, tuple] = {}


def load(models, family: str, packs: bool = True) -> tuple:
    """fp32 model, with or without the attention that takes packs, and tokenizer."""
    if (family, packs) not in _loaded:
        model = transformers.AutoModelForCausalLM.from_pretrained(models[family]).eval()
        if packs:
            attention.use(model)
        assert attention.takes_packs(model, 100) == packs
        _loaded[family, packs] = model, transformers.AutoTokenizer.from_pretrained(models[family])
    return _loaded[family, packs]


def prompt_of(tokenizer, multi_label=False, **fields):
    options = {"labels": LABELS, "template": GENERATIVE_TEMPLATE, "max_length": 256, **fields}
    return classifier.classification_prompt(tokenizer, False, multi_label=multi_label, **options)


def predicted(models, family: str, rows: int, accelerator) -> dict:
    """Answers and metrics of the first rows, by scoring with two labels a row, by a head, and by generating."""
    model, tokenizer = load(models, family)
    examples = [Example(str(i), text, (i % 5,)) for i, text in enumerate(TEXTS[:rows])]
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(models[family], num_labels=5).eval()
    result = {}
    for way in ("score", "multi", "generate", "head"):
        template = HEAD_TEMPLATE if way == "head" else GENERATIVE_TEMPLATE
        prompt = prompt_of(tokenizer, way == "multi", template=template)
        net = HeadClassifier(base, False) if way == "head" else model
        classifier = Classifier(net, prompt, tokenizer)
        decode = "generate" if way == "generate" else "score"
        answers = scoring.predict(classifier, examples, accelerator, 2, way, decode)
        result[way] = [vars(answer) for answer in answers]
        result[f"{way} metrics"] = summarize(answers, [example.labels for example in examples], LABELS)
    return json.loads(json.dumps(result))
