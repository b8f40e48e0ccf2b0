"""A classifier: a model, the renderer of its prompts, and how its answers are read; the forward pass of a head."""

from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

from common.errors import InputError
from common.model.base_model import start_ids
from common.text.prompts import ClassificationPrompt


class HeadClassifier(nn.Module):
    """A sequence classifier that reads a decoder's hidden state at one given position of each row.

    transformers' own pooling looks for the last id that is not the pad id, which is the wrong token where a text ends
    with that id (pad == eos); here the position comes from the collator. Encoders pool in their own way.
    """

    def __init__(self, model: nn.Module, encoder: bool) -> None:
        super().__init__()
        self.model, self.encoder = model, encoder

    def forward(
        self,
        positions: torch.Tensor,  # [rows], where in the flattened batch the hidden states to classify are
        **inputs: Any,  # input_ids, attention_mask, position_ids, layout: see common.text.batches.Batch
    ) -> torch.Tensor:  # logits [rows, labels], fp32
        base: Any = self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model
        if self.encoder:
            return base(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
        hidden = getattr(base, base.base_model_prefix)(**inputs, use_cache=False).last_hidden_state
        return base.score(hidden.flatten(0, 1)[positions]).float()


def classification_prompt(tokenizer: Any, encoder: bool, **fields: Any) -> ClassificationPrompt:
    """A prompt renderer with the tokenizer's own special ids: BOS in front, the end token behind an answer.

    Encoders get their own pair ([CLS] ... [SEP]); a decoder with a head reads the end token that closes the text.
    """
    if encoder:
        special = tokenizer("")["input_ids"]
        start, end = special[:1], special[-1:]
    else:
        if tokenizer.eos_token_id is None:
            raise InputError("The tokenizer has no end token (eos), so an answer could not end.")
        start, end = start_ids(tokenizer), [tokenizer.eos_token_id]

    def encode(text: str, plain: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]

    return ClassificationPrompt(encode, start=start, end=end, **fields)


@dataclass
class Classifier:
    """A model with what is needed to ask it: the renderer of its prompts, and how its answers are read."""

    model: nn.Module
    prompt: ClassificationPrompt
    tokenizer: Any
    head: bool
    encoder: bool
    thresholds: list[float]
