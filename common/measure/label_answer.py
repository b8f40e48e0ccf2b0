"""The answer of a classifier to one row."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Answer:
    """What is known of one row: `probabilities` one per label; `labels` the answer (None: none of the set).

    nll, correct: negative log-likelihood of the gold answer, and its greedily right tokens, of `targets` tokens.
    text: what was generated. certainty, accepted: of the answer, and whether it is enough for it to be given, as a
    `Decision` has it.
    """

    labels: tuple[int, ...] | None
    probabilities: list[float]
    nll: float = 0.0
    correct: int = 0
    targets: int = 0
    text: str | None = None
    certainty: float = 0.0
    accepted: bool = True

    @classmethod
    def restored(cls, values: dict[str, Any]) -> "Answer":
        """The answer whose fields have gone through JSON."""
        labels = values["labels"]
        return cls(**{**values, "labels": None if labels is None else tuple(labels)})
