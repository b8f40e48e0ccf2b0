"""A classifier: a model, the renderer of its prompts, and how its answers are read; the forward pass of a head."""

from dataclasses import dataclass
from functools import partial
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
        input_ids: torch.Tensor,  # [rows, length], or a shared-prefix pack (common/collate.py)
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        pool: torch.Tensor,  # [rows], the positions in the flattened batch whose hidden states are classified
    ) -> torch.Tensor:  # [rows, labels], fp32
        base = self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model
        if self.encoder:
            return base(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        hidden = getattr(base, base.base_model_prefix)(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return base.score(hidden.flatten(0, 1)[pool]).float()


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

    def encode(text: str, plain: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]

    return ClassificationPrompt(encode, start=start, end=end, encode_text=partial(encode, plain=True), **fields)


@dataclass
class Classifier:
    """A model with what is needed to ask it: the renderer of its prompts, and how its answers are read."""

    model: nn.Module
    prompt: ClassificationPrompt
    tokenizer: Any
    head: bool
    encoder: bool
    thresholds: list[float]
