"""Models that label texts: the answer to each with its probabilities, or an abstention."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from common.data.classification import Example, join_fields
from common.measure.decisions import Decision
from common.measure.scoring import classify
from common.model.base_model import precision
from common.model.classifier import Classifier

if TYPE_CHECKING:
    import torch


@dataclass
class Prediction:
    """The answer to one text.

    prediction: a label, or with several labels per row a list of them; None where the model abstained. probabilities:
    label -> number; with one label per row they add up to 1. abstained: the answer is not certain enough to be given.
    truncated: the text was too long and was cut. error: why there is no answer, for a row without a text.
    """

    prediction: str | list[str] | None
    probabilities: dict[str, float]
    abstained: bool
    truncated: bool
    error: str | None = None


@dataclass
class LabelModel:
    """A classifier on its device, in its precision (no, bf16 or fp16), and what its answers are made of."""

    classifier: Classifier
    device: "torch.device"
    precision: str
    decision: Decision

    def classify(
        self, texts: Sequence[str], batch_size: int = 16, min_probability: float | None = None
    ) -> list[Prediction]:
        """The answers to `texts`, in their order. min_probability: as of `label_examples`."""
        examples = [Example("", join_fields({"text": text}, ["text"]), ()) for text in texts]
        return self.label_examples(examples, batch_size, min_probability)

    def label_examples(
        self,
        examples: Sequence[Example],
        batch_size: int,
        min_probability: float | None = None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> list[Prediction]:
        """The answers to rows, in their order; their labels are not looked at.

        min_probability: where the answer's certainty (`Decision.certainty`) is below it, there is no prediction, as
        below a fitted cut; it promises nothing about those that remain. batch_size: as of `classify` in
        measure/scoring.py.
        """
        prompt = self.classifier.prompt
        with precision(self.device, self.precision):
            answers = iter(classify(
                self.classifier, [example for example in examples if example.text], device=self.device,
                batch_size=batch_size, progress=progress, labeled=False, decision=self.decision,
            ))  # fmt: skip
        predictions = []
        for example in examples:
            if not example.text:
                predictions.append(Prediction(None, {}, False, False, "there is no text"))
                continue
            answer = next(answers)
            p = answer.probabilities
            abstained = not answer.accepted or answer.certainty < (min_probability or 0)
            chosen = [prompt.labels[k] for k in answer.labels]
            prediction = None if abstained else chosen if prompt.multi_label else chosen[0]
            truncated = prompt.prompt(example.text).truncated
            predictions.append(Prediction(prediction, dict(zip(prompt.labels, p, strict=True)), abstained, truncated))
        return predictions

    def answer_rows(
        self,
        rows: Sequence[Example],
        batch_size: int,
        min_probability: float | None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> list[dict[str, Any]]:
        """The lines of an answer file; a row without a text has an error in its line."""
        answers = map(asdict, self.label_examples(rows, batch_size, min_probability, progress))
        return [{k: v for k, v in answer.items() if k != "error" or v is not None} for answer in answers]
